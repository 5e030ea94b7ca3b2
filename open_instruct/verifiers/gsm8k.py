"""Word problems whose answer is a number: GSM8K (arXiv:2110.14168) and sets written like it."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from open_instruct.verifiers.verdict import BadProblem, Problem, Verdict, field

# The last number of the text (as most harnesses report it), or the one announced as the answer.
METRICS = ("last_number", "marked_number")
MAX_DIGITS = 100
# 1,234.50 or .5 with its sign, which stands right before it or before its currency; in 5-3 and
# in "- 5" it is no sign. 1,23 is two numbers.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<sign>[-−]))?[$€£]?(?P<inner_sign>(?<=[$€£])[-−])?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:\s?/\s?(?P<divisor>\d+(?:\.\d+)?)(?!\s?/))?"
)
_MARK = re.compile(r"####|\\boxed\s*\{|\banswer\s*(?:is\b|:|=)", re.IGNORECASE)
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, exactly; $, €, thousands' commas and units around it do not count."""
    found = []
    for match in _NUMBER.finditer(text.replace("{,}", ",")):  # how LaTeX writes 1,000
        digits, divisor = match["digits"].replace(",", ""), match["divisor"] or "1"
        if len(digits) + len(divisor) > MAX_DIGITS:
            continue
        value = Fraction(digits)
        if Fraction(divisor) != 0:
            value /= Fraction(divisor)
        found.append(-value if match["sign"] or match["inner_sign"] else value)
    return found


def last_number(text: str) -> Fraction | None:
    """The number that a text ends with."""
    return next(reversed(numbers(text)), None)


def marked_number(text: str) -> Fraction | None:
    """The number after the last "####", "\\boxed{" or "the answer is"; of a sum, its result."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    after = text[marks[-1].end() :].lstrip(" :*$\t\n")
    line = after.partition("\n")[0].rpartition("=")[2]
    return next(iter(numbers(line)), None)


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A row {question, answer}, whose answer ends in "#### 18" or is the number.

    Errors: BadProblem. The calculator's annotations <<16-3=13>> are left out of the solution.
    """
    answer = str(row["answer"]) if isinstance(row.get("answer"), int) else field(row, "answer")
    solution, mark, shown = answer.rpartition("####")
    given = numbers(shown)
    if len(given) != 1:
        raise BadProblem(f"'answer' ends in {shown.strip()[-60:]!r}, needed one number.")
    worked = f"{_CALCULATOR.sub('', solution).strip()}\n#### {shown.strip()}" if mark else None
    return Problem(field(row, "question"), shown.strip(), shown.strip(), worked)


def judge(answer: str, truth: str) -> Verdict:
    """Whether the answer's number is the true one."""
    (right,) = numbers(truth)
    last, marked = last_number(answer), marked_number(answer)
    return Verdict.of(
        "no number" if last is None else str(last if marked is None else marked),
        last_number=last == right,
        marked_number=marked == right,
    )
