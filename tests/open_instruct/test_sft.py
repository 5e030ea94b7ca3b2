import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmo_base.optim import OptimConfig, build_optimizer, learning_rate_at, set_learning_rate
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import sft
from open_instruct.loop import steps_of
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    rows_of,
    save_tiny_model,
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


def test_training_equals_transformers_loss_and_a_loop_written_out(folder):
    recipe = recipe_of(
        folder, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2
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
        recipe.data.dataset_mixer, sft.load_chat_encoder(run.path, None), recipe, run.counts, []
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
        torch.testing.assert_close(ours[name], weight.detach(), atol=2e-6, rtol=0, msg=name)


def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(folder):
    sft.run(recipe_of(folder, output_dir="whole", num_train_epochs=30))
    recipe = recipe_of(folder, num_train_epochs=30)
    kill_after_step(folder / "run.yaml", folder / "run", step=13)
    sft.run(recipe)
    assert "going on from" in (folder / "run" / "train.log").read_text()
    assert_same_weights(weights_of(folder / "run"), weights_of(folder / "whole"))
    rows = [rows_of(folder / name / "metrics.jsonl") for name in ("run", "whole")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row.get("loss") for row in rows[0]] == [row.get("loss") for row in rows[1]]


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
