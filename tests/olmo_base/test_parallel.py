"""Several ranks: each kind of parallelism gives one process's losses; what one wrote, all read."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from olmo_base.corpus.batches import Batch
from olmo_base.divided import whole_tensor
from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.parallel import ParallelConfig, Ranks, shared_model, started_ranks
from olmo_base.pretrain import run
from olmo_base.pretrain_loop import add_gradients
from olmo_base.pretrain_recipe import PretrainRecipe
from olmo_base.run.artefact import sha256_file
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.recipe import load_recipe
from tests.olmo_base import ranks
from tests.olmo_base.test_pretrain import PROJECT, recipe_file, recipe_for, rows_of, tokens

__all__ = ["tokens"]  # a fixture
STEPS = 20
KEYS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "embedding_init_std": 0.1,
    "head_init_std": 0.01,
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


WAYS: dict[str, dict[str, Any]] = {
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


SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
    eos_token_id=0,
    pad_token_id=1,
)


def rows(first: int, last: int) -> Batch:
    ids_BT = torch.randint(61, (8, 17), generator=torch.Generator().manual_seed(1))[first:last]
    return Batch(ids_BT[:, :-1], ids_BT[:, 1:], None)


def gradient_with_gathers_in_bf16(gathers: bool) -> tuple[dict[str, str], float, list[Any]]:
    """Which precision is where in a step in bf16, and the step's loss and a layer's gradient."""
    with started_ranks(ParallelConfig(data_parallel="fsdp")) as shared:
        torch.manual_seed(0)
        model, with_loss = shared_model(SMALL, shared, None, bf16=gathers)
        layer: Any = model.layers[0]
        seen: dict[str, Any] = {}
        for name, module in {"layer": layer.attention.q_proj, "norm": model.norm}.items():
            module.register_forward_pre_hook(
                lambda one, _, name=name: seen.update({name: one.weight.dtype})
            )
        layer.register_forward_hook(lambda _, __, out: seen.update({"residual": out.dtype}))
        mine = rows(4 * shared.rank, 4 * shared.rank + 4)
        loss = add_gradients(
            with_loss, [mine], z_loss=0.0, bf16=True, num_tokens=8 * 16, ranks=shared
        )
        weight = layer.attention.q_proj.weight
        seen |= {"part": weight.dtype, "gradient": weight.grad.dtype}
        gradient = whole_tensor(weight.grad).tolist()
        return {key: str(kind) for key, kind in seen.items()}, float(shared.total(loss)), gradient


def test_layers_are_gathered_in_bf16_and_stepped_in_fp32(two):
    torch.manual_seed(0)
    alone = Transformer(SMALL)
    expected = float(add_gradients(alone, [rows(0, 8)], z_loss=0.0, bf16=True))
    wanted = alone.get_parameter("layers.0.attention.q_proj.weight").grad
    assert wanted is not None
    for gathers, kind in ((True, "torch.bfloat16"), (False, "torch.float32")):
        for seen, loss, gradient in two.do(gradient_with_gathers_in_bf16, gathers):
            assert seen.pop("layer") == kind
            assert seen.keys() == {"norm", "residual", "part", "gradient"}
            assert set(seen.values()) == {"torch.float32"}
            assert loss == pytest.approx(expected, rel=1e-3)
            error = (torch.tensor(gradient) - wanted).norm() / wanted.norm()
            assert error < 0.02  # bf16 keeps 8 bits


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


def test_a_damaged_part_of_a_checkpoint_is_named_and_the_one_before_taken(
    tokens, tmp_path, two, alone
):
    keys = {**KEYS, "data_parallel": "fsdp", "save_steps": 5, "save_total_limit": 9}
    recipe = recipe_for(tokens, tmp_path, **keys)
    two.do(run, recipe)
    folder = tmp_path / "run"
    stop_after(folder, 15)
    (folder / "checkpoints" / "step_000015" / "__1_0.distcp").unlink()
    part = folder / "checkpoints" / "step_000010" / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    two.do(run, recipe)
    said = (folder / "train.log").read_text()
    assert "step_000015 is corrupt (__1_0.distcp is missing)" in said
    assert "step_000010 is corrupt (the content of __1_0.distcp has changed)" in said
    assert "step_000005, after step 5" in said
    assert_same(folder, alone())
    stop_after(folder, 15)
    for path in (folder / "checkpoints").iterdir():
        (path / "__0_0.distcp").write_bytes(b"")
    errors = two.do(run, recipe)
    assert all(isinstance(error, UserError) for error in errors)
    assert "is corrupt. Move the folder" in str(errors[0])


def test_a_checkpoint_cannot_make_the_reader_run_code(tokens, tmp_path, two):
    recipe = recipe_for(tokens, tmp_path, **KEYS, save_steps=18)
    two.do(run, recipe)
    folder = tmp_path / "run"
    stop_after(folder, 18)
    metadata = folder / "checkpoints" / "step_000018" / ".metadata"
    metadata.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    index = metadata.with_name("index.json")
    content = json.loads(index.read_text())
    content["files"][".metadata"] = {
        "bytes": metadata.stat().st_size,
        "sha256": sha256_file(metadata),
    }
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"names posix\.mkdir, which is not data"):
        run(recipe_for(tokens, tmp_path, **KEYS, save_steps=18))
    assert not (tmp_path / "ran").exists()


class Bomb:
    """What a pickle can be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---------------------------------------------------------------- where checkpoints go


