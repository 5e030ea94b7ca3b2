import json
import math
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import reward, sft
from open_instruct.__main__ import main
from open_instruct.causal_lm import ModelConfig, load_causal_lm
from open_instruct.encode import load_chat_encoder
from open_instruct.losses import bradley_terry_loss, centering_loss
from open_instruct.pipeline import find_stage
from open_instruct.tokenised import DataReport
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
    random_step,
    rows_of,
    save_tiny_model,
    weights_of,
    write_dialogues,
    write_jsonl,
    write_pairs,
    write_recipe,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model and pairs."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_pairs(tmp_path / "train.jsonl")
    write_pairs(tmp_path / "held_out.jsonl", number=6)
    return tmp_path


KEYS = dict(
    stage="reward",
    model_name_or_path="model",
    chat_template="tulu",
    dataset_mixer=[{"path": "train.jsonl"}],
    eval_dataset_mixer=[{"path": "held_out.jsonl"}],
    max_length=64,
    learning_rate=2e-3,
    per_device_train_batch_size=8,
    num_train_epochs=4,
    logging_steps=1,
    save_steps=5,
    output_dir="run",
)


def recipe_of(folder: Path, **changes) -> reward.RewardRecipe:
    path = write_recipe(folder / f"{changes.get('output_dir', 'run')}.yaml", **(KEYS | changes))
    return load_recipe(reward.RewardRecipe, path)


def opened(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_a_reward_model_learns_and_transformers_opens_it(folder):
    run = reward.run(recipe_of(folder, num_train_epochs=6))
    last = rows_of(run.path / "metrics.jsonl")[-1]
    assert last["eval_accuracy"] == 1.0 and last["eval_loss"] < 0.3
    config = json.loads((run.path / "config.json").read_text())
    assert config["architectures"] == ["Olmo2ForSequenceClassification"]
    model = opened(run.path)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.path)
    assert model.config.num_labels == 1 and model.config.pad_token_id == 257
    turns = [
        [{"role": "user", "content": "3?"}, {"role": "assistant", "content": text}]
        for text in ("abab", "12")
    ]
    batch = tokenizer.apply_chat_template(
        turns, padding=True, padding_side="right", return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        good, bad = model(**batch).logits[:, 0].tolist()
    assert good > bad + 1
    assert find_stage("reward", "here").recipe_class is reward.RewardRecipe


def test_rewards_of_padded_rows_equal_transformers_on_each_row_alone(folder):
    recipe = recipe_of(folder)
    encoder = load_chat_encoder("model", "tulu")
    examples, _ = reward.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, ExampleCounts(), DataReport()
    )
    model: Any
    model = reward.load_reward_model(recipe.model, encoder, seed=1).model
    batch = examples.batch([3, 0, 9])
    with torch.no_grad():
        found_R = reward.RowRewards(model.eval())(batch)
        for row, length in enumerate(batch.lengths_R.tolist()):
            alone = model(batch.ids_RT[row : row + 1, :length]).logits[0, 0]
            torch.testing.assert_close(found_R[row], alone, atol=1e-6, rtol=1e-5)
        assert reward.RowRewards(model)(examples.batch([])).shape == (1,)


