"""Rows of every kind of task, and messages that name the file and line of a broken one."""

import gzip
import json

import pytest

from eval.items import Choice, Document
from eval.questions import data_file, read_items
from eval.tasks import Task
from olmo_base.run.errors import DataError, UserError


def items(tmp_path, kind, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_items(Task("t", kind, str(path)), path, **options)


def test_a_prompt_is_a_dialogue_of_one_turn(tmp_path):
    rows = [
        {"prompt": "2+2?", "answer": "4", "category": "sums", "cluster": "page 7"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "2+3?"},
            ],
            "answer": ["5", "five"],
        },
    ]
    first, second = items(tmp_path, "exact_match", rows)
    assert first.messages == ({"role": "user", "content": "2+2?"},)
    assert (first.doc_id, first.targets, first.category) == ("0", ("4",), "sums")
    assert first.cluster == "page 7"
    assert [turn["role"] for turn in second.messages] == ["system", "user"]
    assert second.targets == ("5", "five")


def test_options_follow_the_question_after_a_blank(tmp_path):
    (choice,) = items(
        tmp_path, "multiple_choice", [{"question": "Sky?", "options": ["red", "blue"], "gold": 1}]
    )
    assert choice == Choice(
        "0", "Sky?", ("Question: Sky?\nAnswer:",) * 2, (" red", " blue"), gold=1
    )


def request(doc_id, idx, label, context, continuation):
    return {
        "doc_id": doc_id,
        "idx": idx,
        "label": label,
        "request": {"context": context, "continuation": continuation},
    }


def test_requests_become_one_question_with_its_unconditional_copy(tmp_path):
    context = "Question: 1+1?\nAnswer: 2\n\nQuestion: Sky?\nAnswer:"
    rows = [
        request(7, 1, 1, context, " blue"),  # the order of the rows does not matter
        request(7, 0, 1, context, " red"),
        request(1_000_007, 0, 1, "Answer:", " red"),
        request(1_000_007, 1, 1, "Answer:", " blue"),
    ]
    (choice,) = items(tmp_path, "requests", rows)
    assert choice == Choice(
        "7", "Sky?", (context,) * 2, (" red", " blue"), 1, unconditional_contexts=("Answer:",) * 2
    )


def test_limit_draws_with_the_seed_and_keeps_the_order(tmp_path):
    rows = [{"prompt": str(number), "answer": "x"} for number in range(100)]
    drawn = [item.doc_id for item in items(tmp_path, "exact_match", rows, limit=10, seed=1)]
    again = [item.doc_id for item in items(tmp_path, "exact_match", rows, limit=10, seed=1)]
    other = [item.doc_id for item in items(tmp_path, "exact_match", rows, limit=10, seed=2)]
    assert drawn == again == sorted(drawn, key=int)
    assert drawn != other
    assert drawn != [str(number) for number in range(10)]
    assert len(items(tmp_path, "exact_match", rows, limit=1000)) == 100


def test_documents_are_read_from_gzipped_lines(tmp_path):
    path = tmp_path / "text.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "Once."}) + "\n" + json.dumps({"text": "Twice."}) + "\n")
    found = read_items(Task("t", "perplexity", str(path)), path)
    assert found == [Document("0", "Once."), Document("1", "Twice.")]


GOOD_QUESTION = {"prompt": "2+2?", "answer": "4"}


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        ("exact_match", {"answer": "4"}, "the key 'prompt' is missing; found 'answer'"),
        ("exact_match", {"prompt": "2+2?"}, "the key 'answer' is missing"),
        ("exact_match", {"prompt": 4, "answer": "4"}, "'prompt' holds 4"),
        ("exact_match", {"prompt": " ", "answer": "4"}, "the question is empty"),
        ("exact_match", {"prompt": "2?", "answer": []}, "'answer' holds \\[\\]"),
        ("exact_match", {"prompt": "2?", "answer": " "}, "accepted answer is empty"),
        ("exact_match", {"prompt": "\ud83d", "answer": "a"}, "half a surrogate pair"),
        ("exact_match", {"messages": [], "answer": "4"}, "last message is not the user's"),
        (
            "exact_match",
            {"messages": [{"role": "robot", "content": "x"}], "answer": "4"},
            "'messages' holds .*robot",
        ),
        ("exact_match", [1, 2], "found \\[1, 2\\], needed an object"),
        ("multiple_choice", {"question": "?", "options": ["a"], "gold": 0}, "at least 2"),
        ("multiple_choice", {"question": "?", "options": ["a", "a"], "gold": 0}, "are the same"),
        ("multiple_choice", {"question": "?", "options": ["a", ""], "gold": 0}, "is empty"),
        ("multiple_choice", {"question": "?", "options": ["a", "b"], "gold": 2}, "0 to 1"),
        ("multiple_choice", {"question": "?", "options": ["a", "b"], "gold": True}, "holds true"),
        ("requests", {"doc_id": 0, "idx": 0, "label": 0}, "the key 'request' is missing"),
        ("requests", request(0, 0, 0, "a", ""), "continuation is empty"),
        ("requests", request(0, 1, 0, "a", " b"), "question 0 has the options \\[1\\]"),
        ("requests", request(0, 0, 3, "a", " b"), "question 0 has the label \\[3\\]"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, kind, row, problem):
    good = {
        "exact_match": GOOD_QUESTION,
        "multiple_choice": {"question": "?", "options": ["a", "b"], "gold": 0},
        "requests": request(50, 0, 0, "a", " b"),
    }[kind]
    with pytest.raises(DataError, match=f"rows.jsonl, line 2: .*{problem}"):
        items(tmp_path, kind, [good, row])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": ', "line 2: broken JSON"),
        (b'{"prompt": "a\xff", "answer": "b"}', "line 1: not UTF-8"),
        (b"", "this file is empty"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, problem):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_items(Task("t", "exact_match", str(path)), path)


def test_a_missing_data_file_says_what_is_there_instead(tmp_path):
    task = Task("sort", "exact_match", "eval_sort.jsonl")
    (tmp_path / "eval_recall.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"eval_sort.jsonl does not exist.*holds eval_recall.jsonl"):
        data_file(task, str(tmp_path))
    with pytest.raises(UserError, match="Say which folder with data_dir"):
        data_file(task, None)
    with pytest.raises(UserError, match="no-such is not a folder"):
        data_file(task, str(tmp_path / "no-such"))