def test_permanent_checkpoints_stay_and_the_last_ones(tokens, tmp_path, two):
    keys = {**KEYS, "save_steps": 2, "save_total_limit": 2, "permanent_save_steps": 6}
    (tmp_path / "alone").mkdir()
    two.do(run, recipe_for(tokens, tmp_path, **keys))
    run(recipe_for(tokens, tmp_path / "alone", **keys))
    for folder in (tmp_path, tmp_path / "alone"):
        kept = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        assert kept == [f"step_{step:06d}" for step in (6, 12, 16, 18)]
    with pytest.raises(UserError, match="permanent_save_steps: 5 is no multiple of save_steps 2"):
        recipe_for(tokens, tmp_path, **{**keys, "permanent_save_steps": 5})


def test_checkpoints_go_to_a_uri_and_come_back_from_it(tokens, tmp_path, two, alone):
    keys = {**KEYS, "save_steps": 4, "checkpoint_dir": f"file://{tmp_path}/store"}
    recipe = recipe_for(tokens, tmp_path, **keys, data_parallel="fsdp")
    ends = two.do(run_until_signalled, recipe, signal.SIGTERM)
    assert ends == [("stopped", 0, " after step 11, which is saved")] * 2
    store = tmp_path / "store"
    assert sorted(path.name for path in store.iterdir()) == ["step_000008", "step_000011"]
    (store / "step_000011" / "__1_0.distcp").write_bytes(b"")
    (store / "step_000012").mkdir()  # no index.json: not complete
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    run(recipe)
    said = (tmp_path / "run" / "train.log").read_text()
    assert f"{store}/step_000011 is corrupt" in said
    assert "after step 8" in said
    assert_same(tmp_path / "run", alone())


