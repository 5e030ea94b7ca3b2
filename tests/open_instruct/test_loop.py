import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from olmo_base.model.context import SplitContext
from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import RunConfig, RunFolder
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.metrics import LogConfig
from olmo_base.run.resume import CheckpointConfig
from open_instruct.__main__ import main
from open_instruct.batches import Examples
from open_instruct.encode import Encoded
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import (
    HeldOut,
    Loss,
    Totals,
    TrainConfig,
    Workers,
    add_gradients,
    asked_sharding,
    asks_for_zero,
    evaluate,
    settle,
    steps_of,
    train,
)
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import RatedExamples, loss_against, rated_loss_against
from open_instruct.reference import answer_logprobs
from open_instruct.sft import summed_loss
from open_instruct.sharding import gathered
from open_instruct.zero import is_divided
from tests.open_instruct.tiny import (
    rows_of,
    save_tiny_model,
    tiny_olmo2,
    write_dialogues,
    write_pairs,
    write_rated,
    write_recipe,
)

ROOT = Path(__file__).resolve().parents[2]

NUM = 12  # examples in a step


def random_examples(number=NUM, width=1, seed=0):
    random = np.random.default_rng(seed)

    def row():
        length = int(random.integers(4, 30))
        first_learnt = int(random.integers(1, length))
        ids = random.integers(0, 256, size=length).tolist()
        return Encoded(ids, [place >= first_learnt for place in range(length)])

    return Examples([tuple(row() for _ in range(width)) for _ in range(number)])


def gradients_of_step(model, examples, terms, loss, *, per_device, accumulation, ranks, cost=0.0):
    """The first step's gradients, cut for so many ranks; what DDP would exchange is added up."""
    steps = steps_of(
        examples,
        terms,
        TrainConfig(
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation
        ),
        seed=1,
        num_ranks=ranks,
        cost_of_cut=cost,
    )
    assert steps.per_step == NUM
    model.zero_grad()
    of_rank = [steps.micro_batches(0, rank) for rank in range(ranks)]
    of_all = [batch for batches in of_rank for batch in batches]
    settled = settle(loss, model, of_all, steps.num_terms(0), Workers(False))
    for batches in of_rank:
        add_gradients(Workers(False), model, batches, steps.num_terms(0), settled, Totals())
    return gradients_of(model)


