"""Answers in LaTeX, as in MATH (arXiv:2103.03874): found, read, and compared by value.

text -> the boxed or announced answer -> its parts (tuples, intervals, sets) -> expressions ->
values. An expression is read by the small parser below, which knows arithmetic and nothing else,
and evaluated: exactly while it is rational, otherwise as complex numbers. Nothing of a text is
ever executed, and both length and size of numbers are bounded, so every comparison ends at once.
"""

import cmath
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from open_instruct.verifiers.verdict import BadProblem, Problem, Verdict, field

# Any answer that can be found in the text, or only one that is boxed or announced.
METRICS = ("flexible_match", "strict_match")
MAX_CHARACTERS = 1000  # of an answer whose value is computed; longer ones are compared as text
MAX_BITS = 20_000  # of a whole number
MAX_TEXT = 20_000  # characters of a text in which an answer is looked for
MAX_TOKENS = 200
MAX_DEPTH = 60
TOLERANCE = 1e-9
Value = Fraction | complex


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


# ---------------------------------------------------------------- reading an expression


class Unreadable(Exception):
    """A text that is no expression of the kinds known here, or one too large to evaluate."""


@dataclass(frozen=True)
class Node:
    """An operation on other nodes, or a leaf: ("number", value) or ("name", text)."""

    kind: str
    parts: tuple["Node", ...] = ()
    value: Fraction | None = None
    name: str = ""


_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|\\([A-Za-z]+)|([A-Za-z]+)|(\S))")
FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "exp": cmath.exp,
}
CLOSING_COMMANDS = ("rvert", "cup", "pm", "in")
GREEK = frozenset(
    "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega chi psi "
    "zeta eta kappa xi".split()
)


