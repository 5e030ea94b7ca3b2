"""Expressions in LaTeX have the values that sympy gives them."""

import random

import pytest
import sympy  # type: ignore[import-untyped]

from open_instruct.verifiers.latex_value import parse, value_of
from open_instruct.verifiers.math_answer import normalised


def random_expression(chance: random.Random, depth: int) -> tuple[str, sympy.Expr]:
    """The same expression as LaTeX of our own writing and as sympy's."""
    if depth == 0:
        kind = chance.choice(["number", "x", "pi"])
        if kind == "number":
            number = chance.randint(1, 9)
            return str(number), sympy.Integer(number)
        return ("x", sympy.Symbol("x")) if kind == "x" else (r"\pi", sympy.pi)
    (left, first), (right, second) = (random_expression(chance, depth - 1) for _ in range(2))
    kind = chance.choice(["+", "-", "*", "frac", "sqrt", "power", "sin"])
    if kind == "frac":
        return rf"\frac{{{left}}}{{{right}}}", first / second
    if kind == "sqrt":
        return rf"\sqrt{{{left}}}", sympy.sqrt(first)
    if kind == "power":
        return rf"\left({left}\right)^2", first**2
    if kind == "sin":
        return rf"\sin({left})", sympy.sin(first)
    if kind == "*":
        return rf"({left})\cdot({right})", first * second
    return f"({left}){kind}({right})", first + second if kind == "+" else first - second


def test_values_are_those_of_sympy():
    chance = random.Random(3)
    num_compared = 0
    while num_compared < 60:
        text, expression = random_expression(chance, 3)
        expected = complex(expression.evalf(subs={"x": 1.375}))
        if not 1e-3 < abs(expected) < 1e6:
            continue  # the root of a rounding error is no value
        found = complex(value_of(parse(normalised(text)), {"x": complex(1.375)}))
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), text
        num_compared += 1


def test_latex_that_sympy_writes_is_read_back_as_the_same_value():
    x = sympy.Symbol("x")
    expressions = [
        sympy.Rational(-7, 3) * x**2 + sympy.sqrt(5) * x / 3,
        sympy.exp(2 * x) / (1 + x),
        sympy.cbrt(x) + sympy.log(x) ** 2,
        sympy.sin(x) ** 2 * sympy.tan(x / 2) - sympy.pi / 4,
        (x + 1) ** sympy.Rational(3, 2) - sympy.I * x,
        sympy.Abs(x - 3),
    ]
    for expression in expressions:
        text = sympy.latex(expression).replace(r"\log", r"\ln")
        found = complex(value_of(parse(normalised(text)), {"x": complex(1.7)}))
        assert found == pytest.approx(complex(expression.evalf(subs={x: 1.7}))), text
