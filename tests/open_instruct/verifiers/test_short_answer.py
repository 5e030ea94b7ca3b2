"""Short answers, by hand and against lm-eval's own measure of DROP."""

import random

import pytest

from open_instruct.verifiers import VERIFIERS
from open_instruct.verifiers.short_answer import answer_f1, given_answer, judge, read_problem
from open_instruct.verifiers.verdict import BadProblem


@pytest.mark.parametrize(
    ("answer", "truth", "match", "contains", "f1"),
    [
        ("The Beatles.", [["beatles"]], 1, 1, 1.0),
        ("It was Paul, I think", [["Paul"]], 0, 1, 2 / 6),
        ("Think first.\nSo the answer is (B).", [["(B)"]], 1, 1, 1.0),
        ("the answer is no. Wait, the answer is: Yes", [["yes"]], 1, 1, 1.0),
        ("1,200", [["1200"]], 1, 1, 1.0),
        ("7 miles", [["8 miles"]], 0, 0, 0.0),  # another number: no credit for the unit
        ("Ann", [["Ann", "Bob"]], 0, 0, 0.5),  # one of two spans
        ("Bob", [["Ann"], ["Bob"]], 1, 1, 1.0),  # one of two accepted answers
        ("", [["x"]], 0, 0, 0.0),
        ("catalogue", [["cat"]], 0, 0, 0.0),  # words, not letters
    ],
)
def test_answers_are_judged_by_their_words(answer, truth, match, contains, f1):
    scores = judge(answer, truth).scores
    assert (scores["answer_match"], scores["answer_contains"]) == (match, contains)
    assert scores["answer_f1"] == pytest.approx(f1)


def test_f1_is_that_of_lm_evals_drop():
    utils = pytest.importorskip("lm_eval.tasks.drop.utils")
    chance = random.Random(5)
    words = "3 12 1,200 4.5 yards the red Wing-Man Smith's a (north) south. 3".split()
    seen = set()
    for _ in range(400):
        text = " ".join(chance.choices(words, k=chance.randrange(1, 5)))
        spans = [
            " ".join(chance.choices(words, k=chance.randrange(1, 4)))
            for _ in range(chance.choice([1, 1, 2]))
        ]
        if any(not utils._answer_to_bags(span)[1][0] for span in [text, *spans]):
            continue  # nothing but articles
        _, theirs = utils.get_metrics(text, spans)
        assert answer_f1(text, [spans]) == pytest.approx(theirs, abs=0.00501), (text, spans)
        seen.add(theirs)
    assert {0.0, 0.5, 1.0} <= seen and len(seen) > 8


@pytest.mark.parametrize(
    ("row", "prompt", "accepted"),
    [
        ({"question": "Who?", "possible_answers": '["A B", "C"]'}, "Who?", [["A B"], ["C"]]),
        (
            {"passage": "P.", "question": "Q?", "answers": ["x", ["y", "z"]]},
            "P.\nQ?",
            [["x"], ["y", "z"]],
        ),
        (
            {"passage": "P.", "question": "Q?", "answers_spans": {"spans": ["x"], "types": []}},
            "P.\nQ?",
            [["x"]],
        ),
        ({"input": "I", "target": "(B)", "task": "dates"}, "I", [["(B)"]]),
        ({"prompt": "Q", "answer": "yes"}, "Q", [["yes"]]),
    ],
)
def test_rows_of_public_sets_are_read_as_they_are(row, prompt, accepted):
    problem = read_problem(row)
    assert (problem.prompt, problem.truth) == (prompt, accepted)
    assert problem.category == row.get("task")
    assert (problem.cluster is not None) == ("passage" in row)


def test_questions_about_one_passage_share_their_cluster():
    rows = [("P.", "Q?"), ("P.", "R?"), ("O.", "Q?")]
    first, second, other = (
        read_problem({"passage": passage, "question": question, "answers": ["x"]}).cluster
        for passage, question in rows
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q", "possible_answers": "no list"}, "is no JSON list"),
        ({"question": "Q", "answer": []}, "'answer' holds"),
        ({"question": "Q", "answer": ["..."]}, "an accepted answer is"),
        ({"question": "Q"}, "the key 'answer' is missing"),
        ({"passage": "P", "question": "Q", "answers": [3]}, "an accepted answer is 3"),
    ],
)
def test_a_row_without_answers_is_refused(row, message):
    with pytest.raises(BadProblem, match=message):
        read_problem(row)


def test_the_verifier_can_be_named_by_a_task():
    assert VERIFIERS["short_answer"].metrics[0] == "answer_match"
    assert given_answer("  plain  ") == "plain"
