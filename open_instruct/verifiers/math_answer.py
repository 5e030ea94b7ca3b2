"""Answers in LaTeX, as in MATH (arXiv:2103.03874): found, read, and compared by value.

text -> the boxed or announced answer -> its parts (tuples, intervals, sets) -> expressions ->
values (latex_value.py). Nothing of a text is ever executed, and both length and size of numbers
are bounded, so every comparison ends at once. What is longer than can be read is compared as text.
"""

import re
from collections.abc import Mapping
from typing import Any

from open_instruct.verifiers.latex_value import (
    MAX_CHARACTERS,
    POINTS,
    TOLERANCE,
    Unreadable,
    is_close,
    names_in,
    parse,
    same_value,
    value_of,
    variables_at,
)
from open_instruct.verifiers.verdict import BadProblem, Problem, Verdict, field

# Any answer that can be found in the text, or only one that is boxed or announced.
METRICS = ("flexible_match", "strict_match")
MAX_TEXT = 20_000  # characters of a text in which an answer is looked for


# ---------------------------------------------------------------- finding the answer


def closing_braces(text: str) -> dict[int, int]:
    """Where each brace that opens, closes; \\{ and \\} are characters and not braces."""
    open_places: list[int] = []
    found: dict[int, int] = {}
    for match in re.finditer(r"\\[{}\\]|[{}]", text):
        if match[0] == "{":
            open_places.append(match.start())
        elif match[0] == "}" and open_places:
            found[open_places.pop()] = match.start()
    return found


_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")
_ANNOUNCED = re.compile(r"\banswer\s*(?:is\b|:)\s*:?", re.IGNORECASE)
_IN_DOLLARS = re.compile(  # $5$, $$5$$, \(5\) and \[5\]
    r"\$\$?([^$]+)\$\$?|\\\(((?:[^\\]|\\(?!\())+?)\\\)|\\\[((?:[^\\]|\\(?!\[))+?)\\\]"
)


def boxed_answer(text: str) -> str | None:
    """The content of the last \\boxed{...} (or \\fbox, or "\\boxed 5") that closes."""
    closing = closing_braces(text)
    for match in reversed(list(_BOXED.finditer(text))):
        content: str | None
        if match["brace"]:
            end = closing.get(match.end() - 1)
            content = None if end is None else text[match.end() : end]
        else:
            content = re.split(r"[$\n]|\.\s", text[match.end() :], maxsplit=1)[0]
        if content is not None and content.strip():
            return content.strip()
    return None


def announced_answer(text: str) -> str | None:
    """What follows the last "the answer is", up to the sentence's end (arXiv:2206.14858, D)."""
    matches = list(_ANNOUNCED.finditer(text))
    if not matches:
        return None
    line = text[matches[-1].end() :].lstrip("*: \t\n").partition("\n")[0]
    said = line.partition("I hope it is correct")[0].strip()
    if inside := _IN_DOLLARS.match(said):
        return next(group for group in inside.groups() if group).strip()
    said = re.split(r"(?<=[^\d])\.\s|\.\s+(?=[A-Z])", said, maxsplit=1)[0]
    return said.strip().rstrip(".").strip("*").strip() or None


def marked_answer(text: str) -> str | None:
    """The boxed answer, or else the announced one."""
    return boxed_answer(text) or announced_answer(text)


def any_answer(text: str) -> str | None:
    """The marked answer, or else the last formula, or else the last number."""
    if marked := marked_answer(text):
        return marked
    if formulas := list(_IN_DOLLARS.finditer(text)):
        return next(group for group in formulas[-1].groups() if group).strip()
    found = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?%?", text)
    return found[-1] if found else None


# ---------------------------------------------------------------- one way to write things

_REPLACED = (
    (r"(?<!\\)\\(?:left|right|[bB]igg?|displaystyle|limits|q?quad)(?![A-Za-z])", " "),
    (r"(?<!\\)\\!", ""),  # 10,\!000
    (r"(?<!\\)\\[,;: ]", " "),
    (r"(?<=\d)\s*\{,\}\s*(?=\d{3})", ""),  # 10{,}000
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\mbox|\\textbf|\\textit|\\textrm|\\mathrm|\\mathbf|\\mathit|\\operatorname", r"\\text"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\circ|°|\\degree", ""),
    (r"\\(?:lbrace|\{)", r"\\{"),
    (r"\\(?:rbrace|\})", r"\\}"),
    (r"\\leq?(?![a-z])|≤", "<="),
    (r"\\geq?(?![a-z])|≥", ">="),
    (r"\\(?:neq|ne)(?![a-z])", "!="),
    (r"\\(?:times|cdot|ast)(?![a-z])|×|·", "*"),
    (r"\\div(?![a-z])|÷", "/"),
    (r"−|–", "-"),
    (r"\\infin(?:ty)?|∞", r"\\infty"),
    (r"π", r"\\pi"),
    (r"√", r"\\sqrt"),
    (r"\\%", "%"),
    (r"\\\$|\$|~", " "),
)
# Words after a value that say what it counts. Single letters are left: they are variables.
_UNIT = re.compile(
    r"\\text\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\s*[23]\s*\}|[23]))?$"
    r"|(?<![A-Za-z\\])(?:square|cubic)?\s*(?:degrees?|units?|dollars?|cents?|mph|km|cm|mm|ft|feet"
    r"|foot|inch(?:es)?|hours?|minutes?|seconds?|days?|years?|meters?|miles?|pounds?|grams?|kg"
    r"|points?|ways?|percent|students?|people|apples?|integers?|digits?)"
    r"(?:\s*\^\s*(?:\{\s*[23]\s*\}|[23]))?$"
)


