"""A mixture takes of each source what was asked, by the seed, and says so."""

from collections import Counter
from pathlib import Path

import pytest

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError
from olmo_base.run.recipe import RecipeError
from open_instruct.examples import (
    DataConfig,
    Source,
    SourceUse,
    mixture_lines,
    read_dialogues,
)
from tests.open_instruct.rows import GOOD, dialogues, turns, write

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_the_format_is_said_with_what_was_asked_available_and_used(tmp_path):
    alpaca = write(
        tmp_path / "a.jsonl", *[{"instruction": "q", "output": str(i)} for i in range(8)]
    )
    turns = write(tmp_path / "b.jsonl", GOOD)
    uses: list[SourceUse] = []
    sources = [Source(alpaca, fraction=0.5), Source(turns, repeat=3)]
    read_dialogues(sources, seed=0, on_bad_row="error", counts=ExampleCounts(), uses=uses)
    assert uses == [
        SourceUse(alpaca, ("Alpaca",), "0.5 of the rows", 8, 4),
        SourceUse(turns, ("messages",), "3 times the rows", 1, 3),
    ]
    head, *lines = (line.split() for line in mixture_lines(uses))
    assert head == ["source", "format", "asked", "for", "usable", "used"]
    text = " ".join(" ".join(line) for line in lines)
    assert "Alpaca 0.5 of the rows 8 4" in text
    assert "messages 3 times the rows 1 3" in text


def test_a_file_without_one_usable_row_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", turns())
    with pytest.raises(DataError, match="no row can be used"):
        dialogues(path, on_bad_row="drop")


# ---------------------------------------------------------------- mixtures


@pytest.fixture
def hundred(tmp_path) -> str:
    return write(
        tmp_path / "hundred.jsonl", *[{"prompt": f"q{i}", "completion": "a"} for i in range(100)]
    )


def lines_of(source: Source, seed: int = 0) -> list[int]:
    return [item.line for item in dialogues(source, seed=seed)]


def test_samples_and_fraction_draw_by_the_seed_without_repeating(hundred):
    for source in (Source(hundred, samples=30), Source(hundred, fraction=0.3)):
        drawn = lines_of(source)
        assert len(set(drawn)) == len(drawn) == 30
        assert drawn == lines_of(source)
        assert drawn != lines_of(source, seed=1)
        assert drawn != list(range(1, 31))  # not merely the first
        assert drawn == sorted(drawn)


def test_all_rows_are_taken_once_if_nothing_is_asked(hundred):
    for source in (Source(hundred), Source(hundred, fraction=1.0), Source(hundred, samples=100)):
        assert lines_of(source) == list(range(1, 101))


def test_repeat_takes_every_row_and_a_drawn_part_once_more(hundred):
    times = Counter(Counter(lines_of(Source(hundred, repeat=2.25))).values())
    assert times == {2: 75, 3: 25}


def test_two_sources_of_one_file_draw_different_rows(hundred):
    twice = dialogues(Source(hundred, samples=30), Source(hundred, samples=30))
    assert [item.line for item in twice[:30]] != [item.line for item in twice[30:]]


def test_more_samples_than_rows_are_refused_with_the_next_step(hundred):
    with pytest.raises(DataError, match=r"samples: 250 rows are asked for and 100 .*repeat: 2.5"):
        dialogues(Source(hundred, samples=250))


def test_a_source_asks_in_one_way_only():
    with pytest.raises(RecipeError, match="samples and repeat"):
        Source("x", samples=3, repeat=2)


def test_a_recipe_must_name_data():
    with pytest.raises(RecipeError, match="names no data"):
        DataConfig(dataset_mixer=())


def test_parts_share_a_file_without_sharing_a_question(hundred, tmp_path):
    train = {item.messages[0]["content"] for item in dialogues(Source(hundred, part="train"))}
    held_out = {item.messages[0]["content"] for item in dialogues(Source(hundred, part="held_out"))}
    assert train | held_out == {f"q{i}" for i in range(100)}
    assert not train & held_out
    assert 2 <= len(held_out) <= 25
    # Another order, another seed, another file: the same questions are held out.
    rows = [{"instruction": f"q{i}", "output": "b"} for i in reversed(range(100))]
    other = write(tmp_path / "other.jsonl", *rows, *rows)
    again = dialogues(Source(other, part="held_out"), seed=5)
    assert {item.messages[0]["content"] for item in again} == held_out
    assert len(again) == 2 * len(held_out)