def gradients_of(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_a_step_of_a_global_batch_is_the_same_examples_for_any_number_of_ranks():
    examples = random_examples(40)
    config = TrainConfig(per_device_train_batch_size=2, global_batch_size=10)
    of_ranks = [
        steps_of(examples, examples.num_labels_NW[:, 0], config, seed=1, num_ranks=ranks)
        for ranks in (1, 3, 16)
    ]
    for step in range(of_ranks[0].total):
        one, three, sixteen = (steps.numbers(step).tolist() for steps in of_ranks)
        assert one == three == sixteen and len(one) == 10
    for ranks, steps in zip((1, 3, 16), of_ranks, strict=True):
        read = [batch for rank in range(ranks) for batch in steps.micro_batches(0, rank)]
        # A rank without an example has a row of which nothing is learnt.
        assert sum(len(batch.label_ids_L) for batch in read) == steps.num_terms(0)
        assert all(len(batch.ids_RT) <= 2 for batch in read)


def test_accumulation_beside_a_global_batch_is_refused():
    with pytest.raises(UserError, match="gradient_accumulation_steps: 4, but it follows from"):
        TrainConfig(gradient_accumulation_steps=4, global_batch_size=10)


SIX_CUTS = [(12, 1, 1), (6, 2, 1), (3, 4, 1), (1, 12, 1), (2, 3, 2), (4, 1, 3)]


@pytest.mark.parametrize("stage", ["sft", "dpo", "dpo, shared prompts", "orpo", "kto"])
def test_the_same_step_cut_six_ways_gives_the_same_gradients(stage):
    model = LabelLogprobs(tiny_olmo2())
    loss: Loss
    if stage == "sft":
        examples, loss = random_examples(), summed_loss
        terms = examples.num_labels_NW.sum(axis=1)
    elif stage == "orpo":
        examples = random_examples(width=2)
        loss, terms = loss_against(None, LossConfig(loss_type="orpo")), np.ones(NUM)
    elif stage == "kto":
        examples, mismatched = random_examples(), random_examples(seed=7)
        rated = RatedExamples(examples, mismatched, torch.arange(NUM) % 3 > 0)
        with torch.no_grad():
            own, other = (
                answer_logprobs(model, part.batch(range(NUM)), 1)[:, 0] - 0.4
                for part in (examples, mismatched)
            )
        loss = rated_loss_against(own, other, rated, LossConfig(loss_type="kto", beta=0.9))
        terms = np.ones(NUM)
    else:
        examples = random_examples(width=2)
        reference_P2 = torch.randn(NUM, 2, generator=torch.Generator().manual_seed(0)) - 60
        loss, terms = loss_against(reference_P2, LossConfig(beta=0.5)), np.ones(NUM)

    whole = examples.batch(range(NUM))
    if stage == "dpo, shared prompts":
        assert model.share_prompts(examples) is None
        examples = examples.sharing_prompts()
    settled = settle(loss, model, [whole], NUM, Workers(False))
    (settled(model, whole)["loss"] / terms.sum()).backward()
    expected = gradients_of(model)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2

    for per_device, accumulation, ranks in SIX_CUTS:
        for cost in (0.0, 1e9):  # cut as fine as saves padding; no finer than asked
            found = gradients_of_step(
                model,
                examples,
                terms,
                loss,
                per_device=per_device,
                accumulation=accumulation,
                ranks=ranks,
                cost=cost,
            )
            for name in expected:
                torch.testing.assert_close(
                    found[name], expected[name], atol=1e-6, rtol=0, msg=f"{name}, {per_device=}"
                )


def test_what_is_no_label_does_not_enter_the_loss():
    model = LabelLogprobs(tiny_olmo2())

    def loss(last_id, is_last_learnt):
        row = Encoded([5, 6, 7, last_id], [False, True, True, is_last_learnt])
        return summed_loss(model, Examples([(row,)]).batch([0]))["loss"].item()

    assert loss(8, False) == loss(9, False)
    assert loss(8, True) != loss(9, True)


# ---------------------------------------------------------------- whole runs in this process


@dataclass(frozen=True)
class LoopRecipe:
    run: RunConfig
    stage: str = "sft"
    extra: dict[str, Any] = field(default_factory=dict)


TRAIN = TrainConfig(per_device_train_batch_size=4, num_train_epochs=3.0)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_ratio=0.1)


def train_tiny(
    path: Path,
    *,
    loss=summed_loss,
    config=TRAIN,
    optim=OPTIM,
    model_changes=None,
    logging_steps=1,
    save_steps=4,
    with_held_out=True,
):
    """Train a tiny model on 12 random rows, 9 steps; its weights and the figures of the end."""
    examples, others = random_examples(), random_examples(5, seed=1)
    workers = Workers(False)
    with workers.main_first():
        folder = RunFolder.open(LoopRecipe(RunConfig(str(path))), [])
    language_model = tiny_olmo2(**(model_changes or {}))
    model = workers.place(language_model)
    steps = steps_of(
        examples,
        examples.num_labels_NW.sum(axis=1),
        config,
        seed=3,
        num_ranks=workers.num_ranks,
    )
    try:
        results = train(
            folder,
            workers,
            model,
            steps,
            loss,
            HeldOut(others, others.num_labels, summed_loss) if with_held_out else None,
            seed=3,
            config=config,
            optim=optim,
            checkpoints=CheckpointConfig(save_steps=save_steps, save_total_limit=2),
            log=LogConfig(logging_steps=logging_steps),
        )
    finally:
        folder.release()
    weights = {
        name: gathered(weight, keeps=True) if is_divided(weight) else weight.detach()
        for name, weight in language_model.named_parameters()
    }
    return weights, results