class _Parser:
    """Recursive descent: sum, product (also without a sign), power, atom."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        for number, command, letters, sign in _TOKEN.findall(text):
            if number:
                self.tokens.append(("number", number))
            elif command:
                self.tokens.append(("command", command))
            elif letters in FUNCTIONS or letters in ("sqrt", "pi", "log"):
                self.tokens.append(("command", letters))
            elif letters:
                if len(letters) > 3:
                    raise Unreadable(f"the word {letters}")
                self.tokens += [("name", letter) for letter in letters]
            elif sign:
                self.tokens.append(("sign", sign))
        if len(self.tokens) > MAX_TOKENS:
            raise Unreadable("too long")
        self.place = 0
        self.depth = 0
        self.is_in_bars = False

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.place += 1
        return token

    def takes(self, sign: str) -> bool:
        if self.peek() == ("sign", sign):
            self.place += 1
            return True
        return False

    def need(self, sign: str) -> None:
        if not self.takes(sign):
            raise Unreadable(f"no {sign!r} where it was expected")

    def whole(self) -> Node:
        node = self.sum()
        if self.peek()[0] != "end":
            raise Unreadable(f"{self.peek()[1]!r} at the end")
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = self.product()
        while self.peek() in (("sign", "+"), ("sign", "-")):
            kind = "+" if self.take()[1] == "+" else "-"
            node = Node(kind, (node, self.product()))
        self.depth -= 1
        return node

    def product(self) -> Node:
        if self.takes("-"):
            return Node("negative", (self.product(),))
        self.takes("+")
        node = self.power()
        while True:
            if self.takes("*"):
                node = Node("*", (node, self.signed_power()))
            elif self.takes("/"):
                node = Node("/", (node, self.signed_power()))
            elif self.starts_factor():
                is_fraction = self.peek() == ("command", "frac")
                factor = self.power()
                if is_fraction and _is_whole(node) and _is_proper(factor):
                    node = Node("+", (node, factor))  # a mixed number: 1\frac{1}{2}
                else:
                    node = Node("*", (node, factor))
            else:
                return node

    def signed_power(self) -> Node:
        return Node("negative", (self.power(),)) if self.takes("-") else self.power()

    def starts_factor(self) -> bool:
        kind, text = self.peek()
        if kind == "sign":
            return text in "({[" or (text == "|" and not self.is_in_bars)
        return kind in ("number", "name") or (kind == "command" and text not in CLOSING_COMMANDS)

    def power(self) -> Node:
        node = self.atom()
        while self.peek()[0] == "sign" and self.peek()[1] in "^!%":
            sign = self.take()[1]
            if sign == "^":
                node = Node("^", (node, self.script()))
            elif sign == "!":
                node = Node("!", (node,))
            else:
                node = Node("/", (node, Node("number", value=Fraction(100))))
        return node

    def script(self) -> Node:
        """What ^ and the shorthand of \\frac and \\sqrt take: a group, or one digit or atom."""
        if self.takes("{"):
            return self.closed("}")
        if self.takes("-"):
            return Node("negative", (self.script(),))
        kind, text = self.peek()
        if kind == "number" and "." not in text and len(text) > 1:
            self.tokens[self.place : self.place + 1] = [("number", text[0]), ("number", text[1:])]
        return self.atom()

    def closed(self, sign: str) -> Node:
        node = self.sum()
        self.need(sign)
        return node

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = self._atom()
        self.depth -= 1
        return node

    def _atom(self) -> Node:
        kind, text = self.take()
        if kind == "number":
            if len(text) > MAX_BITS // 4:
                raise Unreadable("a number too long")
            return Node("number", value=Fraction(text))
        if kind == "name":
            if text == "i":
                return Node("i")
            if text == "e":
                return Node("e")
            return Node("name", name=text + self.subscript())
        if kind == "sign":
            closing = {"(": ")", "{": "}", "[": "]"}.get(text)
            if closing:
                return self.closed(closing)
            if text == "|" and not self.is_in_bars:
                self.is_in_bars = True
                node = Node("abs", (self.closed("|"),))
                self.is_in_bars = False
                return node
        if kind == "command":
            return self.command(text)
        raise Unreadable(f"{text!r} where a value was expected")

    def subscript(self) -> str:
        if not self.takes("_"):
            return ""
        if self.takes("{"):
            inside = ""
            while not self.takes("}"):
                kind, text = self.take()
                if kind not in ("number", "name"):
                    raise Unreadable("an unusual subscript")
                inside += text
            return "_" + inside
        return "_" + self.take()[1]

    def command(self, text: str) -> Node:
        if text == "frac":
            return Node("/", (self.script(), self.script()))
        if text == "sqrt":
            index = self.closed("]") if self.takes("[") else Node("number", value=Fraction(2))
            return Node("root", (self.script(), index))
        if text == "binom":
            return Node("binom", (self.script(), self.script()))
        if text == "log":
            base = None
            if self.takes("_"):
                base = self.script()
            argument = self.argument()
            parts = (argument,) if base is None else (argument, base)
            return Node("log", parts)
        if text in FUNCTIONS:
            exponent = self.script() if self.takes("^") else None
            node = Node("function", (self.argument(),), name=text)
            if exponent is None:
                return node
            if exponent == Node("negative", (Node("number", value=Fraction(1)),)):
                raise Unreadable("an inverse function")
            return Node("^", (node, exponent))
        if text == "pi":
            return Node("pi")
        if text == "infty":
            return Node("name", name="\\infty")
        if text in GREEK:
            return Node("name", name="\\" + text + self.subscript())
        if text == "lvert":
            node = self.sum()
            if self.take() != ("command", "rvert"):
                raise Unreadable("an open |")
            return Node("abs", (node,))
        raise Unreadable(f"the command \\{text}")

    def argument(self) -> Node:
        """Of a function: a group, or everything that is multiplied without a sign (sin 2x)."""
        kind, text = self.peek()
        if kind == "sign" and text in "({[":
            return self.atom()  # sin(x)^2 is the square of the sine
        if self.takes("-"):
            return Node("negative", (self.argument(),))
        node = self.power()
        while self.peek()[0] in ("number", "name") or self.peek() == ("command", "pi"):
            node = Node("*", (node, self.power()))
        return node


def _is_whole(node: Node) -> bool:
    return node.kind == "number" and node.value is not None and node.value.denominator == 1


def _is_proper(node: Node) -> bool:
    return node.kind == "/" and all(part.kind == "number" for part in node.parts)


def parse(text: str) -> Node:
    """The expression of a normalised answer. Errors: Unreadable."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("too long")
    try:
        return _Parser(text).whole()
    except RecursionError:
        raise Unreadable("too deep") from None


def names_in(node: Node) -> set[str]:
    """The variables of an expression."""
    found, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        waiting += one.parts
        if one.kind == "name":
            found.add(one.name)
    return found


# ---------------------------------------------------------------- its value


def value_of(node: Node, variables: Mapping[str, Value]) -> Value:
    """The value at a point, a Fraction where that is possible. Errors: Unreadable."""
    try:
        value = _value_of(node, variables)
    except (ArithmeticError, ValueError, RecursionError) as error:  # 1/0, overflow, log 0
        raise Unreadable(str(error)) from None
    if isinstance(value, complex) and not cmath.isfinite(value):
        raise Unreadable("no finite value")
    return value


def _value_of(node: Node, variables: Mapping[str, Value]) -> Value:
    if node.kind == "number":
        assert node.value is not None
        return node.value
    if node.kind == "name":
        return variables[node.name]
    if node.kind in CONSTANTS:
        return CONSTANTS[node.kind]
    parts = [_value_of(part, variables) for part in node.parts]
    if node.kind == "function":
        return FUNCTIONS[node.name](complex(parts[0]))
    return _bounded(OPERATIONS[node.kind](*parts))


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction):
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > MAX_BITS:
            raise Unreadable("a number too large")
    return value


