"""What is looked at while training goes on: answers to held-out prompts, and the lowest loss."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmo_base.run.artefact import read_manifest
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import preference, reward, sft
from open_instruct.batches import Examples
from open_instruct.control_tokens import Encoded
from open_instruct.sample_log import ShownPrompt, first_prompts
from tests.open_instruct.tiny import (
    assert_same_weights,
    kill_after_step,
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
    """A working directory with a tiny model, dialogues, and others that contradict them."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_dialogues(tmp_path / "train.jsonl")
    write_dialogues(tmp_path / "like.jsonl", number=5)
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "ba" * 6}]
    write_jsonl(tmp_path / "unlike.jsonl", [{"messages": turns}] * 3)
    return tmp_path


KEYS = dict(
    stage="sft",
    model_name_or_path="model",
    chat_template="tulu",
    dataset_mixer=[{"path": "train.jsonl"}],
    eval_dataset_mixer=[{"path": "like.jsonl"}],
    max_length=64,
    learning_rate=2e-2,
    per_device_train_batch_size=8,
    num_train_epochs=4,
    eval_steps=3,
    logging_steps=1,
    save_steps=5,
    output_dir="run",
)


def recipe_of(folder: Path, **changes: Any) -> sft.SftRecipe:
    path = write_recipe(folder / f"{changes.get('output_dir', 'run')}.yaml", **(KEYS | changes))
    return load_recipe(sft.SftRecipe, path)


def samples_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- answers while training goes on


def test_a_prompt_ends_where_the_first_answer_begins():
    is_learnt = [False, False, True, True, False, True]
    examples = Examples([(Encoded([5, 6, 7, 8, 9, 10], is_learnt),)] * 3)
    assert first_prompts(examples, 2) == [ShownPrompt([5, 6], [7, 8])] * 2
    assert len(first_prompts(examples, 9)) == 3


def test_held_out_prompts_are_answered_at_every_evaluation_and_change_nothing(folder):
    plain = sft.run(recipe_of(folder, output_dir="plain"))
    run = sft.run(recipe_of(folder, num_eval_samples=2, eval_sample_max_new_tokens=20))
    assert_same_weights(weights_of(run.path), weights_of(plain.path))
    rows = samples_of(run.path)
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 6, 6, 9, 9, 12, 12]
    assert rows[1]["prompt"] == "<|user|>\nsay 1?\n<|assistant|>\n"
    assert rows[1]["target"] == "abab"
    # The last ones are what transformers says with the weights that were kept.
    model: Any = AutoModelForCausalLM.from_pretrained("run")
    tokenizer = AutoTokenizer.from_pretrained("run")
    for row in rows[-2:]:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == row["answer"]
        assert row["num_tokens"] == int((answer != 256).sum())
        assert row["finish_reason"] == ("stop" if answer[-1] == 256 else "length")


def test_an_adapter_and_a_preference_run_show_samples_too(folder):
    write_pairs(folder / "pairs.jsonl")
    keys = KEYS | dict(
        stage="dpo",
        dataset_mixer=[{"path": "pairs.jsonl"}],
        eval_dataset_mixer=[{"path": "pairs.jsonl"}],
        num_train_epochs=1,
        num_eval_samples=1,
        use_peft=True,
    )
    recipe = load_recipe(preference.PreferenceRecipe, write_recipe(folder / "run.yaml", **keys))
    rows = samples_of(preference.run(recipe).path)
    assert [row["step"] for row in rows] == [0, 3]
    assert all(row["target"] == "ab" for row in rows)


# ---------------------------------------------------------------- the lowest held-out loss


def eval_losses(run: Path) -> dict[int, float]:
    rows = rows_of(run / "metrics.jsonl")
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


UNLIKE = dict(eval_dataset_mixer=[{"path": "unlike.jsonl"}], num_train_epochs=20)


def test_training_ends_where_the_held_out_loss_no_longer_falls(folder):
    keys = UNLIKE | dict(early_stopping_patience=2, load_best_model_at_end=True)
    run = sft.run(recipe_of(folder, **keys))
    losses = eval_losses(run.path)
    best = min(losses, key=losses.__getitem__)
    assert 0 < best < 50 and max(losses) == best + 6 < 60  # two evaluations later
    manifest = read_manifest(run.path)
    assert manifest is not None
    assert manifest["results"]["best_step"] == best
    assert manifest["results"]["eval_loss"] == losses[best]
    assert "stopped after step" in (run.path / "train.log").read_text()
    # The weights are those of that step: a run that goes on from them finds the same loss.
    again = sft.run(
        recipe_of(
            folder,
            model_name_or_path="run",
            chat_template=None,
            output_dir="again",
            **(UNLIKE | {"max_steps": 1}),
        )
    )
    assert eval_losses(again.path)[0] == pytest.approx(losses[best], abs=1e-6)


def test_without_load_best_the_last_weights_stay(folder):
    keys = UNLIKE | dict(early_stopping_patience=2)
    stopped = sft.run(recipe_of(folder, **keys))
    best = sft.run(recipe_of(folder, output_dir="best", load_best_model_at_end=True, **keys))
    found, expected = weights_of(stopped.path), weights_of(best.path)
    assert not torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    assert not (stopped.path / "checkpoints" / "best").exists()


def test_a_killed_run_stops_early_at_the_same_step_with_the_same_bits(folder):
    keys = UNLIKE | dict(early_stopping_patience=8, load_best_model_at_end=True)
    keys |= dict(learning_rate=4e-3, num_eval_samples=1, eval_sample_max_new_tokens=4)
    whole = sft.run(recipe_of(folder, output_dir="whole", **keys))
    recipe = recipe_of(folder, **keys)
    kill_after_step(folder / "run.yaml", folder / "run", step=17)
    # How often is looked decides where the lowest loss is found.
    with pytest.raises(UserError, match="eval_steps is 4 and was 3"):
        sft.run(recipe_of(folder, **(keys | {"eval_steps": 4})))
    gc.collect()  # the refused run's hold on the folder
    sft.run(recipe)
    assert "going on from" in (folder / "run" / "train.log").read_text()
    assert_same_weights(weights_of(folder / "run"), weights_of(whole.path))
    assert eval_losses(folder / "run") == eval_losses(whole.path)
    assert samples_of(folder / "run") == samples_of(whole.path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(load_best_model_at_end=True, eval_steps=0), "Set eval_steps"),
        (dict(early_stopping_threshold=0.1), "nothing looks for the lowest"),
        (dict(early_stopping_patience=1, eval_dataset_mixer=[]), "no examples are held out"),
        (dict(num_eval_samples=2, eval_dataset_mixer=[]), "no examples are held out"),
    ],
)
def test_a_recipe_that_looks_at_nothing_is_refused(folder, keys, words):
    with pytest.raises(UserError, match=words):
        sft.run(recipe_of(folder, **keys))


def test_a_reward_model_shows_no_answers(folder):
    keys = KEYS | dict(stage="reward", num_eval_samples=2)
    with pytest.raises(UserError, match="a reward model writes nothing"):
        load_recipe(reward.RewardRecipe, write_recipe(folder / "run.yaml", **keys))