def loss_that_signals(at_call: int, number: int):
    """The ordinary loss; in its n-th call the process gets a real signal."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += model.training
        if calls == at_call:
            calls += 1
            os.kill(os.getpid(), number)
        return summed_loss(model, batch)

    return loss


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_ends_as_if_never_stopped(
    tmp_path, number, logging_steps
):
    dropout = {"attention_dropout": 0.3}  # so that the random generator matters
    expected, figures = train_tiny(
        tmp_path / "whole", model_changes=dropout, logging_steps=logging_steps
    )
    with pytest.raises(Stopped) as stopped:
        train_tiny(
            tmp_path / "stopped",
            loss=loss_that_signals(6, number),
            model_changes=dropout,
            logging_steps=logging_steps,
        )
    assert stopped.value.signal_number == number
    torch.manual_seed(99)  # a new process would not have the old one's generator either
    found, resumed_figures = train_tiny(
        tmp_path / "stopped", model_changes=dropout, logging_steps=logging_steps
    )
    assert_same_weights(found, expected)
    assert resumed_figures == figures

    timed = {"seconds", "tokens_per_second"}
    rows = [
        [
            {key: value for key, value in row.items() if key not in timed}
            for row in rows_of(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "stopped")
    ]
    assert rows[0] == rows[1]


def test_dropout_acts_and_follows_the_seed(tmp_path):
    expected, _ = train_tiny(tmp_path / "a")
    found, _ = train_tiny(tmp_path / "b", model_changes={"attention_dropout": 0.3})
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_rows_hold_the_keys_that_readers_count_on(tmp_path):
    train_tiny(tmp_path / "run", config=replace(TRAIN, eval_steps=4), logging_steps=2)
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in trained] == [2, 4, 6, 8, 9]
    assert [row["step"] for row in evaluated] == [0, 4, 8, 9]
    assert set(trained[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm",
        "tokens", "tokens_per_second", "seconds",
    }  # fmt: skip
    examples = random_examples()
    assert trained[-1]["tokens"] == 3 * examples.num_tokens
    assert trained[-1]["epoch"] == 3.0
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_the_logged_loss_is_the_mean_over_label_tokens_since_the_last_row(tmp_path):
    optim = OptimConfig(learning_rate=1e-30)  # weights stay as they are
    train_tiny(
        tmp_path / "run", config=replace(TRAIN, num_train_epochs=1.0), optim=optim, logging_steps=3
    )
    (row,) = [row for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    examples = random_examples()
    total = summed_loss(LabelLogprobs(tiny_olmo2()), examples.batch(range(NUM)))["loss"]
    assert row["loss"] == pytest.approx(total.item() / examples.num_labels, abs=1e-6)


def test_evaluation_is_the_mean_over_all_terms_whatever_the_batch_size():
    model = LabelLogprobs(tiny_olmo2())
    examples = random_examples(7)
    held_out = HeldOut(examples, examples.num_labels, summed_loss)
    found = [evaluate(model, held_out, Workers(False), size)["eval_loss"] for size in (1, 3, 50)]
    whole = summed_loss(model, examples.batch(range(7)))["loss"].item() / examples.num_labels
    assert found == pytest.approx([whole] * 3, abs=1e-6)
    assert model.training


def test_a_loss_that_is_no_number_ends_the_run_in_words_and_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"(loss|gradient) is (nan|inf).*learning_rate"):
        train_tiny(
            tmp_path / "run",
            optim=OptimConfig(learning_rate=1e30),
            logging_steps=100,
            save_steps=3,
            with_held_out=False,
        )
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_the_learning_rate_follows_the_schedule_to_the_last_step(tmp_path):
    optim = OptimConfig(learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=3)
    train_tiny(tmp_path / "run", optim=optim)
    rates = [
        row["learning_rate"] for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row
    ]
    expected = [1 / 3, 2 / 3, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx([1e-3 * part for part in expected])


def test_bf16_computes_near_float32_and_keeps_float32_weights():
    examples = random_examples()
    exact = Workers(False).place(tiny_olmo2())
    rounded = Workers(True).place(tiny_olmo2())
    batch = examples.batch(range(NUM))
    torch.testing.assert_close(rounded(batch), exact(batch), atol=0.05, rtol=0)
    assert not torch.equal(rounded(batch), exact(batch))
    assert rounded(batch).dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in rounded.parameters())


def test_gradient_checkpointing_changes_memory_and_not_gradients():
    examples = random_examples()
    batch = examples.batch(range(NUM))
    found = []
    for checkpointing in (False, True):
        language_model = tiny_olmo2()
        if checkpointing:
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model = LabelLogprobs(language_model).train()
        summed_loss(model, batch)["loss"].backward()
        found.append(gradients_of(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# ---------------------------------------------------------------- two processes

DATA = {
    "sft": "dialogues.jsonl",
    "tied": "dialogues.jsonl",
    "dpo": "pairs.jsonl",
    "kto": "rated.jsonl",
    "lora": "dialogues.jsonl",
    "reward": "pairs.jsonl",
    "context": "dialogues.jsonl",
}
OTHER_KEYS: dict[str, dict[str, Any]] = {
    "sft": dict(stage="sft", eval_steps=2, load_best_model_at_end=True),
    # Layers of transformers, not of ours, and one matrix at both ends.
    "tied": dict(
        stage="sft",
        model_name_or_path="tied",
        attn_implementation="eager",
        gradient_checkpointing=True,
    ),
    # Each dialogue cut over the two, where two are native OLMos.
    "context": dict(stage="sft", gradient_checkpointing=True),
    "kto": dict(stage="dpo", loss_type="kto"),
    "lora": dict(stage="sft", use_peft=True, lora_r=4, lora_dropout=0.0),
}
ALL_STAGES = """
import sys
from open_instruct.__main__ import main
for recipe in sys.argv[1:]:
    assert main(["run", recipe]) == 0, recipe
