"""Sampling: what is answered, by chances that are each prompt's own, and what a kill leaves."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from olmo_base.run.artefact import read_manifest
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import load_recipe
from open_instruct import sample
from open_instruct.encode import load_chat_encoder
from tests.open_instruct.tiny import (
    byte_tokenizer,
    save_tiny_model,
    start_run,
    write_jsonl,
    write_recipe,
)

PROMPTS = [{"prompt": f"{'say ' * (number % 4)}{number}?"} for number in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model and prompts."""
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


KEYS = dict(
    stage="sample",
    model_name_or_path="model",
    chat_template="tulu",
    dataset_mixer=[{"path": "prompts.jsonl"}],
    num_samples=3,
    max_new_tokens=12,
    output_dir="run",
)


def recipe_of(folder: Path, **changes: Any) -> sample.SampleRecipe:
    path = write_recipe(folder / f"{changes.get('output_dir', 'run')}.yaml", **(KEYS | changes))
    return load_recipe(sample.SampleRecipe, path)


def answers_in(run: Any) -> list[dict[str, Any]]:
    lines = (run.path / sample.ANSWERS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def save_tiny_llama(folder: Path) -> None:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("is_olmo", [True, False])
def test_greedy_answers_are_those_of_transformers(folder, is_olmo):
    if not is_olmo:
        save_tiny_llama(folder / "model")
    run = sample.run(recipe_of(folder, temperature=0.0, num_samples=1))
    model: Any = AutoModelForCausalLM.from_pretrained("model")
    encoder = load_chat_encoder("model", "tulu")
    rows = answers_in(run)
    assert [row["prompt"][-1]["content"] for row in rows] == [row["prompt"] for row in PROMPTS]
    for row in rows:
        ids = encoder.encode_prompt(row["prompt"])
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=257
        )[0].tolist()
        (answer,) = row["answers"]
        new = whole[len(ids) :]
        assert answer["text"] == encoder.tokenizer.decode(new, skip_special_tokens=True)
        assert answer["num_tokens"] == len(new) and row["num_prompt_tokens"] == len(ids)
        assert answer["finish_reason"] == ("stop" if new[-1] == 256 else "length")


def test_answers_follow_the_seed_and_not_what_is_asked_beside_them(folder):
    run = sample.run(recipe_of(folder))
    rows = answers_in(run)
    texts = [[answer["text"] for answer in row["answers"]] for row in rows]
    assert all(len(set(three)) == 3 for three in texts)
    narrow = answers_in(sample.run(recipe_of(folder, output_dir="narrow", max_rows=3)))
    assert narrow == rows
    first = {"path": "prompts.jsonl", "samples": 12}
    assert answers_in(sample.run(recipe_of(folder, output_dir="b", dataset_mixer=[first]))) == rows
    other = answers_in(sample.run(recipe_of(folder, output_dir="other", seed=7)))
    assert other != rows
    manifest = read_manifest(run.path)
    assert manifest is not None and manifest["status"] == "finished"
    assert manifest["examples"]["used"] == 12
    assert manifest["results"]["answers"] == 36
    assert sum(manifest["results"]["finish_reasons"].values()) == 36


def test_a_killed_run_goes_on_without_doing_a_prompt_again(folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{number}?"} for number in range(60)])
    keys = dict(max_new_tokens=30, max_rows=3)
    whole = sample.run(recipe_of(folder, output_dir="whole", **keys))
    recipe = recipe_of(folder, **keys)
    partial = folder / "run" / f"{sample.ANSWERS}.partial"
    process = start_run(folder / "run.yaml")
    try:
        while not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.005)  # between two looks
    finally:
        process.kill()
        process.communicate()
    assert not (folder / "run" / sample.ANSWERS).exists(), "killed too late"
    # An answer that only the first run can have given, and half a line of a killed process.
    lines = partial.read_bytes().rpartition(b"\n")[0].splitlines()
    number, row = json.loads(lines[0])
    row["answers"][0]["text"] = "kept"
    partial.write_bytes(b"\n".join([json.dumps([number, row]).encode(), *lines[1:], b'[3, {"pr']))
    again = sample.run(recipe)
    assert "prompts were answered before" in (again.path / "train.log").read_text()
    expected = answers_in(whole)
    expected[number] = row
    assert answers_in(again) == expected
    assert not partial.exists()


def test_prompts_come_from_rows_of_any_kind(folder):
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    write_jsonl(folder / "dialogues.jsonl", [{"messages": [*turns, *turns]}, {"messages": turns}])
    write_jsonl(folder / "open.jsonl", [{"messages": [*turns, turns[0]]}])
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "p?", "chosen": "c", "rejected": "r"}])
    write_jsonl(folder / "rated.jsonl", [{"prompt": "k?", "completion": "c", "label": False}])
    write_jsonl(folder / "alpaca.jsonl", [{"instruction": "i?", "output": "o"}])
    write_jsonl(folder / "asked.jsonl", [{"instruction": "j?"}])
    names = ("dialogues", "open", "pairs", "rated", "alpaca", "asked")
    mixer = [{"path": f"{name}.jsonl"} for name in names]
    recipe = recipe_of(folder, dataset_mixer=mixer, num_samples=1, max_new_tokens=1)
    rows = answers_in(sample.run(recipe))
    assert [row["prompt"][-1]["content"] for row in rows] == ["a?", "a?", "p?", "k?", "i?", "j?"]
    assert [len(row["prompt"]) for row in rows] == [3, 1, 1, 1, 1, 1]
    manifest = read_manifest("run")
    assert manifest is not None
    assert manifest["examples"]["dropped"] == {"asked before": 1}  # that of open.jsonl


def test_a_prompt_without_room_for_an_answer_is_named_or_dropped(folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "short?"}, {"prompt": "long " * 40}])
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 2.*this prompt has .* tokens"):
        sample.run(recipe_of(folder))
    rows = answers_in(sample.run(recipe_of(folder, on_too_long="drop", output_dir="dropped")))
    assert len(rows) == 1


def test_a_verifiers_problems_keep_their_truth(folder):
    problems = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    write_jsonl(folder / "problems.jsonl", problems)
    keys = dict(dataset_mixer=[{"path": "problems.jsonl"}], verifier="gsm8k")
    rows = answers_in(sample.run(recipe_of(folder, **keys)))
    assert [row["truth"] for row in rows] == ["1", "2", "3"]
    write_jsonl(folder / "problems.jsonl", [*problems, {"question": "no answer?"}])
    with pytest.raises(DataError, match=r"line 4.*'answer' is missing"):
        sample.run(recipe_of(folder, output_dir="bad", **keys))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temperature": 0.0}, "at temperature 0 all answers"),
        ({"verifier": "gms8k"}, "must be one of gsm8k"),
        ({"max_rows": 2}, "written together"),
        ({"dataset_mixer": []}, "names no data"),
    ],
)
def test_a_recipe_that_cannot_be_sampled_is_refused(folder, keys, words):
    with pytest.raises(UserError, match=words):
        recipe_of(folder, **keys)


def test_a_plan_counts_prompts_and_answers_and_writes_nothing(folder):
    figures = sample.plan(recipe_of(folder))
    assert figures["answers"] == 36 and figures["tokens_at_most"] == 36 * 12
    assert not (folder / "run").exists()
