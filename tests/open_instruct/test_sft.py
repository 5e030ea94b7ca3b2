import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother

from olmo_base.optim import OptimConfig, build_optimizer, learning_rate_at, set_learning_rate
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import sft
from open_instruct.batches import Examples
from open_instruct.control_tokens import Encoded
from open_instruct.encode import load_chat_encoder
from open_instruct.logprobs import LabelLogprobs
from open_instruct.loop import Totals, TrainConfig, Workers, add_gradients, steps_of
from open_instruct.tokenised import DataReport
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    rows_of,
    save_tiny_model,
    tiny_olmo2,
    weights_of,
    write_dialogues,
    write_jsonl,
    write_recipe,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny base model and dialogues."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "base")
    write_dialogues(tmp_path / "train.jsonl")
    write_dialogues(tmp_path / "held_out.jsonl", number=6)
    return tmp_path


KEYS = dict(
    stage="sft",
    model_name_or_path="base",
    chat_template="tulu",
    dataset_mixer=[{"path": "train.jsonl"}],
    eval_dataset_mixer=[{"path": "held_out.jsonl"}],
    max_length=64,
    learning_rate=1e-2,
    per_device_train_batch_size=8,
    num_train_epochs=4,
    logging_steps=1,
    save_steps=5,
    output_dir="run",
)


def recipe_of(folder: Path, **changes) -> sft.SftRecipe:
    path = write_recipe(folder / f"{changes.get('output_dir', 'run')}.yaml", **(KEYS | changes))
    return load_recipe(sft.SftRecipe, path)


