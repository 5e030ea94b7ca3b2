"""Rows of every known format become the right turns; rows that cannot are named with their line."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from olmo_base.run.recipe import RecipeError
from open_instruct.examples import (
    DataConfig,
    Dialogue,
    Message,
    Pair,
    Source,
    SourceUse,
    _hub_rows,
    mixture_lines,
    read_dialogues,
    read_pairs,
    read_rated,
    source_files,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


SYSTEM: Message = {"role": "system", "content": "s"}


def write(path: Path, *rows: Any) -> str:
    """Rows as JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def dialogues(
    *sources: Source | str, counts: ExampleCounts | None = None, **keys
) -> list[Dialogue]:
    keys = {"seed": 0, "on_bad_row": "error", **keys}
    items = [Source(item) if isinstance(item, str) else item for item in sources]
    return read_dialogues(items, counts=counts or ExampleCounts(), **keys)


def pairs(*sources: str, counts: ExampleCounts | None = None, **keys) -> list[Pair]:
    keys = {"seed": 0, "on_bad_row": "error", **keys}
    return read_pairs([Source(item) for item in sources], counts=counts or ExampleCounts(), **keys)


# ---------------------------------------------------------------- formats

ROWS = {
    "messages": ({"messages": [user("q"), assistant("a")]}, [user("q"), assistant("a")]),
    "messages with system and two turns": (
        {"messages": [SYSTEM, user("q"), assistant("a"), user("r"), assistant("b")], "id": 7},
        [SYSTEM, user("q"), assistant("a"), user("r"), assistant("b")],
    ),
    "messages with empty fields of tool calls": (
        {"messages": [user("q"), {**assistant("a"), "tool_calls": None}], "tools": "[]"},
        [user("q"), assistant("a")],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [user("q"), assistant("a")],
    ),
    "ShareGPT with our role names": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "assistant", "value": "a"},
            ]
        },
        [SYSTEM, user("q"), assistant("a")],
    ),
    "ShareGPT with a system key": (
        {
            "system": "s",
            "tools": "",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        [SYSTEM, user("q"), assistant("a")],
    ),
    "Alpaca": ({"instruction": "q", "input": "", "output": "a"}, [user("q"), assistant("a")]),
    "Alpaca with input and system": (
        {"instruction": "q", "input": "x", "output": "a", "system": "s"},
        [SYSTEM, user("q\n\nx"), assistant("a")],
    ),
    "prompt/completion": ({"prompt": "q", "completion": "a"}, [user("q"), assistant("a")]),
    "prompt/completion as turns": (
        {"prompt": [SYSTEM, user("q")], "completion": [assistant("a")]},
        [SYSTEM, user("q"), assistant("a")],
    ),
    "instruction/response": ({"instruction": "q", "response": "a"}, [user("q"), assistant("a")]),
    "instruction/response with context": (
        {"instruction": "q", "context": "x", "response": "a"},
        [user("q\n\nx"), assistant("a")],
    ),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_of_each_format_become_turns(name, tmp_path):
    row, turns = ROWS[name]
    path = write(tmp_path / "rows.jsonl", row)
    assert dialogues(path) == [Dialogue(turns, path, 1)]


PAIRS = {
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "turns": {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    "whole dialogues": {
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
    },
    "whole dialogues with the prompt beside them": {
        "prompt": "q",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
        "score_chosen": 9.0,
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "instruction": {
        "instruction": "q",
        "input": "",
        "output": "a",
        "chosen": "a",
        "rejected": "b",
    },
}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_pairs_of_each_format_become_a_prompt_and_two_answers(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", PAIRS[name])
    assert pairs(path) == [Pair([user("q")], [assistant("a")], [assistant("b")], path, 1)]


def test_whole_dialogues_part_at_their_first_difference(tmp_path):
    shared = [SYSTEM, user("q"), assistant("same"), user("r")]
    for extra in ({}, {"prompt": "r"}):
        row = {"chosen": [*shared, assistant("a")], "rejected": [*shared, assistant("b")], **extra}
        (pair,) = pairs(write(tmp_path / "rows.jsonl", row))
        assert (pair.prompt, pair.chosen, pair.rejected) == (
            shared,
            [assistant("a")],
            [assistant("b")],
        )


def test_a_later_difference_in_a_dialogue_belongs_to_the_answers(tmp_path):
    chosen = [user("q"), assistant("a"), user("r"), assistant("c")]
    row = {"chosen": chosen, "rejected": [user("q"), assistant("b"), user("r"), assistant("c")]}
    (pair,) = pairs(write(tmp_path / "rows.jsonl", row))
    assert pair.prompt == [user("q")]
    assert pair.chosen == chosen[1:]


def test_the_format_is_said_with_what_was_asked_available_and_used(tmp_path):
    alpaca = write(
        tmp_path / "a.jsonl", *[{"instruction": "q", "output": str(i)} for i in range(8)]
    )
    turns = write(tmp_path / "b.jsonl", ROWS["messages"][0])
    uses: list[SourceUse] = []
    sources = [Source(alpaca, fraction=0.5), Source(turns, repeat=3)]
    read_dialogues(sources, seed=0, on_bad_row="error", counts=ExampleCounts(), uses=uses)
    assert uses == [
        SourceUse(alpaca, ("Alpaca",), "0.5 of the rows", 8, 4),
        SourceUse(turns, ("messages",), "3 times the rows", 1, 3),
    ]
    assert mixture_lines(uses)[0] == (
        f"{alpaca}: 4 used of 8 usable rows (asked for 0.5 of the rows; format Alpaca)"
    )


# ---------------------------------------------------------------- files


def test_json_lists_json_lines_and_gzip_of_both_hold_the_same_rows(tmp_path):
    rows = [{"instruction": f"q{i}", "output": "ü"} for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    listed = json.dumps(rows, indent=2, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(listed, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(listed.encode()))
    read = {file.name: dialogues(str(file)) for file in sorted(tmp_path.iterdir())}
    assert len(read) == 4
    for name, found in read.items():
        assert [item.messages for item in found] == [
            [user(f"q{i}"), assistant("ü")] for i in range(3)
        ], name
    assert [item.line for item in read["a.jsonl"]] == [1, 2, 3]
    assert [item.line for item in read["b.json"]] == [2, 6, 10]


def test_a_folder_is_all_its_files_in_order_whatever_their_formats(tmp_path):
    write(tmp_path / "2.jsonl", {"prompt": "q", "completion": "second"})
    write(tmp_path / "1.jsonl", {"instruction": "q", "output": "first"})
    (tmp_path / "README.md").write_text("not data")
    assert [item.messages[-1]["content"] for item in dialogues(str(tmp_path))] == [
        "first",
        "second",
    ]
    assert source_files([Source(str(tmp_path))]) == [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    for path in (str(tmp_path / "no.jsonl"), "../no/such", "no.json.gz"):
        with pytest.raises(UserError, match="does not exist"):
            source_files([Source(path)])


def test_a_folder_without_data_and_an_unread_kind_of_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no data file"):
        dialogues(str(tmp_path))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Convert it to JSON lines"):
        dialogues(str(tmp_path / "rows.parquet"))


def test_a_data_set_of_the_hub_that_cannot_be_fetched_is_refused_by_name():
    pytest.importorskip("datasets")
    assert source_files([Source("nobody/nothing")]) == []
    with pytest.raises(UserError, match=r"no file or folder nobody/nothing here.*could not be"):
        dialogues("nobody/nothing")


def test_without_the_datasets_package_the_hub_needs_an_install():
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from olmo_base.run.artefact import ExampleCounts\n"
        "from open_instruct.examples import Source, read_dialogues\n"
        "read_dialogues([Source('a/b')], seed=0, on_bad_row='error', counts=ExampleCounts())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError" in done.stderr
    assert "pip install 'open-instruct[data]'" in done.stderr


def test_rows_that_the_datasets_package_loads_are_numbered(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "train.jsonl", *[ROWS["messages"][0]] * 2)
    rows = list(_hub_rows(Source(str(tmp_path))))  # a folder is loaded as a hub's repository is
    assert [row.value for row in rows] == [ROWS["messages"][0]] * 2
    assert [(row.source, row.line) for row in rows] == [(f"{tmp_path} (train)", n) for n in (1, 2)]
    with pytest.raises(UserError, match=r"split nosuch\) it could not be loaded: .*nosuch"):
        list(_hub_rows(Source(str(tmp_path), split="nosuch")))


# ---------------------------------------------------------------- bad rows

GOOD = {"messages": [user("q"), assistant("a")]}


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


BAD_ROWS: dict[str, tuple[Any, str, str]] = {  # row, its message, what it is counted under
    "broken JSON": (b'{"messages": [', "broken JSON: Expecting value at column 15", "broken JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8: byte 0xff", "not UTF-8"),
    "missing key": (
        {"conversation": []},
        "the key 'messages' is missing; found 'conversation'",
        "missing key",
    ),
    "missing key of a turn": (turns({"role": "user"}), "turn 1 .* no key 'content'", "missing key"),
    "empty dialogue": (turns(), "holds no turns", "empty dialogue"),
    "no assistant turn": (turns(user("q")), "no assistant turn", "no assistant turn"),
    "unknown role": (
        turns(user("q"), {"role": "robot", "content": "a"}),
        "turn 2 .* role 'robot'.*Known roles: system, user",
        "unknown role",
    ),
    "tool turn": (
        turns(user("q"), {"role": "tool", "content": "a"}),
        "'tool': tool calls are not supported yet",
        "tool calls not supported yet",
    ),
    "tool calls": (
        turns(user("q"), {**assistant("a"), "tool_calls": [{"id": 1}]}),
        "'tool_calls': tool calls are not supported yet",
        "tool calls not supported yet",
    ),
    "label": (
        {**GOOD, "label": False},
        "loss_type: kto",
        "rated answer",
    ),
    "empty content": (turns(user("q"), assistant(" \n")), "turn 2 .* is empty", "empty content"),
    "content that is a list": (
        turns(user("q"), {"role": "assistant", "content": [{"type": "text", "text": "a"}]}),
        "turn 2 .* is a list, not text",
        "content is not text",
    ),
    "content that is null": (
        turns(user("q"), {"role": "assistant", "content": None}),
        "is null, not text",
        "content is not text",
    ),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "half a surrogate pair",
        "content is not text",
    ),
    "system turn not first": (
        turns(user("q"), SYSTEM, assistant("a")),
        "turn 2 .* is a system turn; only the first may be",
        "system turn not first",
    ),
    "two users": (
        turns(user("q"), user("r"), assistant("a")),
        "turns 1 and 2 .* are both user turns",
        "turns do not alternate",
    ),
    "assistant first": (
        turns(SYSTEM, assistant("a")),
        "starts with the assistant",
        "turns do not alternate",
    ),
    "unanswered": (
        turns(user("q"), assistant("a"), user("r")),
        "ends with a user turn that nobody answers",
        "ends without an answer",
    ),
    "a row that is a list": ([1, 2], "the row is a list, not an object", "not an object"),
    "a turn that is a text": (
        turns("q"),
        "turn 1 .* is a text, not an object",
        "turns are not objects",
    ),
    "turns that are a text": ({"messages": "q"}, "not a list of turns", "turns are not a list"),
    "too deep": (b"[" * 100_000, "broken JSON: nested too deep", "broken JSON"),
}


@pytest.mark.parametrize("name", sorted(BAD_ROWS))
def test_a_bad_row_is_one_message_with_file_and_line_or_is_dropped_and_counted(name, tmp_path):
    row, message, reason = BAD_ROWS[name]
    path = write(tmp_path / "rows.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(DataError, match=message) as error:
        dialogues(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(error.value)
    counts = ExampleCounts()
    assert [item.line for item in dialogues(path, counts=counts, on_bad_row="drop")] == [1, 4]
    assert counts.dropped == {reason: 1}


def test_the_first_row_may_be_a_bad_one(tmp_path):
    counts = ExampleCounts()
    path = write(tmp_path / "rows.jsonl", {"unknown": 1}, b"{", GOOD)
    assert [item.line for item in dialogues(path, counts=counts, on_bad_row="drop")] == [3]
    assert counts.dropped == {"unknown format": 1, "broken JSON": 1}


def test_a_row_of_no_known_format_says_its_keys_and_the_known_formats(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match=r"line 1: no known format has the keys 'question', 'ans"):
        dialogues(path)
    path = write(tmp_path / "rows.jsonl", {"instruction": "q"})
    with pytest.raises(DataError, match=r"missing key 'output' of the format Alpaca"):
        dialogues(path)


def test_function_calls_of_sharegpt_are_not_supported_yet_and_named(tmp_path):
    for role in ("function_call", "observation"):
        row = {
            "conversations": [{"from": "human", "value": "q"}, {"from": role, "value": "x"}],
        }
        path = write(tmp_path / "rows.jsonl", row)
        with pytest.raises(DataError, match=f"'{role}': tool calls are not supported yet"):
            dialogues(path)


BAD_PAIRS = {
    "same answers": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    "same dialogues": ({"chosen": GOOD["messages"], "rejected": GOOD["messages"]}, "are the same"),
    "prompt answered already": (
        {"prompt": [user("q"), assistant("a")], "chosen": "a", "rejected": "b"},
        "prompt ends with an assistant turn",
    ),
    "no shared prompt": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("a")]},
        "share no prompt",
    ),
    "transcripts": (
        {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"},
        "where the answer begins",
    ),
    "missing key": ({"prompt": "q", "chosen": "a"}, "missing key 'rejected'"),
    "empty answer": ({"prompt": "q", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
    "answer by the user": (
        {"prompt": "q", "chosen": [user("x")], "rejected": [assistant("b")]},
        "the prompt with chosen has no assistant turn",
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_PAIRS))
def test_a_bad_pair_is_one_message_with_file_and_line_or_is_dropped(name, tmp_path):
    row, message = BAD_PAIRS[name]
    good = PAIRS["whole dialogues with the prompt beside them"]
    path = write(tmp_path / "rows.jsonl", row, good)
    with pytest.raises(DataError, match=message) as error:
        pairs(path)
    assert str(error.value).startswith(f"{path}, line 1: ")
    counts = ExampleCounts()
    assert len(pairs(path, counts=counts, on_bad_row="drop")) == 1
    assert sum(counts.dropped.values()) == 1


TALK: list[Message] = [user("a"), assistant("b"), user("c"), assistant("d")]
RATED: dict[str, Any] = {
    "prompt and completion": (
        {"prompt": "Is it?", "completion": "No.", "label": False},
        ([{"role": "user", "content": "Is it?"}], [{"role": "assistant", "content": "No."}], False),
    ),
    "a dialogue": (
        {"messages": TALK, "label": True},
        (TALK[:-1], TALK[-1:], True),
    ),
    "turns": (
        {"prompt": TALK[:-1], "completion": TALK[-1:], "label": True},
        (TALK[:-1], TALK[-1:], True),
    ),
}


@pytest.mark.parametrize("name", RATED)
def test_rated_answers_are_read_in_every_format(name, tmp_path):
    row, expected = RATED[name]
    source = Source(write(tmp_path / "rated.jsonl", row))
    (rated,) = read_rated([source], seed=0, on_bad_row="error", counts=ExampleCounts())
    assert (rated.prompt, rated.answer, rated.is_desirable) == expected
    assert rated.line == 1


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "completion": "b", "label": 1}, "'label' is a number"),
        ({"prompt": "a", "completion": "b"}, "missing key 'label'"),
        ({"prompt": TALK[1:2], "completion": "b", "label": True}, "starts with the assistant"),
        ({"prompt": "a", "completion": " ", "label": True}, "'completion' is empty"),
    ],
)
def test_a_bad_rated_row_is_one_message_or_is_dropped(row, words, tmp_path):
    good = {"prompt": "a", "completion": "b", "label": True}
    source = Source(write(tmp_path / "rated.jsonl", good, row))
    if "label" in row:
        with pytest.raises(DataError, match=f"line 2: .*{words}"):
            read_rated([source], seed=0, on_bad_row="error", counts=ExampleCounts())
    counts = ExampleCounts()
    assert len(read_rated([source], seed=0, on_bad_row="drop", counts=counts)) == 1
    assert sum(counts.dropped.values()) == 1


def test_a_bad_row_of_a_json_list_is_named_by_row_and_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, turns(), GOOD], indent=1))
    line = path.read_text()[: path.read_text().index('"messages": []')].count("\n")
    with pytest.raises(DataError, match=f"line {line}: row 2: .*no turns"):
        dialogues(str(path))


def test_a_broken_json_list_is_refused_with_its_line(tmp_path):
    path = tmp_path / "rows.json"
    for text, line, message in (
        ("[\n{},\n{\n", 4, "broken JSON: .* row 2"),
        ("[\n{}\n{}]", 3, "a comma or ] must follow row 1"),
        ("[\n{}\n]\n[]", 4, "text after the end"),
        ("[\n]", 2, "this JSON list is empty"),
        ("[", 1, "broken JSON"),
        ('[\n"\udcff"]', 2, "not UTF-8"),
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match=message) as error:
            dialogues(str(path), on_bad_row="drop")
        assert error.value.line == line, text


def test_an_empty_file_is_refused(tmp_path):
    for name, content in (
        ("a.jsonl", b""),
        ("b.json", b" \n\n"),
        ("c.jsonl.gz", gzip.compress(b"", mtime=0)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: this file is empty"):
            dialogues(str(tmp_path / name))


def test_a_broken_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode() * 50, mtime=0)
    for content in (b"{}", whole[:-20], whole[:30] + b"xxxx" + whole[34:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match="broken gzip file"):
            dialogues(str(tmp_path / "rows.jsonl.gz"))


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


# ---------------------------------------------------------------- real data

REAL = {
    "dialogues/dolly.jsonl.gz": (6400, "instruction/response"),
    "dialogues/alpaca_en_1k.json": (999, "Alpaca"),
    "dialogues/identity_sharegpt.json": (500, "ShareGPT"),
    "preferences/rasbt_1100.json": (1100, "instruction/chosen/rejected"),
    "preferences/ultrafeedback_sample_sharegpt.json": (300, "ShareGPT pairs"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data for development is not here")
@pytest.mark.parametrize("name", sorted(REAL))
def test_every_row_of_the_real_files_is_used_or_counted(name):
    num_rows, form = REAL[name]
    counts, uses = ExampleCounts(), list[SourceUse]()
    reader = read_pairs if name.startswith("preferences") else read_dialogues
    found = reader(
        [Source(str(SHARED / name))], seed=0, on_bad_row="drop", counts=counts, uses=uses
    )
    assert len(found) + sum(counts.dropped.values()) == num_rows
    assert sum(counts.dropped.values()) <= 0.02 * num_rows, counts.dropped
    assert uses[0].formats == (form,)
