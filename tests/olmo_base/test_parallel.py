"""Several ranks: each kind of parallelism gives one process's losses; what one wrote, all read."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from olmo_base.parallel import Ranks
from olmo_base.pretrain import run
from olmo_base.run.errors import UserError
from tests.olmo_base import ranks
from tests.olmo_base.test_pretrain import recipe_for, rows_of, tokens

__all__ = ["tokens"]  # a fixture
STEPS = 20
KEYS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "z_loss": 1e-3,
    "max_ngram_repeats": 4,  # ranks lose different numbers of sequences
    "max_eval_tokens": 500,
    "per_device_train_batch_size": 3,  # divides neither a step nor a rank's part of it
    "global_batch_size": 8,
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def four():
    """Four ranks."""
    started = ranks.Ranks(4)
    yield started
    started.end()


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    """The folders of one process's runs, made when asked for."""
    made = {}

    def folder(**keys):
        name = json.dumps(keys, sort_keys=True)
        if name not in made:
            parent = tmp_path_factory.mktemp("alone")
            made[name] = run(recipe_for(tokens, parent, **{**KEYS, **keys})).path
        return made[name]

    return folder


def curve(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


def assert_same(found: Path, expected: Path) -> None:
    """Losses of every step, held-out losses, counts, and the weights at the end."""
    assert len(curve(expected)) == STEPS
    assert curve(found) == pytest.approx(curve(expected), abs=1e-5)
    ours, theirs = rows_of(found), rows_of(expected)
    for key in ("eval_loss", "grad_norm", "tokens", "sequences_left_out", "epoch"):
        values = [row[key] for row in theirs if key in row]
        assert values
        assert [row[key] for row in ours if key in row] == pytest.approx(values, rel=1e-4), key
    weights, whole = (load_file(path / "model.safetensors") for path in (found, expected))
    assert weights.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(weights[name], whole[name], rtol=0, atol=1e-4)


WAYS = {
    "ddp": {},
    "fsdp": {"data_parallel": "fsdp", "gradient_checkpointing": True},
    "hsdp": {"data_parallel": "hsdp", "data_parallel_shards": 2, "mask_documents": True},
    "tensor": {"data_parallel": "fsdp", "tensor_parallel": 2, "mask_documents": True},
    "context": {"context_parallel": 2, "mask_documents": True},
    "all": {"data_parallel": "fsdp", "tensor_parallel": 2, "context_parallel": 2},
}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("way", WAYS)
def test_several_ranks_give_the_losses_of_one_process(tokens, tmp_path, four, alone, way, optim):
    keys = {**WAYS[way], "optim": optim}
    four.do(run, recipe_for(tokens, tmp_path, **{**KEYS, **keys}))
    shape = {key: keys[key] for key in ("optim", "mask_documents") if key in keys}
    assert_same(tmp_path / "run", alone(**shape))


# ---------------------------------------------------------------- stopped, and gone on with others


@pytest.fixture(scope="module")
def two():
    """Two ranks."""
    started = ranks.Ranks(2)
    yield started
    started.end()


@pytest.mark.parametrize(
    ("optim", "way"), [("adamw", {"data_parallel": "fsdp", "tensor_parallel": 2}), ("muon", {})]
)
def test_saved_by_four_ranks_and_gone_on_with_by_two_and_by_one(
    tokens, tmp_path, four, two, alone, optim, way
):
    keys = {**KEYS, "optim": optim, "save_steps": 6, "save_total_limit": 9}
    four.do(run, recipe_for(tokens, tmp_path, **keys, **way))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        f"step_{step:06d}" for step in (6, 12, 18)
    ]

    def go_on_from(step, start, **others):
        """In a copy of the run that was killed after this step."""
        (tmp_path / start.__name__).mkdir()
        folder = tmp_path / start.__name__ / "run"
        shutil.copytree(tmp_path / "run", folder)
        stop_after(folder, step)
        start(recipe_for(tokens, folder.parent, **keys, **others))
        assert_same(folder, alone(optim=optim))
        return folder

    def by_two(recipe):
        two.do(run, recipe)

    def by_one(recipe):
        run(recipe)

    go_on_from(6, by_two, data_parallel="hsdp", data_parallel_shards=2)
    folder = go_on_from(12, by_one)
    assert (folder / "checkpoints" / "step_000018" / "model.safetensors").is_file()

    # what one process wrote is read by two
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(folder, tmp_path / "run")

    def by_two_after_one(recipe):
        two.do(run, recipe)

    go_on_from(18, by_two_after_one, data_parallel="fsdp")