def as_transformers_open_it(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_tiny_model_learns_its_dialogues_by_heart(folder):
    run = sft.run(recipe_of(folder, num_train_epochs=60, logging_steps=20, save_steps=500))
    rows = rows_of(run.path / "metrics.jsonl")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[0] > 5 and losses[-1] < 0.25

    # and writes one, with transformers' own generation, and stops by itself
    model, tokenizer = as_transformers_open_it(run.path)
    question = [{"role": "user", "content": "say say 2?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    answer = tokenizer.decode(written[prompt["input_ids"].shape[1] :])
    assert answer == "ababab<|endoftext|>"


def test_the_artefact_is_a_whole_model_folder(folder):
    run = sft.run(recipe_of(folder, num_train_epochs=1))
    assert {file.name for file in run.path.iterdir() if not file.name.startswith(".")} >= {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "recipe.yaml", "manifest.json",
        "metrics.jsonl", "train.log",
    }  # fmt: skip
    modes = {
        file.stat().st_mode
        for file in run.path.iterdir()
        if file.suffix in {".json", ".safetensors"}
    }
    assert len(modes) == 1, "whoever may read the config may read the weights"
    generation = json.loads((run.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [256]
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["examples"] == {"used": 24, "truncated": 0, "dropped": {}}
    assert set(manifest["results"]) == {"steps", "tokens", "loss", "eval_loss"}
    assert {Path(name).name for name in manifest["inputs"]} >= {
        "train.jsonl", "held_out.jsonl", "tulu.jinja", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    # ... from which the next stage starts, with the template that it carries
    again = sft.run(recipe_of(folder, model_name_or_path="run", chat_template=None, output_dir="2"))
    assert (again.path / "chat_template.jinja").read_text() == (
        run.path / "chat_template.jinja"
    ).read_text()


def test_a_finished_run_is_left_alone(folder):
    run = sft.run(recipe_of(folder, num_train_epochs=1))
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
    assert sft.run(recipe_of(folder, num_train_epochs=1)).is_finished
    assert {file: file.stat().st_mtime_ns for file in run.path.rglob("*")} == before


def test_the_precision_of_the_model_folder_is_kept_and_training_is_in_float32(folder):
    model, _ = as_transformers_open_it(folder / "base")
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    sft.run(recipe_of(folder, num_train_epochs=1, save_steps=2))
    assert {weight.dtype for weight in weights_of(folder / "run").values()} == {torch.bfloat16}
    checkpoint = folder / "run" / "checkpoints" / "step_000002"
    assert {weight.dtype for weight in weights_of(checkpoint).values()} == {torch.float32}


# eager: computed by transformers, as the loop is. Computed natively, three of Adam's steps of 1e-2
# make some 2e-6 of rounding, since it divides by the own size of tiny gradients.
@pytest.mark.parametrize(("attention", "tolerance"), [("eager", 2e-6), (None, 1e-5)])
def test_training_equals_transformers_loss_and_a_loop_written_out(folder, attention, tolerance):
    recipe = recipe_of(
        folder,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **({"attn_implementation": attention} if attention else {}),
    )
    run = sft.run(recipe)

    torch.manual_seed(0)
    model, _ = as_transformers_open_it(folder / "base")
    _, tokenizer = as_transformers_open_it(run.path)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=1e-2))
    dialogues = [
        json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()
    ]
    examples = sft.dialogue_examples(
        recipe.data.dataset_mixer,
        load_chat_encoder(run.path, None),
        recipe,
        run.counts,
        DataReport(),
    )
    steps = steps_of(examples, examples.num_labels_NW[:, 0], recipe.train, seed=recipe.run.seed)
    for step in range(3):
        set_learning_rate(optimizer, learning_rate_at(step, 3, recipe.optim))
        batch = tokenizer.apply_chat_template(
            [dialogues[number] for number in steps.numbers(step)],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ours = weights_of(run.path)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.detach(), atol=tolerance, rtol=0, msg=name)


def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(folder):
    sft.run(recipe_of(folder, output_dir="whole", num_train_epochs=30))
    recipe = recipe_of(folder, num_train_epochs=30)
    kill_after_step(
        folder / "run.yaml", folder / "run", step=random.Random("sft").randrange(10, 50)
    )
    sft.run(recipe)
    assert "going on from" in (folder / "run" / "train.log").read_text()
    assert_same_weights(weights_of(folder / "run"), weights_of(folder / "whole"))
    rows = [rows_of(folder / name / "metrics.jsonl") for name in ("run", "whole")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row.get("loss") for row in rows[0]] == [row.get("loss") for row in rows[1]]


# ---------------------------------------------------------------- other losses, and noise


def gradients(model, examples, config, *, per_device, accumulation, ranks=1):
    """The first step's gradients, cut in this way."""
    train = TrainConfig(
        per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation
    )
    steps = steps_of(
        examples, sft.terms_per_dialogue(config, examples), train, seed=3, num_ranks=ranks
    )
    assert steps.per_step == 12
    loss = sft.training_loss(config, model.model.get_input_embeddings())
    model.zero_grad()
    for rank in range(ranks):
        batches = steps.micro_batches(0, rank)
        add_gradients(Workers(False), model, batches, steps.num_terms(0), loss, Totals())
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def tiny_examples(number=12):
    random = np.random.default_rng(0)
    lengths = random.integers(4, 30, size=number)
    return Examples(
        [
            (Encoded(random.integers(0, 256, length).tolist(), [False] + [True] * (length - 1)),)
            for length in map(int, lengths)
        ]
    )


@pytest.mark.parametrize(
    "keys",
    [
        dict(loss_type="dft"),
        dict(label_smoothing_factor=0.2),
        dict(reduce_loss="sum"),
        dict(neftune_noise_alpha=5.0),
        dict(neftune_noise_alpha=5.0, label_smoothing_factor=0.1, reduce_loss="sum"),
    ],
)
def test_every_option_is_exact_however_a_step_is_cut(keys):
    model = LabelLogprobs(tiny_olmo2()).train()
    examples, config = tiny_examples(), sft.SftLossConfig(**keys)
    expected = gradients(model, examples, config, per_device=12, accumulation=1)
    plain = gradients(model, examples, sft.SftLossConfig(), per_device=12, accumulation=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(expected[f"model.{name}"], plain[f"model.{name}"], atol=1e-5)
    for per_device, accumulation, ranks in ((3, 4, 1), (1, 12, 1), (2, 3, 2), (4, 1, 3)):
        found = gradients(
            model, examples, config, per_device=per_device, accumulation=accumulation, ranks=ranks
        )
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-5, msg=name)


def test_a_sum_over_tokens_is_the_mean_times_the_tokens_of_a_dialogue():
    model, examples = LabelLogprobs(tiny_olmo2()), tiny_examples()
    mean = gradients(model, examples, sft.SftLossConfig(), per_device=4, accumulation=3)
    whole = gradients(
        model, examples, sft.SftLossConfig(reduce_loss="sum"), per_device=4, accumulation=3
    )
    for name, gradient in mean.items():
        torch.testing.assert_close(whole[name], gradient * (examples.num_labels / 12), msg=name)


def test_label_smoothing_and_dft_equal_transformers_on_a_model():
    model, examples = tiny_olmo2(), tiny_examples()
    batch = examples.batch(range(12))
    logits = model(batch.ids_RT).logits
    labels = batch.ids_RT.clone()
    labels[torch.arange(labels.shape[1]) >= batch.lengths_R[:, None]] = -100
    smoother = LabelSmoother(epsilon=0.2)
    expected = smoother({"logits": logits}, labels, shift_labels=True)
    config = sft.SftLossConfig(label_smoothing_factor=0.2)
    found = sft.training_loss(config, model.get_input_embeddings())(LabelLogprobs(model), batch)
    torch.testing.assert_close(found["loss"] / examples.num_labels, expected)

    # as TRL weighs them: -log p times p, over the labels
    logprobs = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).neg()
    is_label = (labels[:, 1:] != -100).flatten()
    expected = -(logprobs.exp() * logprobs)[is_label].sum()
    config = sft.SftLossConfig(loss_type="dft")
    found = sft.training_loss(config, model.get_input_embeddings())(LabelLogprobs(model), batch)
    torch.testing.assert_close(found["loss"], expected)


def test_neftune_noise_equals_transformers_on_a_row_without_padding():
    examples = tiny_examples()
    batch = examples.batch([4], seed=11)
    output = torch.randn(1, int(batch.lengths_R[0]), 16)
    module = torch.nn.Module()
    module.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    torch.manual_seed(sft.row_seed(11, 4))
    theirs = neftune_post_forward_hook(module, None, output)
    torch.testing.assert_close(output + sft.neftune_noise(batch, output, 5.0), theirs)


def test_neftune_noise_is_scaled_by_the_rows_own_length_and_padding_has_none():
    examples = tiny_examples()
    batch = examples.batch(range(12), seed=1)
    noise_RTD = sft.neftune_noise(batch, torch.zeros(*batch.ids_RT.shape, 64), 3.0)
    for noise_TD, length in zip(noise_RTD, batch.lengths_R.tolist(), strict=True):
        bound = 3.0 / (length * 64) ** 0.5
        assert 0.9 * bound < noise_TD[:length].abs().max() <= bound
        assert not noise_TD[length:].any()
    other = sft.neftune_noise(examples.batch(range(12), seed=2), noise_RTD, 3.0)
    assert not torch.equal(other, noise_RTD)  # another step


def test_noise_does_not_reach_the_evaluation_and_resumes_to_the_bit(folder):
    keys = dict(neftune_noise_alpha=10.0, num_train_epochs=30)
    whole = sft.run(recipe_of(folder, output_dir="whole", **keys))
    plain = sft.run(recipe_of(folder, output_dir="plain", num_train_epochs=1))
    starts = [rows_of(run.path / "metrics.jsonl")[0]["eval_loss"] for run in (whole, plain)]
    assert starts[0] == starts[1]
    recipe = recipe_of(folder, **keys)
    kill_after_step(
        folder / "run.yaml", folder / "run", step=random.Random("sft").randrange(10, 50)
    )
    sft.run(recipe)
    assert_same_weights(weights_of(folder / "run"), weights_of(folder / "whole"))


def test_label_smoothing_with_dft_is_refused(folder):
    with pytest.raises(UserError, match=r"label_smoothing_factor.*dft does not use it"):
        recipe_of(folder, loss_type="dft", label_smoothing_factor=0.1)


# ---------------------------------------------------------------- before training


def test_a_plan_counts_what_a_run_would_do_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    recipe = recipe_of(folder)
    figures = sft.plan(recipe)
    (folder / "run.yaml").unlink()
    assert sorted(folder.rglob("*")) == before
    assert figures["examples"] == {"used": 24, "truncated": 0, "dropped": {}}
    assert figures["steps"] == 12 and figures["examples_per_step"] == 8
    model, _ = as_transformers_open_it(folder / "base")
    num_parameters = sum(weight.numel() for weight in model.parameters())
    assert figures["parameters"] == num_parameters
    memory = figures["memory_bytes"]
    assert isinstance(memory, int) and memory > 16 * num_parameters


def test_every_file_that_decides_the_result_is_an_input(folder):
    names = {path.name for path in sft.input_files(recipe_of(folder))}
    assert names >= {
        "model.safetensors", "config.json", "tokenizer.json", "tulu.jinja", "train.jsonl",
        "held_out.jsonl",
    }  # fmt: skip


def test_a_bad_row_ends_the_run_with_file_and_line(folder):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_jsonl(folder / "train.jsonl", [good, {"messages": []}])
    with pytest.raises(DataError, match=r"train\.jsonl, line 2"):
        sft.run(recipe_of(folder))


def test_dropped_and_truncated_examples_are_counted_in_the_manifest(folder):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b" * 100},
        ]
    }
    write_jsonl(folder / "train.jsonl", [good, {"messages": []}, long])
    run = sft.run(
        recipe_of(
            folder,
            num_train_epochs=1,
            on_bad_row="drop",
            on_too_long="truncate_right",
            max_too_long_fraction=0.5,
        )
    )
    examples = json.loads((run.path / "manifest.json").read_text())["examples"]
    assert examples["used"] == 2 and examples["truncated"] == 1
    assert sum(examples["dropped"].values()) == 1


def test_examples_longer_than_the_model_knows_positions_are_refused(folder):
    long = {
        "messages": [
            {"role": "user", "content": "a" * 150},
            {"role": "assistant", "content": "b"},
        ]
    }
    write_jsonl(folder / "train.jsonl", [long])
    with pytest.raises(UserError, match="max_length: 128"):
        sft.run(recipe_of(folder, max_length=1000))


def test_a_model_folder_that_lacks_weights_of_its_architecture_is_refused(folder):
    weights = weights_of(folder / "base")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights.*up_proj"):
        sft.run(recipe_of(folder))
