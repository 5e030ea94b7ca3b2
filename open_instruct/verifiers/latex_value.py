"""The value of an expression in LaTeX: text -> tokens -> a tree -> a number.

The small parser below knows arithmetic and nothing else. A tree is evaluated exactly while it is
rational, otherwise in complex numbers. Nothing of a text is ever executed, and both length and size
of numbers are bounded, so every evaluation ends at once.
"""

import cmath
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_CHARACTERS = 1000  # of a text that is read
MAX_BITS = 20_000  # of a whole number
MAX_TOKENS = 200
MAX_DEPTH = 60
TOLERANCE = 1e-9
Value = Fraction | complex


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


def variables_at(point: tuple[complex, complex, complex], names: Sequence[str]) -> dict[str, Value]:
    first, step, turn = point
    is_real = first.imag == 0
    return {
        name: first + step * number + (0 if is_real else turn * number * number)
        for number, name in enumerate(names)
    }


def is_close(left: Value, right: Value) -> bool:
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
        return is_close(value_of(first, {}), value_of(second, {}))
    num_compared = 0
    for point in POINTS:
        variables = variables_at(point, names)
        try:
            values = value_of(first, variables), value_of(second, variables)
        except Unreadable:
            continue
        num_compared += 1
        if not is_close(*values):
            return False
    if num_compared < 2:
        raise Unreadable("no value at most points")
    return True