def normalised(answer: str) -> str:
    """The same answer without spacing, sizes, units, degrees and the names of commands' twins."""
    text = answer.strip().strip("*").strip()
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text)
    text = text.strip().rstrip(".,;:").strip()
    while (shorter := _UNIT.sub("", text).strip()) not in (text, ""):
        text = shorter
    text = re.sub(r"^[A-Za-z]\s*\\in(?![a-z])\s*", "", text)  # x \in [1,2]
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\b(?:and|or)\b", ",", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;:").strip()
    text = re.sub(r",\s*,", ",", text)
    if re.fullmatch(r"[-+]?\s?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?", text):
        text = text.replace(",", "")
    return text


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}]", "", text).casefold()


# ---------------------------------------------------------------- comparing answers

_OPENING, _CLOSING = "([{", ")]}"


def split_top(text: str, separator: str) -> list[str]:
    """Parts of a text at the separators that stand in no brackets."""
    depth, parts, start, place = 0, [], 0, 0
    while place < len(text):
        if text[place] in _OPENING:
            depth += 1
        elif text[place] in _CLOSING:
            depth -= 1
        elif depth == 0 and text.startswith(separator, place):
            parts.append(text[start:place])
            place += len(separator)
            start = place
            continue
        place += 1
    return [part.strip() for part in [*parts, text[start:]]]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content, closing bracket, if one pair holds the whole text."""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if not (text.startswith(opening) and text.endswith(closing)):
            continue
        content = text[len(opening) : len(text) - len(closing)]
        depth = 0
        for character in content:
            depth += (character in _OPENING) - (character in _CLOSING)
            if depth < 0:
                break
        else:
            if depth == 0:
                return opening, content, closing
    return None


def is_equivalent(answer: str, truth: str) -> bool:
    """Whether two answers in LaTeX mean the same."""
    if len(answer) > MAX_CHARACTERS:
        return _squeezed(answer) == _squeezed(truth)
    return _is_same(normalised(answer), normalised(truth), 0)


def _is_same(answer: str, truth: str, depth: int) -> bool:
    if _squeezed(answer) == _squeezed(truth):
        return bool(_squeezed(truth))
    if depth > 5 or len(answer) > MAX_CHARACTERS or not answer or not truth:
        return False
    if "\\pm" in answer + truth:
        one, other = _both_signs(answer), _both_signs(truth)
        return "\\pm" not in one + other and _is_same(one, other, depth + 1)
    for separator, is_ordered in (("\\cup", False), (",", None)):
        ours, theirs = split_top(answer, separator), split_top(truth, separator)
        if len(ours) > 1 or len(theirs) > 1:
            return _are_same(ours, theirs, bool(is_ordered), depth)
    enclosed, expected = _enclosed(answer), _enclosed(truth)
    if expected is not None and len(split_top(expected[1], ",")) > 1:
        if enclosed is None or (enclosed[0], enclosed[2]) != (expected[0], expected[2]):
            return False
        is_set = expected[0] == "\\{"
        return _are_same(
            split_top(enclosed[1], ","), split_top(expected[1], ","), not is_set, depth
        )
    if "\\{" in (pair[0] for pair in (enclosed, expected) if pair):  # a set of one
        inner = [
            pair[1] if pair and pair[0] == "\\{" else text
            for pair, text in ((enclosed, answer), (expected, truth))
        ]
        return _is_same(inner[0], inner[1], depth + 1)
    if "\\begin" in answer + truth:
        return _are_same_matrices(answer, truth, depth)
    return _is_same_relation(answer, truth)


def _both_signs(text: str) -> str:
    """a ± b as a + b, a - b."""
    if text.count("\\pm") != 1 or len(split_top(text, ",")) > 1:
        return text
    value = text.rpartition("=")[2]
    return value.replace("\\pm", "+") + "," + value.replace("\\pm", "-")


def _are_same(ours: list[str], theirs: list[str], is_ordered: bool, depth: int) -> bool:
    if len(ours) != len(theirs) or len(ours) > 50:
        return False
    if is_ordered:
        return all(_is_same(a, b, depth + 1) for a, b in zip(ours, theirs, strict=True))
    left = list(theirs)
    for item in ours:
        match = next((other for other in left if _is_same(item, other, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


_MATRIX = re.compile(r"^\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.S)


def _are_same_matrices(answer: str, truth: str, depth: int) -> bool:
    found = [_MATRIX.match(text) for text in (answer, truth)]
    if found[0] is None or found[1] is None:
        return False
    ours, theirs = (
        [
            [cell.strip() for cell in line.split("&")]
            for line in match[2].strip().split("\\\\")
            if line.strip()
        ]
        for match in found
        if match is not None
    )
    return [len(row) for row in ours] == [len(row) for row in theirs] and all(
        _is_same(a, b, depth + 1)
        for row, other in zip(ours, theirs, strict=True)
        for a, b in zip(row, other, strict=True)
    )


_RELATION = re.compile(r"<=|>=|!=|[<>=]")
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _is_same_relation(answer: str, truth: str) -> bool:
    ours, theirs = _RELATION.findall(answer), _RELATION.findall(truth)
    sides = [_RELATION.split(text) for text in (answer, truth)]
    try:
        if not ours and not theirs:
            return _is_same_quantity(answer, truth)
        if len(ours) <= 1 and len(theirs) <= 1 and (not ours or not theirs):
            # x = 5 against 5: only the value was asked for
            (relation,), index = (ours, 0) if ours else (theirs, 1)
            if relation != "=" or not _is_variable(sides[index][0]):
                return False
            values = [sides[0][-1].strip(), sides[1][-1].strip()]
            return _is_same(values[0], values[1], 5)
        if len(ours) != len(theirs):
            return False
        if ours == theirs and all(map(_same_or_unreadable, *sides)):
            return True
        mirrored = [_MIRRORED[sign] for sign in reversed(ours)]
        if mirrored == theirs and all(map(_same_or_unreadable, reversed(sides[0]), sides[1])):
            return True
        return ours == theirs == ["="] and _is_same_equation(sides[0], sides[1])
    except Unreadable:
        return False


def _same_or_unreadable(left: str, right: str) -> bool:
    try:
        return same_value(left, right)
    except Unreadable:
        return _squeezed(left) == _squeezed(right)


def _is_variable(text: str) -> bool:
    try:
        node = parse(text)
    except Unreadable:
        return re.fullmatch(r"\s*[A-Za-z]\s*(?:\([a-z, ]*\))?\s*", text) is not None
    is_call = node.kind == "*" and all(part.kind == "name" for part in node.parts)  # f(x)
    return node.kind == "name" or is_call


def _is_same_quantity(answer: str, truth: str) -> bool:
    """Two values; 50 % may be written as 50, as 50% and as 0.5."""
    if "%" not in answer + truth:
        return same_value(answer, truth)
    plain = [text.replace("%", "") for text in (answer, truth)]
    if same_value(plain[0], plain[1]):
        return True
    return ("%" in answer) != ("%" in truth) and same_value(answer, truth)


def _is_same_equation(ours: list[str], theirs: list[str]) -> bool:
    """Whether two equations say the same: their differences are multiples of each other."""
    first = parse(f"({ours[0]})-({ours[1]})")
    second = parse(f"({theirs[0]})-({theirs[1]})")
    names = sorted(names_in(first) | names_in(second))
    if not names or names_in(first) != names_in(second):
        return False
    factors = []
    for point in POINTS:
        variables = variables_at(point, names)
        above, below = (complex(value_of(node, variables)) for node in (first, second))
        if abs(above) < TOLERANCE or abs(below) < TOLERANCE:
            return False
        factors.append(above / below)
    return all(is_close(factor, factors[0]) for factor in factors)


# ---------------------------------------------------------------- rows and verdicts


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A row {problem, solution} with a boxed answer, or {problem, answer}. Errors: BadProblem."""
    prompt = field(row, "problem" if "problem" in row else "question")
    solution = row.get("solution")
    truth = str(row["answer"]) if "answer" in row else boxed_answer(field(row, "solution"))
    if not truth or not truth.strip():
        raise BadProblem("'solution' boxes no answer, and there is no 'answer'.")
    category = row.get("type") or row.get("subject")
    return Problem(prompt, truth, truth, solution, category if isinstance(category, str) else None)


def judge(answer: str, truth: str) -> Verdict:
    """Whether the answer found in a text, at its end if it is very long, is the true one."""
    end = answer[-MAX_TEXT:]
    marked, found = marked_answer(end), any_answer(end)
    return Verdict.of(
        "no answer" if found is None else found[:200],
        flexible_match=found is not None and is_equivalent(found, truth),
        strict_match=marked is not None and is_equivalent(marked, truth),
    )
