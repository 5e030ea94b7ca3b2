"""Programs: the answer's code is found, put together with the tests, and run in the sandbox.

HumanEval rows (arXiv:2107.03374) ask to complete a function, MBPP rows (arXiv:2108.07732) to write
one. A chat model answers with a fenced block of code, a base model goes on from the prompt.
"""

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from open_instruct.verifiers.sandbox import Limits, check_confinement, run_tests
from open_instruct.verifiers.verdict import BadProblem, Problem, Verdict, field

METRICS = ("pass_at_1", "pass_at_10")
# The paper's own runner allows 3 s of wall time; here the start of the sandbox is part of it.
LIMITS = Limits(timeout_s=5.0)
# Where a function that a base model completes has ended: at the next unindented line of this kind.
ENDS_OF_FUNCTION = re.compile(r"\n(?:(?:class|def|if|print|import|from|assert)\b|@|#|```)")
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that at least one of k answers passes (arXiv:2107.03374, eq. 1), unbiased.

    1 - C(n - c, k) / C(n, k), over all ways to choose k of the n answers.
    """
    if not 0 <= num_passed <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} answers, {num_passed} passed, is not defined")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


# ---------------------------------------------------------------- rows


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A row of HumanEval or of MBPP. Errors: BadProblem."""
    if "entry_point" in row:
        truth = {key: field(row, key) for key in ("prompt", "test", "entry_point")}
        return Problem(truth["prompt"], truth, "the tests pass", row.get("canonical_solution"))
    if "test_list" not in row:
        raise BadProblem(
            "found neither 'entry_point' (HumanEval) nor 'test_list' (MBPP); "
            f"it has {', '.join(map(repr, row))}."
        )
    tests = field(row, "test_list", list)
    text = field(row, "text" if "text" in row else "prompt")
    code = field(row, "code")
    shown = "\n".join(tests)
    prompt = f"{text}\nYour code should pass these tests:\n\n{shown}"
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    truth = {"test": f"{setup}\n{shown}", "names": _defined(code)}
    return Problem(prompt, truth, shown, code)


def _defined(code: str) -> list[str]:
    """Names of the functions and classes at the top of a program."""
    try:
        nodes = ast.parse(code).body
    except SyntaxError as error:
        raise BadProblem(f"'code' is no Python program ({error.msg}).") from None
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]


# ---------------------------------------------------------------- the program in an answer


def code_blocks(answer: str) -> list[str]:
    """The fenced blocks of an answer; one that was cut off counts."""
    return [block for block in _BLOCK.findall(answer) if block.strip()]


def complete_function(prompt: str, entry_point: str, answer: str) -> str:
    """The program that an answer to a HumanEval prompt stands for.

    A block, or a text, that defines the function itself is put after the prompt's helpers;
    anything else is what comes after the prompt.
    """
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    start = definition.search(prompt)
    helpers = prompt[: start.start()] if start else ""
    blocks = code_blocks(answer)
    defining = [block for block in blocks if definition.search(block)]
    if defining:
        return helpers + "\n" + defining[-1]
    if not blocks and definition.search(answer):
        return helpers + "\n" + answer
    body = blocks[0] if blocks else answer
    end = ENDS_OF_FUNCTION.search(body)
    return prompt + (body[: end.start()] if end else body)


def whole_program(answer: str, names: list[str]) -> str:
    """The program of an answer to a request in words: the block that defines what is asked for."""
    blocks = code_blocks(answer)
    for block in reversed(blocks):
        if any(re.search(rf"^(?:def|class) {re.escape(name)}\b", block, re.M) for name in names):
            return block
    return blocks[0] if blocks else answer.partition("[DONE]")[0]


def judge(answer: str, truth: Mapping[str, Any]) -> Verdict:
    """Whether the program passes its tests. Errors: UserError if there is no sandbox."""
    tests = truth["test"]
    if "entry_point" in truth:
        names = [truth["entry_point"]]
        program = complete_function(truth["prompt"], names[0], answer)
        tests = f"{tests}\n\ncheck({names[0]})\n"
    else:
        names = truth["names"]
        program = whole_program(answer, names)
    outcome = run_tests(program, tests, names=names, limits=LIMITS)
    return Verdict.of(outcome.problem or "passed", pass_at_1=outcome.passed)


def check_ready() -> None:
    """Errors: UserError where no sandbox can be built."""
    check_confinement()
