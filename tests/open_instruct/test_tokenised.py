"""Tokenised examples are kept, and used again only where nothing that decides them has changed."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from olmo_base.run.artefact import ExampleCounts, RunConfig
from open_instruct import sft
from open_instruct.causal_lm import ModelConfig
from open_instruct.encode import ChatEncoder, find_template, load_chat_encoder
from open_instruct.examples import DataConfig, Source
from open_instruct.loop import TrainConfig
from open_instruct.sft import SftRecipe
from open_instruct.tokenised import (
    DataReport,
    report_for,
    tokenised_dialogues,
    tokenised_pairs,
    tokenised_rated,
)
from open_instruct.tuning import tokenise_before_ranks_meet
from tests.open_instruct.rows import assistant, turns, user, write
from tests.open_instruct.test_encode import encoder_for
from tests.open_instruct.tiny import save_tiny_model


def recipe_for(folder: Path, *paths: str, **keys) -> SftRecipe:
    return SftRecipe(
        model=ModelConfig(model_name_or_path="unread"),
        data=DataConfig(dataset_mixer=tuple(map(Source, paths)), **keys),
        run=RunConfig(output_dir=str(folder / "runs" / "sft")),
    )


@pytest.fixture
def tulu(chat_tokenizer) -> ChatEncoder:
    return encoder_for(chat_tokenizer, "tulu")


@pytest.fixture
def data(tmp_path) -> str:
    rows = [turns(user(f"q{n}"), assistant(f"a{n}" * n)) for n in range(1, 6)]
    return write(tmp_path / "rows.jsonl", *rows)


def tokenised(recipe: SftRecipe, encoder: ChatEncoder, **keys) -> tuple[list[Any], list[str]]:
    """The sequences, and what was said."""
    report = report_for(recipe)
    sources = recipe.data.dataset_mixer
    return tokenised_dialogues(sources, encoder, recipe, ExampleCounts(), report), report.notes


def test_the_second_run_reads_what_the_first_one_kept(tmp_path, tulu, data):
    bad = write(tmp_path / "bad.jsonl", turns(user("q"), assistant("é" * 90)), turns(user("q")))
    keys: dict[str, Any] = {"max_length": 60, "on_too_long": "drop", "max_too_long_fraction": 0.5}
    recipe = recipe_for(tmp_path, data, bad, on_bad_row="drop", **keys)
    counts, uses, found = [], [], []
    for expected in ("tokenised 5 sequences", "tokenised before: 5 sequences"):
        count, report = ExampleCounts(), report_for(recipe)
        found.append(tokenised_dialogues(recipe.data.dataset_mixer, tulu, recipe, count, report))
        counts.append(count)
        uses.append(report.uses)
        assert report.notes[0].startswith(expected)
    alone = ExampleCounts()
    assert (
        found[0]
        == found[1]
        == tokenised_dialogues(recipe.data.dataset_mixer, tulu, recipe, alone, DataReport())
    )
    assert counts[0] == counts[1] == alone
    assert alone.as_dict() == {
        "used": 5,
        "truncated": 0,
        "dropped": {"longer than max_length": 1, "no assistant turn": 1},
    }
    assert uses[0] == uses[1]


def test_pairs_and_rated_answers_are_kept_whole(tmp_path, tulu):
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no", "margin": 0.25}
    rated = {"prompt": "q", "completion": "a", "label": False}
    recipe = recipe_for(tmp_path, write(tmp_path / "pairs.jsonl", pair, pair))
    for _ in range(2):
        (first, second) = tokenised_pairs(
            recipe.data.dataset_mixer, tulu, recipe, ExampleCounts(), report_for(recipe),
            with_margin=True,
        )  # fmt: skip
        assert (
            first
            == second
            == tulu.encode_pair([user("q")], [assistant("yes")], [assistant("no")])._replace(
                margin=0.25
            )
        )
    recipe = recipe_for(tmp_path, write(tmp_path / "rated.jsonl", rated))
    for _ in range(2):
        (answer,) = tokenised_rated(
            recipe.data.dataset_mixer, tulu, recipe, ExampleCounts(), report_for(recipe)
        )
        assert answer.sequence == tulu.encode_dialogue([user("q"), assistant("a")])
        assert answer.is_desirable is False
        assert answer.prompt_length == len(tulu.encode_prompt([user("q")]))


def test_one_changed_byte_of_a_data_file_is_seen(tmp_path, tulu, data):
    recipe = recipe_for(tmp_path, data)
    before, _ = tokenised(recipe, tulu)
    text = Path(data).read_text()
    Path(data).write_text(text.replace("a5a5", "a5b5"))
    assert len(Path(data).read_text()) == len(text)
    after, notes = tokenised(recipe, tulu)
    assert after != before and notes[0].startswith("tokenised 5 sequences")
    Path(data).write_text(text)
    assert tokenised(recipe, tulu)[0] == before


def test_one_changed_byte_of_the_template_is_seen(tmp_path, tulu, data, chat_tokenizer):
    recipe = recipe_for(tmp_path, data)
    before, _ = tokenised(recipe, tulu)
    other = ChatEncoder(chat_tokenizer, tulu.template.replace("'|>\\n'", "'|>\\t'"))
    assert len(other.template) == len(tulu.template) and other.template != tulu.template
    after, notes = tokenised(recipe, other)
    assert after != before and notes[0].startswith("tokenised 5 sequences")


def test_one_changed_entry_of_the_tokenizer_is_seen(tmp_path, tulu, data, chat_tokenizer):
    recipe = recipe_for(tmp_path, data)
    before, _ = tokenised(recipe, tulu)
    content = json.loads(chat_tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["a"] = vocabulary["a"], vocabulary["q"]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>"
    )
    after, notes = tokenised(recipe, ChatEncoder(swapped, tulu.template))
    assert after != before and notes[0].startswith("tokenised 5 sequences")


@pytest.mark.parametrize(
    "changed", [{"max_length": 30, "on_too_long": "truncate_left"}, {"learn_turns": "last"}]
)
def test_a_changed_setting_is_seen(changed, tmp_path, tulu, data):
    tokenised(recipe_for(tmp_path, data), tulu)
    _, notes = tokenised(recipe_for(tmp_path, data, **changed), tulu)
    assert notes[0].startswith("tokenised 5 sequences")


def test_a_template_that_writes_the_date_is_asked_again(tmp_path, data, chat_tokenizer):
    text = find_template("tulu").read_text()
    days = [
        ChatEncoder(chat_tokenizer, "{%- set day = '" + day + "' -%}{{ day }}" + text)
        for day in ("Monday", "Friday")
    ]
    for encoder in days:
        encoder.template = text  # the same source, which writes another day
        _, notes = tokenised(recipe_for(tmp_path, data), encoder)
        assert notes[0].startswith("tokenised 5 sequences")


def test_what_is_damaged_on_disk_is_made_again_and_said(tmp_path, tulu, data):
    recipe = recipe_for(tmp_path, data)
    before, _ = tokenised(recipe, tulu)
    (entry,) = (tmp_path / "runs" / ".tokenised").glob("*/")
    for name in ("ids.npy", "is_learnt.npy", "about.json"):
        content = bytearray((entry / name).read_bytes())
        content[-9] ^= 1
        for damaged in (bytes(content), b"", None):
            (entry / name).unlink()
            if damaged is not None:
                (entry / name).write_bytes(damaged)
            again, notes = tokenised(recipe, tulu)
            assert again == before
            assert notes[0] == f".tokenised/{entry.name} is damaged and was made again"
            assert tokenised(recipe, tulu)[1][0].startswith("tokenised before")


def _tokenise(folder: Path, data: str, encoder: ChatEncoder, queue: Any) -> None:
    queue.put(tokenised(recipe_for(folder, data), encoder))


def test_two_runs_at_once_make_it_once_and_read_the_same(tmp_path, tulu, data):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_tokenise, args=(tmp_path, data, tulu, queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    first_words = sorted(notes[0].split()[1] for _, notes in results)
    assert first_words == ["5", "before:", "before:"]
    assert results[0][0] == results[1][0] == results[2][0]


def test_nothing_is_kept_if_the_recipe_says_so_or_the_place_cannot_be_written(tmp_path, tulu, data):
    kept, _ = tokenised(recipe_for(tmp_path, data, keep_tokenised=False), tulu)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").write_text("a file, where a folder is needed")
    found, notes = tokenised(recipe_for(tmp_path, data), tulu)
    assert found == kept and notes[0].startswith("tokenised examples are not kept: ")


def test_ranks_tokenise_before_they_meet_and_a_run_alone_does_not(tmp_path, data, monkeypatch):
    save_tiny_model(tmp_path / "base")
    recipe = replace(
        recipe_for(tmp_path, data),
        model=ModelConfig(model_name_or_path=str(tmp_path / "base")),
        chat_template="tulu",
    )
    tokenise_before_ranks_meet(recipe, sft.dialogue_examples)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    tokenise_before_ranks_meet(recipe, sft.dialogue_examples)
    encoder = load_chat_encoder(tmp_path / "base", "tulu")
    assert tokenised(recipe, encoder)[1][0].startswith("tokenised before: 5 sequences")


# ---------------------------------------------------------------- the same text twice

LONG = "the quick brown fox jumps over the lazy dog and then it sleeps all day long"


def test_rows_that_share_thirteen_words_with_evaluation_data_are_dropped_and_named(tmp_path, tulu):
    words = LONG.split()
    rows = [
        turns(user("Say: " + " ".join(words[:13]).upper() + "!"), assistant("a")),
        turns(user("Say: " + " ".join(words[:12])), assistant("a")),
        turns(user("q"), assistant(LONG)),
    ]
    data = write(tmp_path / "rows.jsonl", *rows)
    evaluation = write(tmp_path / "eval.jsonl", {"x": 1}, {"doc": {"question": [LONG]}})
    recipe = recipe_for(tmp_path, data, decontaminate_against=(evaluation,))
    for _ in range(2):  # made, and kept
        counts, report = ExampleCounts(), report_for(recipe)
        found = tokenised_dialogues(recipe.data.dataset_mixer, tulu, recipe, counts, report)
        assert len(found) == counts.used == 1
        assert counts.dropped == {"shares 13 words in a row with evaluation data": 2}
        assert [(item["line"], item["evaluation_line"]) for item in report.contaminated] == [
            (1, 2),
            (3, 2),
        ]
    write(tmp_path / "eval.jsonl", {"x": LONG.replace("quick", "quack").replace("day", "night")})
    assert len(tokenised(recipe, tulu)[0]) == 3  # the evaluation file decides too


def test_repeated_rows_and_held_out_ones_are_counted(tmp_path, tulu):
    row, other = turns(user("q"), assistant("a")), turns(user("q"), assistant("b"))
    train = write(tmp_path / "train.jsonl", row, other, row, turns(user("r"), assistant("a")))
    held_out = write(tmp_path / "held_out.jsonl", other)
    recipe = recipe_for(tmp_path, train)
    twice = replace(recipe.data, dataset_mixer=(Source(train, repeat=2),))
    recipe = replace(recipe, data=twice)
    report = report_for(recipe)
    for sources in (recipe.data.dataset_mixer, (Source(held_out),)):
        tokenised_dialogues(sources, tulu, recipe, ExampleCounts(), report)
    assert report.num_repeated == 1
    assert report.overlap() == (2, 6)  # each row is taken twice


def test_the_manifest_and_the_run_folder_say_what_became_of_the_data(tmp_path, data):
    save_tiny_model(tmp_path / "base")
    evaluation = write(tmp_path / "eval.jsonl", {"x": LONG})
    leaked = write(tmp_path / "leaked.jsonl", turns(user(LONG), assistant("a")))
    recipe = replace(
        recipe_for(tmp_path, data, leaked, decontaminate_against=(evaluation,)),
        model=ModelConfig(model_name_or_path=str(tmp_path / "base")),
        chat_template="tulu",
        train=TrainConfig(max_steps=1, per_device_train_batch_size=2),
    )
    folder = sft.run(recipe).path
    manifest = json.loads((folder / "manifest.json").read_text())
    uses = [(use["path"], use["available"], use["used"]) for use in manifest["data"]["mixture"]]
    assert uses == [(data, 5, 5), (leaked, 1, 1)]
    assert manifest["data"]["decontaminated"] == 1
    assert manifest["examples"]["used"] == 5
    (dropped,) = (folder / "decontaminated.jsonl").read_text().splitlines()
    assert json.loads(dropped) == {
        "source": leaked,
        "line": 1,
        "evaluation": evaluation,
        "evaluation_line": 1,
        "shared_with": 1,
    }
    log = (folder / "train.log").read_text()
    assert "1 training rows share 13 words in a row" in log and "tokenised 5 sequences" in log