def s3_server(monkeypatch):
    """A server in this process that speaks S3, with one empty bucket."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    keys = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for key, value in (keys | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}).items():
        monkeypatch.setenv(key, value)
    files = s3fs.S3FileSystem()
    files.mkdir("runs")
    yield files
    files.rm("runs", recursive=True)  # the next server in this process would still have it
    s3fs.S3FileSystem.clear_instance_cache()
    started.stop()


def gs_server(monkeypatch):
    """A server in this process that speaks as Google Cloud Storage, with one empty bucket."""
    reason = "gcp-storage-emulator is not installed"
    server = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    # Asks the real service over gRPC what kind of bucket it is, a minute long.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    fsspec = pytest.importorskip("fsspec")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="runs")
    started.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    yield fsspec.filesystem("gs")
    gcsfs.GCSFileSystem.clear_instance_cache()
    started.wipe()
    started.stop()


SERVERS = {"s3": s3_server, "gs": gs_server}


@pytest.fixture(params=list(SERVERS))
def bucket(request, monkeypatch):
    """How a URI there begins, and its files."""
    for files in SERVERS[request.param](monkeypatch):
        yield request.param, files


def test_checkpoints_go_to_a_bucket_the_last_ones_stay_and_a_run_goes_on_from_there(
    tokens, tmp_path, bucket, alone, monkeypatch
):
    scheme, files = bucket
    keys = {
        **KEYS,
        "save_steps": 4,
        "save_total_limit": 2,
        "checkpoint_dir": f"{scheme}://runs/a/b/",
    }
    recipe = recipe_for(tokens, tmp_path, **keys)
    with monkeypatch.context() as patch:
        original = Ranks.at

        def at(self, step, *, waits=False):
            if step == 13 and waits:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, step, waits=waits)

        patch.setattr(Ranks, "at", at)
        with pytest.raises(Stopped):
            run(recipe)
    kept = sorted(Path(path).name for path in files.ls("runs/a/b", refresh=True))
    assert kept == ["step_000012", "step_000014"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    files.rm_file("runs/a/b/step_000014/index.json")  # as if it had been killed while writing
    run(recipe)
    assert "step_000012, after step 12" in (tmp_path / "run" / "train.log").read_text()
    assert_same(tmp_path / "run", alone())


def test_a_bucket_that_is_not_there_is_one_message_and_is_not_made(tokens, tmp_path, bucket):
    scheme, files = bucket
    uri = f"{scheme}://nowhere/a"
    with pytest.raises(UserError, match=f"{uri} cannot be used: there is no such bucket"):
        run(recipe_for(tokens, tmp_path, **KEYS, checkpoint_dir=uri))
    assert [path.strip("/") for path in files.ls("", refresh=True)] == ["runs"]


def test_a_store_in_memory_keeps_the_checkpoints_of_one_process(tokens, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    keys = {**KEYS, "save_steps": 4, "checkpoint_dir": f"memory://{tmp_path}"}
    run(recipe_for(tokens, tmp_path, **keys))
    kept = fsspec.filesystem("memory").ls(str(tmp_path), detail=False)
    assert sorted(Path(path).name for path in kept) == ["step_000012", "step_000016"]
    fsspec.filesystem("memory").rm(str(tmp_path), recursive=True)


def test_a_store_of_an_unknown_kind_is_one_message(tokens, tmp_path):
    recipe = recipe_for(tokens, tmp_path, **KEYS, checkpoint_dir="nothing://there")
    with pytest.raises(UserError, match=r"nothing://there cannot be opened: .* install s3fs"):
        run(recipe)


def run_on_a_small_disk(recipe, rank):
    """No file of this rank can be longer than 100,000 bytes; a checkpoint's part is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ.get("RANK", "0") == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        return run(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_message_and_loses_nothing(tokens, tmp_path, two, alone):
    (tmp_path / "alone").mkdir()
    keys = {**KEYS, "save_steps": 6, "data_parallel": "fsdp"}
    recipe, recipe_alone = (
        recipe_for(tokens, path, **keys) for path in (tmp_path, tmp_path / "alone")
    )
    two.do(run_until_signalled, recipe, signal.SIGTERM)
    errors = two.do(run_on_a_small_disk, recipe, "1")
    for error in errors:
        assert isinstance(error, UserError)
        assert re.search(
            r"checkpoint of step 12 could not be written: .*File too large", str(error)
        )
    with pytest.raises(UserError, match=r"of step 6 could not be written: .*File too large"):
        run_on_a_small_disk(recipe_alone, "0")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert {"step_000006", "step_000011"} <= set(kept)
    two.do(run, recipe)
    run(recipe_alone)
    for folder in (tmp_path, tmp_path / "alone"):
        assert_same(folder / "run", alone())


