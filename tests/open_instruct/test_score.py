"""Scoring: judges by their own words, selection by hand, and the chain that ends in a model."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from olmo_base.run.artefact import read_manifest
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import preference, reward, sample, score, sft
from open_instruct.encode import load_chat_encoder
from open_instruct.examples import Message
from open_instruct.score import SelectionConfig, best_of, pairs_of, select, usable
from tests.open_instruct.tiny import save_tiny_model, write_jsonl, write_pairs, write_recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    return tmp_path


def recipe_of(folder: Path, **keys: Any) -> score.ScoreRecipe:
    keys = dict(stage="score", output_dir="scored") | keys
    return load_recipe(score.ScoreRecipe, write_recipe(folder / "score.yaml", **keys))


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(question: str, *texts: str, **more: Any) -> dict[str, Any]:
    """A row as the sample stage writes it."""
    answers = [{"text": text, "num_tokens": 1, "finish_reason": "stop"} for text in texts]
    return {"prompt": [{"role": "user", "content": question}], "answers": answers, **more}


# ---------------------------------------------------------------- the whole chain


def test_from_prompts_to_answers_to_scores_to_a_tuned_model(folder):
    write_pairs(folder / "pairs.jsonl")
    tuning = dict(
        model_name_or_path="model",
        chat_template="tulu",
        max_length=96,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
    )
    keys = tuning | dict(stage="reward", dataset_mixer=[{"path": "pairs.jsonl"}], output_dir="rm")
    path = write_recipe(folder / "rm.yaml", **keys, num_train_epochs=2)
    reward.run(load_recipe(reward.RewardRecipe, path))
    keys = dict(
        stage="sample",
        model_name_or_path="model",
        chat_template="tulu",
        dataset_mixer=[{"path": "pairs.jsonl"}],
        num_samples=4,
        max_new_tokens=6,
        output_dir="sampled",
    )
    path = write_recipe(folder / "sample.yaml", **keys)
    sampled = sample.run(load_recipe(sample.SampleRecipe, path))
    run = score.run(
        recipe_of(
            folder,
            answers=["sampled/answers.jsonl"],
            reward_model_path="rm",
            use_cut_answers=True,
            num_best=2,
        )
    )

    # What transformers says of each text.
    model: Any = AutoModelForSequenceClassification.from_pretrained("rm").eval()
    encoder = load_chat_encoder("rm")
    rows = rows_in(run.path / score.SCORED)
    assert len(rows) == len(rows_in(sampled.path / sample.ANSWERS)) > 20
    for row in rows[:8]:
        for answer in row["answers"]:
            if not answer["text"].strip():
                assert answer["score"] is None
                continue
            turn: Message = {"role": "assistant", "content": answer["text"]}
            ids = encoder.encode_dialogue([*row["prompt"], turn]).ids
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits.item()
            assert answer["score"] == pytest.approx(expected, abs=1e-5)

    # Two of each prompt are learnt, the best first; the best is preferred to the worst.
    dialogues, pairs = rows_in(run.path / score.SFT), rows_in(run.path / score.PREFERENCES)
    scores = [answer["score"] for answer in rows[0]["answers"] if answer["score"] is not None]
    assert [item["score"] for item in dialogues[:2]] == sorted(scores, reverse=True)[:2]
    assert pairs[0]["score_chosen"] == max(scores) and pairs[0]["score_rejected"] == min(scores)
    manifest = read_manifest(run.path)
    assert manifest is not None
    results = manifest["results"]
    assert results["dialogues"] == len(dialogues) == 2 * len(rows)
    assert results["pairs"] == len(pairs) == len(rows)
    dropped = manifest["examples"]["dropped"]
    assert manifest["examples"]["used"] + sum(dropped.values()) == results["answers"]

    # The tuning stages read both files as they are.
    keys = tuning | dict(
        stage="sft", dataset_mixer=[{"path": "scored/sft.jsonl"}], output_dir="tuned"
    )
    tuned = sft.run(load_recipe(sft.SftRecipe, write_recipe(folder / "sft.yaml", **keys)))
    assert tuned.counts.used == len(dialogues)
    keys = tuning | dict(
        stage="dpo", dataset_mixer=[{"path": "scored/preferences.jsonl"}], output_dir="preferred"
    )
    path = write_recipe(folder / "dpo.yaml", **keys)
    preferred = preference.run(load_recipe(preference.PreferenceRecipe, path))
    assert preferred.counts.used == len(pairs)


def test_a_verifier_keeps_what_is_right(folder):
    write_jsonl(
        folder / "answers.jsonl",
        [
            asked("2 + 1?", "It is 3.", "4", "so 3", truth="3"),
            asked("2 + 2?", "5", "6", truth="4"),
            asked("2 + 3?", "5", truth="5"),
        ],
    )
    run = score.run(
        recipe_of(
            folder,
            answers=["answers.jsonl"],
            verifier="gsm8k",
            min_score=1.0,
            num_best=8,
            max_rejected_score=0.0,
        )
    )
    scores = [[one["score"] for one in row["answers"]] for row in rows_in(run.path / score.SCORED)]
    assert scores == [[1.0, 0.0, 1.0], [0.0, 0.0], [1.0]]
    learnt = [row["messages"][-1]["content"] for row in rows_in(run.path / score.SFT)]
    assert learnt == ["It is 3.", "so 3", "5"]
    (pair,) = rows_in(run.path / score.PREFERENCES)
    assert (pair["chosen"], pair["rejected"]) == ("It is 3.", "4")
    manifest = read_manifest(run.path)
    assert manifest is not None
    assert manifest["results"]["prompts_without"] == {
        "no answer good enough to learn": 1,
        "no two answers that make a pair": 2,
    }


def test_a_stopped_scoring_goes_on_with_the_rows_it_kept(folder):
    rows = [asked(f"{n} + 1?", str(n + 1), truth=str(n + 1)) for n in range(70)]
    write_jsonl(folder / "answers.jsonl", rows)
    keys = dict(answers=["answers.jsonl"], verifier="gsm8k")
    whole = score.run(recipe_of(folder, **keys))
    expected = rows_in(whole.path / score.SCORED)
    recipe = recipe_of(folder, output_dir="again", **keys)
    started = score.RunFolder.open(recipe, score.input_files(recipe))
    kept = sample.KeptRows(started.path / score.SCORED)
    for number, row in enumerate(expected[:64]):
        kept.add(number, row | {"kept": True})
    started.release()
    again = rows_in(score.run(recipe).path / score.SCORED)
    assert again == [row | {"kept": True} for row in expected[:64]] + expected[64:]


# ---------------------------------------------------------------- selection by hand


def scored(*scores: float | None, **more: Any) -> list[dict[str, Any]]:
    answers = [{"text": f"t{n}", "score": value} for n, value in enumerate(scores)]
    return [answer | more for answer in answers]


def test_what_cannot_be_used_is_counted_by_its_reason():
    answers = scored(1.0, 5.0, None, 3.0, 4.0)
    answers[1]["finish_reason"] = "length"
    answers[3]["text"] = " "
    answers.append({"text": "t0", "score": 1.0})
    why: Counter[str] = Counter()
    assert [one["score"] for one in usable(answers, SelectionConfig(), why)] == [4.0, 1.0]
    assert why == {
        "cut at the limit": 1,
        "too long for the reward model": 1,
        "empty": 1,
        "same as another answer": 1,
    }
    cut = usable(answers, SelectionConfig(use_cut_answers=True), Counter())
    assert cut[0]["score"] == 5.0


def test_pairs_go_from_the_outside_in_and_no_answer_is_in_two():
    answers = usable(scored(1.0, 2.0, 3.0, 4.0, 5.0), SelectionConfig(), Counter())

    def pairs(**keys: Any) -> list[tuple[float, float]]:
        found = pairs_of(answers, SelectionConfig(**keys))
        return [(chosen["score"], rejected["score"]) for chosen, rejected in found]

    assert pairs() == [(5.0, 1.0)]
    assert pairs(num_pairs=9) == [(5.0, 1.0), (4.0, 2.0)]
    assert pairs(num_pairs=9, min_margin=2.0) == [(5.0, 1.0)]  # more than 2 apart
    assert pairs(num_pairs=9, min_score=4.5) == [(5.0, 1.0)]
    assert pairs(num_pairs=9, max_rejected_score=0.5) == []
    assert pairs(num_pairs=0) == []


def test_the_best_have_at_least_the_score_asked_for():
    answers = usable(scored(1.0, 3.0, 2.0), SelectionConfig(), Counter())
    assert [one["score"] for one in best_of(answers, SelectionConfig(num_best=2))] == [3.0, 2.0]
    good = SelectionConfig(num_best=3, min_score=3.0)
    assert [one["score"] for one in best_of(answers, good)] == [3.0]


def test_prompts_that_give_nothing_are_counted():
    rows = [
        {"prompt": [], "answers": scored(1.0, 1.0)},
        {"prompt": [], "answers": scored(None)},
        {"prompt": [], "answers": scored(2.0, 0.0)},
    ]
    selected = select(rows, SelectionConfig(min_score=1.5))
    assert len(selected.dialogues) == len(selected.pairs) == 1
    assert selected.without == {
        "no usable answer": 1,
        "no answer good enough to learn": 1,
        "no two answers that make a pair": 2,
    }


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "needs the keys 'prompt' and 'answers'"),
        ({"prompt": "a?", "answers": []}, "'prompt' is not a list of turns"),
        (asked("a?") | {"answers": ["b"]}, "'answers' is not a list of objects"),
        (asked("a?", "b"), "there is no 'truth'"),
    ],
)
def test_a_file_that_holds_no_answers_is_named_with_its_line(folder, row, words):
    write_jsonl(folder / "answers.jsonl", [asked("b?", "b", truth="1"), row])
    with pytest.raises(DataError, match=rf"answers\.jsonl, line 2.*{words}"):
        score.run(recipe_of(folder, answers=["answers.jsonl"], verifier="gsm8k"))


def test_a_model_without_a_head_for_rewards_is_refused(folder):
    write_jsonl(folder / "answers.jsonl", [asked("b?", "b")])
    encoder = load_chat_encoder("model", "tulu")
    encoder.tokenizer.chat_template = encoder.template
    encoder.tokenizer.save_pretrained("model")
    with pytest.raises(UserError, match="no head that gives rewards"):
        score.run(recipe_of(folder, answers=["answers.jsonl"], reward_model_path="model"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "one of the two judges"),
        ({"verifier": "gsm8k", "reward_model_path": "rm"}, "one of the two judges"),
        ({"verifier": "gms8k"}, "must be one of gsm8k"),
        ({"verifier": "gsm8k", "verifier_metric": "last"}, "must be one of last_number"),
        ({"verifier": "gsm8k", "answers": []}, "names no file"),
    ],
)
def test_a_recipe_that_cannot_be_scored_is_refused(folder, keys, words):
    with pytest.raises(UserError, match=words):
        recipe_of(folder, **(dict(answers=["answers.jsonl"]) | keys))