"""
DROPOUT = {"attention_dropout": 0.3}
# Divided weights go on from a checkpoint bit for bit, on native layers and on transformers'.
STOPPED_AND_WHOLE = """
import shutil
import signal
from pathlib import Path
import torch
from olmo_base.run.errors import Stopped
from tests.open_instruct.test_loop import DROPOUT, loss_that_signals, train_tiny

def here(weight):
    return weight.to_local() if hasattr(weight, "to_local") else weight

for name, changes in {"native": {}, "dropout": DROPOUT}.items():
    expected, figures = train_tiny(Path(f"KIND_{name}_whole"), model_changes=changes)
    try:
        loss = loss_that_signals(4, signal.SIGTERM)
        train_tiny(Path(f"KIND_{name}_stopped"), loss=loss, model_changes=changes)
        raise SystemExit("it was not stopped")
    except Stopped:
        pass
    if torch.distributed.get_rank() == 0:
        shutil.copytree(f"KIND_{name}_stopped", f"KIND_{name}_copied")
    torch.manual_seed(99)
    found, resumed = train_tiny(Path(f"KIND_{name}_stopped"), model_changes=changes)
    assert resumed == figures
    for key, weight in expected.items():
        assert torch.equal(here(found[key]), here(weight)), (name, key)
    if name == "native":
        whole = {
            key: weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            for key, weight in found.items()
        }
        if torch.distributed.get_rank() == 0:
            torch.save(whole, "KIND_found.pt")
