"""Programs found in answers, pass@k, and the reference solutions of HumanEval."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from olmo_base.run.errors import UserError
from open_instruct.verifiers.code import (
    code_blocks,
    complete_function,
    judge,
    pass_at_k,
    read_problem,
    whole_program,
)
from open_instruct.verifiers.sandbox import check_confinement
from open_instruct.verifiers.verdict import BadProblem

HUMANEVAL = Path(__file__).parents[4] / "shared" / "data" / "verifiable" / "humaneval.jsonl.gz"
ROW = {
    "task_id": "Test/0",
    "prompt": 'import math\n\ndef helper(x):\n    return x\n\ndef add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == helper(3)\n",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to add two numbers.",
    "code": "def sum(a, b):\r\n  return a + b",
    "test_list": ["assert sum(1, 2) == 3", "assert sum(-1, 1) == 0"],
    "test_setup_code": "",
}


@pytest.fixture(scope="module")
def _sandbox():
    try:
        check_confinement()
    except UserError as error:
        pytest.skip(str(error))


def passes(answer: str, row: dict) -> bool:
    return judge(answer, read_problem(row).truth).scores["pass_at_1"] == 1.0


# ---------------------------------------------------------------- pass@k


def test_pass_at_k_equals_the_average_over_all_choices():
    passed = [True, True, False, False, False]
    for k in range(1, 6):
        chosen = list(itertools.combinations(passed, k))
        share = sum(any(choice) for choice in chosen) / len(chosen)
        assert pass_at_k(5, 2, k) == pytest.approx(share)


def test_pass_at_k_of_all_and_none():
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(10, 10, 1) == 1.0
    assert pass_at_k(200, 100, 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(5, 1, 6)


# ---------------------------------------------------------------- finding the program


def test_blocks_of_code_are_found_with_and_without_their_end():
    assert code_blocks("So:\n```python\nx = 1\n```\nand\n```\ny = 2\n```") == ["x = 1\n", "y = 2\n"]
    assert code_blocks("```py\nx = 1\ny = 2") == ["x = 1\ny = 2"]
    assert code_blocks("no code") == []


def test_a_completion_ends_where_the_function_does():
    answer = "    return a + b\n\n\ndef other():\n    pass\n"
    assert complete_function("def add(a, b):\n", "add", answer) == (
        "def add(a, b):\n    return a + b\n\n"
    )
    commented = "    # add them\n    return a + b\n# done\nprint(add(1, 2))"
    assert complete_function("", "add", commented) == "    # add them\n    return a + b"


def test_a_whole_function_in_a_block_keeps_the_helpers_of_the_prompt():
    answer = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nAs in:\n```\nadd(1, 2)\n```"
    program = complete_function(ROW["prompt"], "add", answer)
    assert program.startswith("import math\n\ndef helper")
    assert program.endswith("def add(a, b):\n    return a + b\n")
    assert '"""Add."""' not in program


def test_the_block_that_defines_what_is_asked_for_is_taken():
    answer = "```\nx = 1\n```\n```python\ndef sum(a, b): return a + b\n```\n```\nsum(1, 2)\n```"
    assert whole_program(answer, ["sum"]) == "def sum(a, b): return a + b\n"
    assert whole_program("def sum(a, b): return 1\n[DONE]\nmore", ["sum"]).endswith("1\n")


# ---------------------------------------------------------------- running it


@pytest.mark.usefixtures("_sandbox")
@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("    return a + b\n", True),
        ("    return a + b\nprint(1/0)\n", True),
        ("```python\ndef add(a, b):\n    return a + b\n```", True),
        ("def add(a, b):\n    return a + b\n", True),
        ("```python\n    return a + b\n```", True),
        ("    return a - b\n", False),
        ("I do not know.", False),
        ("", False),
        ("    import sys; sys.exit(0)\n", False),
    ],
)
def test_an_answer_to_humaneval_passes_if_it_is_right(answer, is_right):
    assert passes(answer, ROW) == is_right


@pytest.mark.usefixtures("_sandbox")
def test_an_answer_to_mbpp_may_be_named_like_a_builtin():
    assert passes("```python\ndef sum(a, b):\n    return a + b\n```", MBPP)
    assert passes(MBPP["code"], MBPP)  # type: ignore[arg-type]
    assert not passes("```python\ndef add(a, b):\n    return a + b\n```", MBPP)
    verdict = judge("def sum(a, b): return 3", read_problem(MBPP).truth)
    assert verdict.found.startswith("AssertionError")


@pytest.mark.usefixtures("_sandbox")
def test_reference_solutions_of_humaneval_pass_and_empty_ones_fail():
    if not HUMANEVAL.is_file():
        pytest.skip("the shared data is not here")
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    for row in rows[::8]:
        block = f"```python\n{row['prompt']}{row['canonical_solution']}```"
        assert passes(row["canonical_solution"], row), row["task_id"]
        assert passes(block, row), row["task_id"]
        assert not passes("    pass\n", row), row["task_id"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "x"}, "neither 'entry_point'.*nor 'test_list'"),
        (ROW | {"test": 3}, "'test' holds 3, needed text"),
        (MBPP | {"code": "def ("}, "'code' is no Python program"),
        (MBPP | {"test_list": []}, "'test_list' holds .*, needed a list"),
    ],
)
def test_a_row_of_another_kind_is_refused(row, problem):
    with pytest.raises(BadProblem, match=problem):
        read_problem(row)
