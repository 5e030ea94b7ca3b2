import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from olmo_base.optim import OptimConfig
from olmo_base.run.artefact import RunConfig, RunFolder
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.metrics import LogConfig
from olmo_base.run.recipe import load_recipe
from olmo_base.run.resume import CheckpointConfig
from open_instruct import preference, reward, sft
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
    evaluate,
    settle,
    steps_of,
    train,
)
from open_instruct.pair_losses import LossConfig
from open_instruct.preference import RatedExamples, loss_against, rated_loss_against
from open_instruct.reference import answer_logprobs
from open_instruct.sft import summed_loss
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
    folder = RunFolder.open(LoopRecipe(RunConfig(str(path))), [])
    language_model = tiny_olmo2(**(model_changes or {}))
    model = workers.place(language_model)
    steps = steps_of(examples, examples.num_labels_NW.sum(axis=1), config, seed=3)
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
    return {name: weight.detach() for name, weight in language_model.named_parameters()}, results


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

ALL_STAGES = """
from olmo_base.run.recipe import load_recipe
from open_instruct import preference, reward, sft
sft.run(load_recipe(sft.SftRecipe, "sft.yaml"))
preference.run(load_recipe(preference.PreferenceRecipe, "dpo.yaml"))
preference.run(load_recipe(preference.PreferenceRecipe, "kto.yaml"))
sft.run(load_recipe(sft.SftRecipe, "lora.yaml"))
reward.run(load_recipe(reward.RewardRecipe, "reward.yaml"))
"""

DATA = {
    "sft": "dialogues.jsonl",
    "dpo": "pairs.jsonl",
    "kto": "rated.jsonl",
    "lora": "dialogues.jsonl",
    "reward": "pairs.jsonl",
}
OTHER_KEYS: dict[str, dict[str, Any]] = {
    "kto": dict(stage="dpo", loss_type="kto"),
    "lora": dict(stage="sft", use_peft=True, lora_r=4, lora_dropout=0.0),
}


def test_two_processes_end_with_the_weights_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    write_dialogues(tmp_path / "dialogues.jsonl")
    write_pairs(tmp_path / "pairs.jsonl", number=15)  # the last step is smaller
    write_rated(tmp_path / "rated.jsonl", number=15)
    folders = {}
    for number, per_device in ((1, 8), (2, 4)):
        common = dict(
            model_name_or_path="base",
            chat_template="tulu",
            max_length=64,
            learning_rate=1e-2,
            adam_epsilon=1e-3,  # Adam makes whole steps of gradients that are only rounding
            per_device_train_batch_size=per_device,
            per_device_eval_batch_size=8,
            num_train_epochs=2,
            logging_steps=1,
            save_steps=2,
        )
        for stage, data in DATA.items():
            folders[stage, number] = tmp_path / f"{stage}_{number}"
            keys = OTHER_KEYS.get(stage, {"stage": stage}) | dict(
                dataset_mixer=[{"path": data}],
                eval_dataset_mixer=[{"path": data}],
                output_dir=f"{stage}_{number}",
            )
            write_recipe(tmp_path / f"{stage}.yaml", **keys, **common)
        if number == 1:
            sft.run(load_recipe(sft.SftRecipe, "sft.yaml"))
            preference.run(load_recipe(preference.PreferenceRecipe, "dpo.yaml"))
            preference.run(load_recipe(preference.PreferenceRecipe, "kto.yaml"))
            sft.run(load_recipe(sft.SftRecipe, "lora.yaml"))
            reward.run(load_recipe(reward.RewardRecipe, "reward.yaml"))
    (tmp_path / "both.py").write_text(ALL_STAGES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "both.py"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr

    for stage in DATA:
        kind = "adapter_model" if stage == "lora" else "model"
        one, two = (load_file(folders[stage, number] / f"{kind}.safetensors") for number in (1, 2))
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)
        rows = [rows_of(folders[stage, number] / "metrics.jsonl") for number in (1, 2)]
        assert len(rows[0]) == len(rows[1]) > 4
        for ours, theirs in zip(*rows, strict=True):
            timed = {"seconds", "tokens_per_second", "eval_accuracy"}
            for key in ours.keys() - timed:
                assert theirs[key] == pytest.approx(ours[key], abs=1e-4), (stage, key)


def test_batching_packed_is_refused_in_words_where_the_model_pads():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    workers = Workers(False)
    with pytest.raises(UserError, match=r"batching: packed, but LlamaForCausalLM .* pads"):
        workers.place(LlamaForCausalLM(config), "packed")
    assert not workers.place(LlamaForCausalLM(config), "auto").packs
    assert workers.place(tiny_olmo2(), "packed").packs
    assert not workers.place(tiny_olmo2(), "grouped").packs