def _binary(exact: Callable[[Any, Any], Any]) -> Callable[[Value, Value], Value]:
    def apply(left: Value, right: Value) -> Value:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return Fraction(exact(left, right))
        return complex(exact(complex(left), complex(right)))

    return apply


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if size * abs(exponent.numerator) > MAX_BITS:
                raise Unreadable("a number too large")
            return base**exponent.numerator
        return _root(_power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
    return complex(base) ** complex(exponent)


def _root(base: Value, index: Value) -> Value:
    """The real root where there is one (of -8 the third is -2), exactly where it is rational."""
    if not isinstance(index, Fraction) or index.denominator != 1 or not 1 <= index <= 100:
        return complex(base) ** (1 / complex(index))
    degree = index.numerator
    if not isinstance(base, Fraction):
        if degree % 2 and abs(base.imag) < TOLERANCE and base.real < 0:
            return complex(-((-base.real) ** (1 / degree)))
        return base ** (1 / degree) if base != 0 else 0j
    if base < 0 and degree % 2:
        return _negative(_root(-base, index))
    if base >= 0:
        above, below = (_whole_root(part, degree) for part in base.as_integer_ratio())
        if above is not None and below is not None:
            return Fraction(above, below)
        return complex(float(base) ** (1 / degree))
    return complex(float(base)) ** (1 / degree)


def _whole_root(number: int, degree: int) -> int | None:
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < number:
            low = middle + 1
        else:
            high = middle
    return low if low**degree == number else None


def _negative(value: Value) -> Value:
    return -value


def _absolute(value: Value) -> Value:
    return abs(value) if isinstance(value, Fraction) else complex(abs(value))


def _factorial(value: Value) -> Value:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 1500:
        raise Unreadable("a factorial of no small whole number")
    return Fraction(math.factorial(value.numerator))


def _binomial(above: Value, below: Value) -> Value:
    for value in (above, below):
        if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 1500:
            raise Unreadable("a binomial of no small whole numbers")
    assert isinstance(above, Fraction) and isinstance(below, Fraction)
    return Fraction(math.comb(above.numerator, below.numerator))


def _logarithm(value: Value, base: Value = Fraction(10)) -> Value:
    return cmath.log(complex(value)) / cmath.log(complex(base))


CONSTANTS: dict[str, Value] = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
OPERATIONS: dict[str, Callable[..., Value]] = {
    "+": _binary(lambda a, b: a + b),
    "-": _binary(lambda a, b: a - b),
    "*": _binary(lambda a, b: a * b),
    "/": _binary(lambda a, b: a / b),
    "^": _power,
    "root": _root,
    "negative": _negative,
    "abs": _absolute,
    "!": _factorial,
    "binom": _binomial,
    "log": _logarithm,
}
# Where expressions with variables are compared: two that agree at these agree everywhere, but for
# an accident (a polynomial of degree d that is not 0 has d roots).
POINTS = (
    (complex(1.3267), 0.6180 + 0.0j, 0.917j),
    (complex(-0.7391), -0.4812 + 0.0j, 0.551j),
    (0.5772 + 0.3183j, 0.2718 - 0.1414j, 0.123j),
    (complex(2.6651), 1.2020 + 0.0j, -0.7j),
)


def _at(point: tuple[complex, complex, complex], names: Sequence[str]) -> dict[str, Value]:
    first, step, turn = point
    is_real = first.imag == 0
    return {
        name: first + step * number + (0 if is_real else turn * number * number)
        for number, name in enumerate(names)
    }


def _is_close(left: Value, right: Value) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = complex(left), complex(right)
    return abs(left - right) <= TOLERANCE * max(1.0, abs(left), abs(right))


def same_value(left: str, right: str) -> bool:
    """Whether two normalised expressions have the same value, for all values of their variables.

    Errors: Unreadable if one of them cannot be read.
    """
    first, second = parse(left), parse(right)
    names = sorted(names_in(first) | names_in(second))
    if names_in(first) != names_in(second) and not names_in(first) and not names_in(second):
        return False
    if not names:
        return _is_close(value_of(first, {}), value_of(second, {}))
    num_compared = 0
    for point in POINTS:
        variables = _at(point, names)
        try:
            values = value_of(first, variables), value_of(second, variables)
        except Unreadable:
            continue
        num_compared += 1
        if not _is_close(*values):
            return False
    if num_compared < 2:
        raise Unreadable("no value at most points")
    return True


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
        variables = _at(point, names)
        above, below = (complex(value_of(node, variables)) for node in (first, second))
        if abs(above) < TOLERANCE or abs(below) < TOLERANCE:
            return False
        factors.append(above / below)
    return all(_is_close(factor, factors[0]) for factor in factors)


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