@pytest.mark.parametrize("center", [None, 0.3])
def test_loss_and_gradients_equal_trl(folder, center):
    recipe = recipe_of(folder, center_rewards_coefficient=center)
    encoder = load_chat_encoder("model", "tulu")
    examples, _ = reward.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, ExampleCounts(), DataReport()
    )
    model: Any
    theirs: Any
    model, theirs = (
        reward.load_reward_model(recipe.model, encoder, seed=1).model for _ in range(2)
    )
    trainer = RewardTrainer(
        model=theirs,
        args=RewardConfig(
            output_dir="trl",
            center_rewards_coefficient=center,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}] * 4),
        processing_class=AutoTokenizer.from_pretrained("model"),
    )
    batch = examples.batch([3, 0, 9, 14], pad_id=257)  # by which transformers finds the end
    margins_4 = torch.tensor([0.0, 0.5, 1.0, 2.0])
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # TRL: all chosen answers before all rejected ones
    positions_T = torch.arange(batch.ids_RT.shape[1])
    their_loss = trainer.compute_loss(
        theirs.train(),
        {
            "input_ids": batch.ids_RT[order],
            "attention_mask": (positions_T < batch.lengths_R[order, None]).long(),
            "margin": margins_4,
        },
    )
    their_loss.backward()

    margins_P = torch.zeros(len(examples))
    margins_P[[3, 0, 9, 14]] = margins_4
    sums = reward.reward_loss(margins_P, center)(reward.RowRewards(model), batch)
    (sums["loss"] / 4).backward()
    torch.testing.assert_close(sums["loss"] / 4, their_loss, atol=1e-6, rtol=1e-5)
    for (name, ours), (_, weight) in zip(
        model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, weight.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_losses_by_hand():
    # gaps ln 3 + 1 and 0, margins 1 and 0: -ln 3/4 and -ln 1/2
    rewards_B2 = torch.tensor([[math.log(3) + 1, 0.0], [2.0, 2.0]])
    loss = bradley_terry_loss(rewards_B2, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(math.log(4 / 3) + math.log(2)))
    expected = (math.log(3) + 1) ** 2 + 16
    torch.testing.assert_close(centering_loss(rewards_B2), torch.tensor(expected))


def test_margins_come_from_the_rows(folder):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write_jsonl(folder / "train.jsonl", [pair | {"margin": 2}, pair, pair | {"margin": 0.5}])
    recipe = recipe_of(folder)
    encoder = load_chat_encoder("model", "tulu")
    _, margins_P = reward.pair_examples(
        recipe.data.dataset_mixer, encoder, recipe, ExampleCounts(), DataReport()
    )
    assert margins_P.tolist() == [2.0, 0.0, 0.5]
    write_jsonl(folder / "train.jsonl", [pair, pair | {"margin": "wide"}])
    with pytest.raises(DataError, match=r"train.jsonl, line 2: 'margin' is 'wide'"):
        reward.run(recipe)


def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(folder):
    reward.run(recipe_of(folder, output_dir="whole", num_train_epochs=30))
    recipe = recipe_of(folder, num_train_epochs=30)
    kill_after_step(
        folder / "run.yaml", folder / "run", step=random.Random("reward").randrange(10, 50)
    )
    reward.run(recipe)
    assert "going on from" in (folder / "run" / "train.log").read_text()
    assert_same_weights(weights_of(folder / "run"), weights_of(folder / "whole"))


def test_a_reward_model_goes_on_with_its_own_head(folder):
    first = reward.run(recipe_of(folder))
    again = reward.run(
        recipe_of(folder, model_name_or_path="run", chat_template=None, output_dir="again")
    )
    before = rows_of(first.path / "metrics.jsonl")[-1]["eval_loss"]
    assert rows_of(again.path / "metrics.jsonl")[0]["eval_loss"] == pytest.approx(before)


def test_the_new_head_depends_on_the_seed_alone(folder):
    encoder = load_chat_encoder("model", "tulu")
    heads = []
    for seed in (1, 1, 2):
        torch.rand(3)
        model = reward.load_reward_model(recipe_of(folder).model, encoder, seed).model
        heads.append(model.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_plan_counts_pairs(folder):
    figures = reward.plan(recipe_of(folder))
    assert figures["examples"] == {"used": 24, "truncated": 0, "dropped": {}}
    assert figures["steps"] == 12


def test_padding_that_ends_turns_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("model")
    with pytest.raises(UserError, match="pad_token of its own"):
        reward.run(recipe_of(folder))


def test_an_adapter_has_to_be_merged_first(folder):
    write_dialogues(folder / "dialogues.jsonl")
    keys = KEYS | dict(
        stage="sft",
        dataset_mixer=[{"path": "dialogues.jsonl"}],
        eval_dataset_mixer=[],
        use_peft=True,
        max_steps=1,
        output_dir="a",
    )
    sft.run(load_recipe(sft.SftRecipe, write_recipe(folder / "a.yaml", **keys)))
    with pytest.raises(UserError, match="open-instruct merge"):
        reward.run(recipe_of(folder, model_name_or_path="a", chat_template=None))


# ---------------------------------------------------------------- by an adapter

LORA = dict(use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.1, learning_rate=2e-2)
IDS = torch.arange(12)[None] * 5 % 256


@torch.no_grad()
def reward_of(model: Any) -> float:
    return model.eval()(input_ids=IDS).logits.item()


def test_an_adapter_learns_and_keeps_the_head_and_merges_into_the_same_rewards(folder):
    run = reward.run(recipe_of(folder, **LORA))
    rows = rows_of(run.path / "metrics.jsonl")
    assert rows[-1]["eval_accuracy"] > 0.9 > rows[0]["eval_accuracy"]
    kept = load_file("run/adapter_model.safetensors")
    assert any("score" in name for name in kept) and any("lora_A" in name for name in kept)
    assert not (folder / "run" / "config.json").exists()

    by_peft = peft.AutoPeftModelForSequenceClassification.from_pretrained("run", num_labels=1)
    expected = reward_of(by_peft)
    assert main(["merge", "run", "whole"]) == 0
    assert reward_of(opened(folder / "whole")) == pytest.approx(expected, abs=1e-5)
    encoder = load_chat_encoder("run")
    loaded = reward.load_reward_model(ModelConfig("run"), encoder, seed=5)
    assert reward_of(loaded.model) == pytest.approx(expected, abs=1e-5)
    assert not loaded.has_new_head

    with pytest.raises(UserError, match="writes no text"):
        load_causal_lm(ModelConfig("run"))


def test_a_killed_adapter_run_ends_with_the_same_bits_head_and_all(folder):
    keys = LORA | dict(num_train_epochs=30)
    reward.run(recipe_of(folder, output_dir="whole", **keys))
    recipe = recipe_of(folder, **keys)
    kill_after_step(folder / "run.yaml", folder / "run", step=random_step("reward adapter"))
    reward.run(recipe)
    assert "going on from" in (folder / "run" / "train.log").read_text()
    found, expected = (load_file(f"{name}/adapter_model.safetensors") for name in ("run", "whole"))
    assert_same_weights(found, expected)


def test_a_plan_counts_what_an_adapter_trains(folder):
    save_tiny_model(folder / "model", vocab_size=50_000)  # weights that outweigh activations
    whole, part = (reward.plan(recipe_of(folder, **keys)) for keys in ({}, LORA))
    assert "trained_parameters" not in whole
    memory = [figures["memory_bytes"] for figures in (part, whole)]
    assert isinstance(memory[0], int) and isinstance(memory[1], int) and memory[0] < memory[1]


def test_a_reward_models_rows_are_never_packed(folder):
    with pytest.raises(UserError, match="a reward model's rows are grouped by length"):
        recipe_of(folder, batching="packed")
