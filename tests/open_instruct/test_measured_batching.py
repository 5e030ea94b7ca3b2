"""What ``batching: auto`` measures, writes down, and keeps when a run goes on."""

import json

import pytest

from olmo_base.run.errors import UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import measured_batching, sft
from open_instruct.measured_batching import CHOICE
from open_instruct.tuning import refuse_divided_answers
from tests.open_instruct.tiny import (
    assert_same_weights,
    save_tiny_model,
    weights_of,
    write_dialogues,
    write_recipe,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measured_batching, "LEAST_STEPS", 2)
    save_tiny_model(tmp_path / "base", attention_dropout=0.0)
    write_dialogues(tmp_path / "dialogues.jsonl")
    return tmp_path


def recipe_of(folder, output_dir, **changes):
    keys = dict(
        stage="sft",
        model_name_or_path="base",
        chat_template="tulu",
        dataset_mixer=[{"path": "dialogues.jsonl"}],
        max_length=64,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        num_train_epochs=2,
        save_steps=100,
        output_dir=output_dir,
    )
    path = write_recipe(folder / f"{output_dir}.yaml", **(keys | changes))
    return load_recipe(sft.SftRecipe, path)


def log_of(output_dir):
    return (output_dir / "train.log").read_text(encoding="utf-8")


class Killed(BaseException):
    """As SIGKILL: nobody cleans up."""


def kill(*_, **__):
    raise Killed


def test_a_run_killed_before_its_first_checkpoint_ends_as_its_choice_alone_would(
    folder, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("open_instruct.loop.seed_step", kill)  # the first step begins
        with pytest.raises(Killed):
            sft.run(recipe_of(folder, "killed"))
    chosen = json.loads((folder / "killed" / CHOICE).read_text())
    assert set(chosen["tokens_per_second"]) == {"packed", "grouped"}
    assert all(rate > 0 for rate in chosen["tokens_per_second"].values())
    assert "tokens/s packed and" in log_of(folder / "killed")
    sft.run(recipe_of(folder, "killed"))
    assert f"batching: {chosen['batching']}, as when the run began" in log_of(folder / "killed")
    # Measuring left weights, gradients and generators as they were.
    sft.run(recipe_of(folder, "whole", batching=chosen["batching"]))
    assert not (folder / "whole" / CHOICE).exists()
    assert_same_weights(weights_of(folder / "killed"), weights_of(folder / "whole"))


@pytest.mark.parametrize("written", ["packed", "grouped"])
def test_what_was_chosen_is_followed_and_not_measured_again(folder, monkeypatch, written):
    with monkeypatch.context() as patch:
        patch.setattr("open_instruct.loop.seed_step", kill)
        with pytest.raises(Killed):
            sft.run(recipe_of(folder, "run"))
    choice = folder / "run" / CHOICE
    choice.write_text(json.dumps(json.loads(choice.read_text()) | {"batching": written}))
    before = choice.read_text()
    sft.run(recipe_of(folder, "run"))
    assert choice.read_text() == before
    way = "without padding" if written == "packed" else "the native OLMo, head"
    assert way in log_of(folder / "run").split("as when the run began")[1]


def test_what_was_chosen_is_followed_where_memory_or_checkpointing_would_not_measure(
    folder, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("open_instruct.loop.seed_step", kill)
        with pytest.raises(Killed):
            sft.run(recipe_of(folder, "run"))
    choice = folder / "run" / CHOICE
    choice.write_text(json.dumps(json.loads(choice.read_text()) | {"batching": "grouped"}))
    sft.run(recipe_of(folder, "run", gradient_checkpointing=True))
    assert "batching: grouped, as when the run began" in log_of(folder / "run")


def test_a_run_that_took_steps_without_choosing_goes_on_packed(folder, monkeypatch):
    steps = iter(range(3))

    def kill_at_the_third(*_, **__):
        if next(steps) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("open_instruct.loop.seed_step", kill_at_the_third)
        with pytest.raises(Killed):
            sft.run(recipe_of(folder, "run", save_steps=1, gradient_checkpointing=True))
    assert not (folder / "run" / CHOICE).exists()
    sft.run(recipe_of(folder, "run", save_steps=1))
    assert not (folder / "run" / CHOICE).exists()
    assert "going on from" in log_of(folder / "run")


def test_a_short_run_and_a_model_that_must_pad_are_not_measured(folder, monkeypatch):
    sft.run(recipe_of(folder, "eager", attn_implementation="eager", max_steps=3))
    assert not (folder / "eager" / CHOICE).exists()
    assert "attn_implementation is eager" in log_of(folder / "eager")
    monkeypatch.setattr(measured_batching, "LEAST_STEPS", 4)
    sft.run(recipe_of(folder, "short", max_steps=3))
    assert not (folder / "short" / CHOICE).exists()


def test_the_choice_of_another_run_counts_for_nothing(folder):
    sft.run(recipe_of(folder, "run"))
    choice = json.loads((folder / "run" / CHOICE).read_text())
    other = recipe_of(folder, "other", learning_rate=1e-3)
    (folder / "other").mkdir()
    choice_of_other = folder / "other" / CHOICE
    with pytest.raises(UserError):  # files of nobody's run
        choice_of_other.write_text(json.dumps(choice))
        sft.run(other)


def test_divided_weights_answer_no_held_out_prompts():
    refuse_divided_answers(0, "FSDP2")
    refuse_divided_answers(4, None)
    for kind in ("FSDP2", "ZeRO-3"):
        with pytest.raises(UserError, match=f"num_eval_samples: 4, .* under {kind}"):
            refuse_divided_answers(4, kind)