def stop_after(folder: Path, step: int) -> None:
    """Make a finished run one that was killed when it had just saved this step."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (folder / "model.safetensors").unlink()


def run_until_signalled(recipe, signal_number):
    """Rank 1 is sent the signal when it has seen ten steps begin."""
    if os.environ["RANK"] == "1":
        original, seen = Ranks.at, []

        def at(self, step, *, waits=False):
            seen.append(step)
            if step == 10 and waits:
                os.kill(os.getpid(), signal_number)
            original(self, step, waits=waits)

        Ranks.at = at  # type: ignore[method-assign]
        try:
            return run(recipe)
        finally:
            Ranks.at = original  # type: ignore[method-assign]
    return run(recipe)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_makes_all_save_and_end_with_exit_code_0(
    tokens, tmp_path, two, alone, number
):
    recipe = recipe_for(tokens, tmp_path, **KEYS, data_parallel="fsdp")
    ends = two.do(run_until_signalled, recipe, number)
    assert ends == [("stopped", 0, " after step 11, which is saved")] * 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000011"]
    two.do(run, recipe)
    assert_same(tmp_path / "run", alone())


def run_and_die_while_saving(recipe):
    """Rank 1 is killed with half of its second checkpoint written."""
    if os.environ["RANK"] == "1":
        write, begun = FileSystemWriter.write_data, []

        def write_half(self, plan, planner):
            begun.append(plan)
            if len(begun) == 2:
                Path(self.path, "__1_0.distcp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, plan, planner)

        FileSystemWriter.write_data = write_half  # type: ignore[method-assign]
    return run(recipe)


def test_a_rank_killed_while_saving_leaves_the_checkpoint_before_it(tokens, tmp_path, two, alone):
    recipe = recipe_for(tokens, tmp_path, **KEYS, data_parallel="fsdp", save_steps=6)
    mortal = ranks.Ranks(2)
    mortal.begin(run_and_die_while_saving, recipe)
    mortal.processes[1].join()
    assert mortal.processes[1].exitcode == -signal.SIGKILL
    mortal.processes[0].kill()  # as torchrun does with the rest
    mortal.end()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_000006", ".step_000012.tmp"}
    two.do(run, recipe)
    said = (tmp_path / "run" / "train.log").read_text()
    assert f"going on from {checkpoints}/step_000006, after step 6" in said
    assert_same(tmp_path / "run", alone())


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_part_of_a_checkpoint_is_named_and_the_one_before_taken(
    tokens, tmp_path, two, alone, damage
):
    recipe = recipe_for(tokens, tmp_path, **KEYS, data_parallel="fsdp", save_steps=9)
    two.do(run, recipe)
    folder = tmp_path / "run"
    stop_after(folder, 18)
    part = folder / "checkpoints" / "step_000018" / "__1_0.distcp"
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    two.do(run, recipe)
    said = (folder / "train.log").read_text()
    words = "__1_0.distcp is missing" if damage == "missing" else "content of __1_0.distcp has"
    assert f"step_000018 is corrupt ({words}" in said
    assert "step_000009, after step 9" in said
    assert_same(folder, alone())
    stop_after(folder, 18)
    for path in (folder / "checkpoints").iterdir():
        (path / "__0_0.distcp").write_bytes(b"")
    errors = two.do(run, recipe)
    assert all(isinstance(error, UserError) for error in errors)
    assert "is corrupt. Move the folder" in str(errors[0])
