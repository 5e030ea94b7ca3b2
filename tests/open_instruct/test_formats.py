"""Rows of every known format become the right turns; rows that cannot are named with their line."""

from typing import Any

import pytest

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError
from olmo_base.run.recipe import RecipeError
from open_instruct.examples import Dialogue, Pair, Source, read_pairs, read_rated
from open_instruct.formats import ScoredPairs
from open_instruct.turns import Message, Tools
from tests.open_instruct.rows import GOOD, SYSTEM, assistant, dialogues, pairs, turns, user, write

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


CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOLS: Tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALLS = {
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f", "parameters": {}}]',
    },
    "messages": {
        "messages": [
            user("q"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}},
                ],
            },
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            assistant("a"),
        ],
        "tools": TOOLS,
    },
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_tool_calls_of_each_format_are_read_as_templates_expect_them(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", CALLS[name])
    result: Message = {"role": "tool", "content": "r"}
    messages = [user("q"), CALL, result, assistant("a")]
    assert dialogues(path) == [Dialogue(messages, path, 1, tools=TOOLS)]


@pytest.mark.parametrize("key, value", [("weight", 0), ("train", False), ("training", False)])
def test_a_turn_says_by_itself_that_it_is_not_learnt(key, value, tmp_path):
    row = turns(user("q"), {**assistant("a"), key: value}, user("r"), assistant("b"))
    (dialogue,) = dialogues(write(tmp_path / "rows.jsonl", row))
    assert [turn.get("train") for turn in dialogue.messages] == [None, False, None, None]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_of_each_format_become_turns(name, tmp_path):
    row, turns = ROWS[name]
    path = write(tmp_path / "rows.jsonl", row)
    assert dialogues(path) == [Dialogue(turns, path, 1)]


PAIRS: dict[str, dict[str, Any]] = {
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
    "transcripts": {
        "chosen": "\n\nHuman: q\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: b ",
    },
    "answers with scores beside them": {
        "prompt": "q",
        "completions": ["c", "b", "a"],
        "scores": [2, -1, 3.5],
    },
    "answers that hold their scores": {
        "instruction": "q",
        "completions": [
            {"response": "b", "overall_score": 1, "model": "x"},
            {"response": "a", "overall_score": 9, "model": "y"},
        ],
    },
}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_pairs_of_each_format_become_a_prompt_and_two_answers(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", PAIRS[name])
    assert pairs(path) == [Pair([user("q")], [assistant("a")], [assistant("b")], path, 1)]


def test_transcripts_share_their_prompt_up_to_the_first_turn_that_differs(tmp_path):
    prompt = "\n\nHuman: a: \n\nAssistant: b?\n\nYes.\n\nHuman: what is Human: for"
    row = {"chosen": f"{prompt}\n\nAssistant: c\n\nd", "rejected": f"{prompt}\n\nAssistant: e"}
    path = write(tmp_path / "rows.jsonl", row)
    shared = [user("a:"), assistant("b?\n\nYes."), user("what is Human: for")]
    assert pairs(path) == [Pair(shared, [assistant("c\n\nd")], [assistant("e")], path, 1)]


def test_of_scored_answers_the_recipe_chooses_the_pairs(tmp_path):
    row = {"prompt": "q", "answers": ["two", "one", "three", "also two"], "scores": [2, 1, 3, 2]}
    path = write(tmp_path / "rows.jsonl", row)

    def made(scored_pairs: ScoredPairs) -> list[tuple[str, str]]:
        source = Source(path, scored_pairs=scored_pairs)
        found = read_pairs([source], seed=0, on_bad_row="error", counts=ExampleCounts())
        return [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in found]

    best = [("three", "two"), ("three", "also two"), ("three", "one")]
    assert made("best_worst") == [("three", "one")]
    assert made("best_each") == best
    assert made("all") == [*best, ("two", "one"), ("also two", "one")]


def test_columns_give_the_keys_of_a_row_the_names_that_formats_know(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a", "prompt": None})
    source = Source(path, columns={"prompt": "question", "completion": "answer"})
    assert dialogues(source) == [Dialogue([user("q"), assistant("a")], path, 1)]
    source = Source(path, columns={"prompt": "query", "completion": "answer"})
    with pytest.raises(DataError, match="line 1: the key 'query', which columns names for 'prompt"):
        dialogues(source)
    with pytest.raises(RecipeError, match=r"no format knows the name 'promt'\. Known: answers, "):
        Source(path, columns={"promt": "question"})


def test_plain_text_is_a_dialogue_without_turns(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "Once."}, {"text": " "})
    with pytest.raises(DataError, match="line 2: 'text' is empty"):
        dialogues(path)
    assert dialogues(path, on_bad_row="drop") == [Dialogue([], path, 1, "Once.")]


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


# ---------------------------------------------------------------- bad rows

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
        "turn 2 .* role 'robot'.*Known roles: system, dev",
        "unknown role",
    ),
    "a result that nobody asked for": (
        turns(user("q"), assistant("a"), {"role": "tool", "content": "a"}),
        "turn 3 of .* answers a tool call that nobody made",
        "turns do not alternate",
    ),
    "a call that nobody answers": (
        turns(user("q"), {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}, GOOD),
        "turn 3 .* has no key 'role'",
        "missing key",
    ),
    "tool calls": (
        turns(user("q"), {**assistant("a"), "tool_calls": [{"id": 1}]}),
        'a tool call in turn 2 of .* names no function: {"id": 1}',
        "tool call without a name",
    ),
    "a call by the user": (
        turns({**user("q"), "tool_calls": [{"name": "f", "arguments": {}}]}, assistant("a")),
        "turn 1 .* calls tools, but is a user turn",
        "tool calls of others",
    ),
    "a call that is not JSON": (
        turns(user("q"), {"role": "tool_call", "content": "f(x)"}),
        "the call in turn 2 .* is not JSON",
        "broken JSON in a tool call",
    ),
    "arguments that are a list": (
        turns(user("q"), {"role": "tool_call", "content": '{"name": "f", "arguments": [1]}'}),
        "the arguments of 'f' in turn 2 .* are a list",
        "arguments of a tool call are no object",
    ),
    "tools that are a text": (
        {**GOOD, "tools": '"f"'},
        "'tools' is a text",
        "tools are not a list",
    ),
    "a tool without a name": ({**GOOD, "tools": [{}]}, "item 1 of 'tools'", "tool without a name"),
    "a weight of a half": (
        turns(user("q"), {**assistant("a"), "weight": 0.5}),
        "'weight' of turn 2 .* is 0.5",
        "weight is not 0 or 1",
    ),
    "nothing learnt": (
        turns(user("q"), {**assistant("a"), "weight": 0}),
        "every assistant turn of the dialogue says that it is not to be learnt",
        "no turn is learnt",
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
        {"chosen": "q\n\nAssistant: a", "rejected": "q\n\nAssistant: b"},
        "where the answer begins",
    ),
    "transcript with an empty turn": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant:"},
        "turn 2 of 'rejected' is empty",
    ),
    "transcript of one person": (
        {
            "chosen": "\n\nHuman: q\n\nHuman: r\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nHuman: r\n\nAssistant: b",
        },
        "turns 1 and 2 of the prompt are both user turns",
    ),
    "scores all the same": (
        {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1.0]},
        "the same score, so none is preferred",
    ),
    "a score that is no number": (
        {"prompt": "q", "completions": [{"text": "a", "score": "high"}, {"text": "b", "score": 1}]},
        "the score of answer 1 of 'completions' is 'high'",
    ),
    "too few scores": (
        {"prompt": "q", "completions": ["a", "b"], "scores": [1]},
        "one number for each of the 2 answers",
    ),
    "one answer": ({"prompt": "q", "responses": ["a"], "scores": [1]}, "at least 2 answers"),
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
    good: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    if "completions" in row or "responses" in row:
        good = {**row, next(iter(row.keys() - {"prompt", "scores"})): ["a", "b"], "scores": [1, 2]}
    elif isinstance(row["chosen"], str) and "prompt" not in row:
        good = {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"}
    elif "prompt" not in row:
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
