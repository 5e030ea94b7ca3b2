"""Numbers in answers to word problems."""

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest

from open_instruct.verifiers.gsm8k import judge, last_number, marked_number, numbers, read_problem
from open_instruct.verifiers.verdict import BadProblem

VERIFIABLE = Path(__file__).parents[4] / "shared" / "data" / "verifiable"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("18", [18]),
        ("$1,234.50 a day", [Fraction("1234.5")]),
        ("18.00", [18]),
        ("It is 18.", [18]),
        ("1,234,567", [1234567]),
        ("1,2 and 3", [1, 2, 3]),
        ("1,2345", [1, 2345]),
        (".5 or 0.50", [Fraction(1, 2), Fraction(1, 2)]),
        ("a loss of -$5, or $-5, or −5", [-5, -5, -5]),
        ("5-3, 5 - 3 and (2)-1", [5, 3, 5, 3, 2, 1]),
        ("- 5 apples", [5]),
        ("3/4 of 1 / 2", [Fraction(3, 4), Fraction(1, 2)]),
        ("7/0", [7]),
        ("25% of 80km", [25, 80]),
        ("**42**", [42]),
        ("no number", []),
        ("9" * 5000, []),
    ],
)
def test_numbers_are_read_exactly(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("3 + 4 = 7\n#### 7", 7, 7),
        ("#### 1,000 dollars", 1000, 1000),
        ("#### 7\nQuestion: what is 9?", 7, 9),
        ("The answer is $18.", 18, 18),
        ("The answer is 16 - 3 - 4 = 9 eggs.", 9, 9),
        ("So the final answer is: **-12**", -12, -12),
        ("Answer: \\boxed{56} km", 56, 56),
        ("$\\boxed{1{,}000}$ hm", 1000, 1000),
        ("The answer is 3. No, the answer is 4 (not 5).", 4, 5),
        ("16 - 3 - 4 = 9", None, 9),
        ("I do not know", None, None),
        ("the answer is unknown", None, None),
    ],
)
def test_the_marked_and_the_last_number(text, marked, last):
    assert marked_number(text) == marked
    assert last_number(text) == last


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("#### 18", (1, 1)),
        ("so she makes $18.00 every day", (1, 0)),
        ("#### 18 out of 20", (0, 1)),
        ("#### 17", (0, 0)),
        ("", (0, 0)),
        ("-18", (0, 0)),
    ],
)
def test_strict_and_flexible_scores(answer, scores):
    verdict = judge(answer, "18")
    assert (verdict.scores["last_number"], verdict.scores["marked_number"]) == scores


def test_a_row_becomes_a_problem_without_the_calculators_marks():
    row = {"question": "How many?", "answer": "16 - 3 = <<16-3=13>>13\nmore\n#### 1,300"}
    problem = read_problem(row)
    assert problem.truth == "1,300"
    assert problem.solution == "16 - 3 = 13\nmore\n#### 1,300"
    assert judge(problem.solution, problem.truth).scores == {"last_number": 1, "marked_number": 1}
    assert read_problem({"question": "?", "answer": 18}).truth == "18"
    with pytest.raises(BadProblem, match="needed one number"):
        read_problem({"question": "?", "answer": "many"})
    with pytest.raises(BadProblem, match="'question' is missing"):
        read_problem({"answer": "#### 3"})


def test_every_solution_of_the_data_set_is_right_by_its_own_measure():
    if not VERIFIABLE.is_dir():
        pytest.skip("the shared data is not here")
    for part, size in (("test", 1319), ("train", 7473)):
        with gzip.open(VERIFIABLE / f"gsm8k_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        assert len(rows) == size
        for row in rows:
            problem = read_problem(row)
            assert problem.solution is not None
            verdict = judge(problem.solution, problem.truth)
            assert set(verdict.scores.values()) == {1.0}, row