"""
# Nothing is small enough to stay whole, and no kernel of DeepSpeed's is compiled.
ZERO = """
import deepspeed
import open_instruct.zero
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
open_instruct.zero.KEPT_WHOLE = 0
"""


def write_recipes(folder: Path, name: str, per_device: int) -> list[str]:
    """A recipe of every stage, whose run goes into ``STAGE_NAME``."""
    for stage, data in DATA.items():
        keys = dict(
            stage=stage,
            model_name_or_path="base",
            chat_template="tulu",
            max_length=64,
            learning_rate=1e-2,
            adam_epsilon=1e-3,  # Adam makes whole steps of gradients that are only rounding
            max_grad_norm=2.0,  # less than most steps have
            per_device_train_batch_size=per_device,
            per_device_eval_batch_size=8,
            num_train_epochs=2,
            logging_steps=1,
            save_steps=2,
            dataset_mixer=[{"path": data}],
            eval_dataset_mixer=[{"path": data}],
            output_dir=f"{stage}_{name}",
        )
        if stage == "context" and name in ("ddp", "fsdp2"):
            keys |= dict(context_parallel=2, per_device_train_batch_size=2 * per_device)
        write_recipe(folder / f"{stage}_{name}.yaml", **(keys | OTHER_KEYS.get(stage, {})))
    return [f"{stage}_{name}.yaml" for stage in DATA]


def quiet_port() -> int:
    """A free port below those that the system gives to connections.

    One that it gave would be free again until torch binds it, seconds later: any connection of a
    test beside this one could have it by then.
    """
    first = 20_000 + os.getpid() % 10_000
    for port in range(first, 32_000):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def launched_by_two(kind: str, folder: Path, *command: str) -> None:
    """Run it as ``accelerate launch --config_file recipes/accelerate/KIND.yaml`` does."""
    config = ROOT / "recipes" / "accelerate" / f"{kind}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    options = ["--num_processes", "2", "--main_process_port", str(quiet_port())]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *launch, *options, *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(path)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trained_by_one(tmp_path_factory):
    """A folder in which one process went through every stage."""
    folder = tmp_path_factory.mktemp("two_processes")
    save_tiny_model(folder / "base")
    save_tiny_model(folder / "tied", tie_word_embeddings=True)
    write_dialogues(folder / "dialogues.jsonl")
    write_pairs(folder / "pairs.jsonl", number=15)  # the last step is smaller
    write_rated(folder / "rated.jsonl", number=15)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe in write_recipes(folder, "one", 8):
            assert main(["run", recipe]) == 0
    return folder


def goes_on_in_one_process(folder: Path, kind: str) -> None:
    """From a checkpoint of divided weights, to the end that two processes came to."""
    expected = torch.load(folder / f"{kind}_found.pt", weights_only=True)
    config = replace(TRAIN, per_device_train_batch_size=8)
    found, _ = train_tiny(folder / f"{kind}_native_copied", config=config)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=0, msg=name)


DIVIDES = {"fsdp2": "FSDP2", "deepspeed_zero3": "ZeRO-3"}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.mark.parametrize(
    "kind", ["ddp", "fsdp2", pytest.param("deepspeed_zero3", marks=NEEDS_DEEPSPEED)]
)
def test_two_processes_end_with_the_weights_of_one(trained_by_one, kind):
    folder = trained_by_one
    recipes = write_recipes(folder, kind, 4)
    script = (ZERO if kind == "deepspeed_zero3" else "") + ALL_STAGES
    if kind in DIVIDES:
        script += STOPPED_AND_WHOLE.replace("KIND", kind)
    (folder / "all.py").write_text(script)
    launched_by_two(kind, folder, "all.py", *recipes)
    for stage in DATA:
        file = "adapter_model" if stage == "lora" else "model"
        runs = [folder / f"{stage}_{name}" for name in ("one", kind)]
        one, two = (load_file(run / f"{file}.safetensors") for run in runs)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)
        rows = [rows_of(run / "metrics.jsonl") for run in runs]
        assert len(rows[0]) == len(rows[1]) > 4
        for ours, theirs in zip(*rows, strict=True):
            left_out = {"seconds", "tokens_per_second", "eval_accuracy"}
            if kind == "deepspeed_zero3":  # layers of transformers: a tie may fall the other way
                left_out.add("accuracy")
            for key in ours.keys() - left_out:
                assert theirs[key] == pytest.approx(ours[key], abs=1e-4), (stage, key)
            if "loss" in ours:
                assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5), stage
        words = rf"{DIVIDES.get(kind, 'divided')}\): ([\d,]+) of ([\d,]+)"
        found = re.search(words, (runs[1] / "train.log").read_text())
        assert (found is not None) == (kind in DIVIDES)
        if found is not None:
            here, everywhere = (int(number.replace(",", "")) for number in found.groups())
            assert everywhere / 2 <= here < everywhere * 0.52  # uneven rows go to the first
    for stage in ("sft", "tied", "dpo"):
        AutoModelForCausalLM.from_pretrained(folder / f"{stage}_{kind}")
    if kind in DIVIDES:
        goes_on_in_one_process(folder, kind)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1"),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "fsdp_auto_wrap_policy"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer"}, "fsdp_transformer_layer_cls_to_wrap"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, "fsdp_ignored_modules"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused_in_words(monkeypatch, changes, words):
    for key, value in (FSDP2 | changes).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        asked_sharding()


def test_a_launcher_that_asks_for_fsdp2_is_followed(monkeypatch):
    assert asked_sharding() is None
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    assert asked_sharding() is not None


ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero_stage"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping.*max_grad_norm"),
    ],
)
def test_a_launcher_that_asks_deepspeed_for_something_else_is_refused(monkeypatch, changes, words):
    for key, value in (ZERO3 | changes).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        asks_for_zero()


def test_a_launcher_that_asks_for_zero3_is_followed_or_told_what_is_missing(monkeypatch):
    assert not asks_for_zero()
    for key, value in ZERO3.items():
        monkeypatch.setenv(key, value)
    if importlib.util.find_spec("deepspeed") is not None:
        assert asks_for_zero()
    else:
        with pytest.raises(UserError, match=r"not installed.*recipes/accelerate/fsdp2\.yaml"):
            asks_for_zero()


@pytest.mark.parametrize(
    ("changes", "words", "options"),
    [
        ({}, r"context_parallel 2 does not divide the 1 process", []),
        ({"stage": "dpo"}, "stage: dpo needs all labels of an answer", []),
        ({"batching": "packed"}, "cuts padded rows, and batching is packed", []),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha draws for whole dialogues", []),
        ({"use_peft": True}, "Only an OLMo can be cut, trained without an adapter", ["--dry-run"]),
    ],
)
def test_dialogues_that_cannot_be_cut_over_processes_are_refused(
    tmp_path, monkeypatch, capsys, changes, words, options
):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    write_dialogues(tmp_path / "dialogues.jsonl")
    keys = dict(
        stage="sft",
        model_name_or_path="base",
        chat_template="tulu",
        context_parallel=2,
        dataset_mixer=[{"path": "dialogues.jsonl"}],
        output_dir="run",
    )
    write_recipe(tmp_path / "recipe.yaml", **(keys | changes))
    assert main(["run", "recipe.yaml", *options]) == 2
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def test_a_model_whose_layers_are_not_ours_is_not_cut_over_processes():
    model = LabelLogprobs(tiny_olmo2(), is_native=False)
    with pytest.raises(UserError, match="Olmo2ForCausalLM is computed by head at the labels"):
        model.share_rows(cast(SplitContext, None))


def test_batching_packed_is_refused_in_words_where_the_model_pads():
    def llama(attention):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
        model: Any = LlamaForCausalLM(config)
        model.set_attn_implementation(attention)
        return model

    workers = Workers(False)
    with pytest.raises(UserError, match=r"LlamaForCausalLM must pad: .*eager"):
        workers.place(llama("eager"), "packed")
    assert not workers.place(llama("eager"), "auto").packs
    assert workers.place(llama("sdpa"), "auto").packs
    assert workers.place(tiny_olmo2(), "packed").packs
    assert not workers.place(tiny_olmo2(), "grouped").packs