# ---------------------------------------------------------------- a rank that hangs


def run_and_hang(recipe, said):
    """Rank 1 stops taking part in step 6; what is said goes into a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if os.environ["RANK"] == "1":
        original = Ranks.at

        def at(self, step, *, waits=False):
            original(self, step)
            if step == 5:
                threading.Event().wait()

        Ranks.at = at  # type: ignore[method-assign]
    return run(recipe)


def test_a_rank_that_hangs_is_named_and_ends_the_run(tokens, tmp_path):
    recipe = recipe_for(tokens, tmp_path, **KEYS, hang_seconds=4)
    stuck = ranks.Ranks(2)
    assert stuck.do(run_and_hang, recipe, tmp_path / "said") == [None, None]
    stuck.end()
    assert [process.exitcode for process in stuck.processes] == [1, 1]
    said = (tmp_path / "said").read_text()
    assert "rank 1 of 2 has made no progress for" in said
    assert "in step 6, and the others wait for it" in said
    assert said.count("error:") == 1


# ---------------------------------------------------------------- what cannot be divided


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_parallel_shards": 2}, "data_parallel_shards: 2, but data_parallel is ddp"),
        ({"tensor_parallel": 2}, "data_parallel: ddp keeps layers whole"),
        ({"data_parallel": "fsdp", "tensor_parallel": 2}, "does not divide the 1 ranks"),
        ({"context_parallel": 3}, "does not divide the 1 ranks"),
        ({"gradient_accumulation_steps": 2}, "it follows from global_batch_size 8"),
        ({"hang_seconds": 0}, "hang_seconds"),
    ],
)
def test_what_cannot_be_is_refused(tokens, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        run(recipe_for(tokens, tmp_path, **{**KEYS, **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tensor_parallel": 4}, "tensor_parallel 4 does not divide num_key_value_heads 2"),
        ({"context_parallel": 4, "max_length": 20}, "into 8 equal pieces; max_length 20"),
        ({"data_parallel": "hsdp", "data_parallel_shards": 3}, "does not divide the 4 ranks that"),
    ],
)
def test_shapes_that_cannot_be_cut_are_refused(tokens, tmp_path, four, keys, message):
    recipe = recipe_for(tokens, tmp_path, **{**KEYS, "data_parallel": "fsdp", **keys})
    assert all(message in str(error) for error in four.do(run, recipe))


def test_without_a_global_batch_size_each_rank_adds_its_own(tokens, tmp_path, two):
    keys = {**KEYS, "global_batch_size": 0, "per_device_train_batch_size": 2}
    recipe = recipe_for(tokens, tmp_path, **{**keys, "gradient_accumulation_steps": 2})
    two.do(run_until_signalled, recipe, signal.SIGTERM)
    kept = load_recipe(PretrainRecipe, tmp_path / "run" / "recipe.yaml")
    assert kept.global_batch_size == 8  # 2 sequences x 2 micro-batches x 2 ranks
    with pytest.raises(UserError, match="global_batch_size was 8 and is 0"):
        run(recipe)


# ---------------------------------------------------------------- as users start it


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(ranks.free_port()), "-m", "open_instruct", "run", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


def test_torchrun_trains_and_tells_a_mistake_once(tokens, tmp_path):
    path = str(recipe_file(tokens, tmp_path, **{**KEYS, "max_steps": 3, "data_parallel": "fsdp"}))
    wrong = torchrun(path, "context_parallel=3")
    assert wrong.returncode != 0
    assert wrong.stderr.count("does not divide the 2 ranks. Start a multiple of 3.") == 1
    right = torchrun(path)
    assert right.returncode == 0, right.stderr
    assert right.stderr.count("is finished") == 1
    assert len(curve(tmp_path / "run")) == 3
