"""Answers in LaTeX: found in a text, and compared by value."""

import pytest

from open_instruct.verifiers.math_answer import (
    any_answer,
    boxed_answer,
    is_equivalent,
    judge,
    marked_answer,
    read_problem,
)
from open_instruct.verifiers.verdict import BadProblem


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} and then \boxed{\frac{1}{2^{n}}}", r"\frac{1}{2^{n}}"),
        (r"\fbox{x}", "x"),
        (r"$\boxed 5$ is it", "5"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{7} and \boxed{unclosed", "7"),
        (r"\boxed{}", None),
        (r"\boxed{a \} b}", r"a \} b"),
        ("nothing", None),
    ],
)
def test_the_last_box_is_found_with_its_braces(text, found):
    assert boxed_answer(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("The final answer is 3.5. I hope it is correct.", "3.5"),
        (r"The answer is $\frac12$, not $2$.", r"\frac12"),
        ("**Answer:** 12", "12"),
        ("The answer is 7 apples. They are red.", "7 apples"),
        ("I am lost", None),
    ],
)
def test_an_announced_answer_is_found(text, found):
    assert marked_answer(text) == found


def test_without_a_mark_the_last_formula_or_number_is_taken():
    assert any_answer("It is $2$ and so $x = 3$, done.") == "x = 3"
    assert any_answer("first 4 then 1,250") == "1,250"
    assert any_answer("none") is None
    assert any_answer(r"so \(x = 3\) and \[y\]") == "y"
    assert any_answer(r"so \[\frac{1}{2}\]!") == r"\frac{1}{2}"


SAME = [
    ("5", "5.0"),
    ("0.5", r"\frac{1}{2}"),
    (r"\frac12", r"\dfrac{1}{2}"),
    ("1/2", r"\tfrac{1}{2}"),
    ("-\\frac{2}{3}", r"\frac{-2}{3}"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"\sqrt2", r"\sqrt{2}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"3+2\sqrt{2}", r"(1+\sqrt{2})^2"),
    ("10{,}000", "10000"),
    ("10,000", "10000"),
    (r"\$18.90", "18.9"),
    (r"50\%", "50"),
    ("50%", "0.5"),
    (r"90^\circ", "90"),
    ("90 degrees", r"90^{\circ}"),
    (r"5\text{ cm}", "5"),
    (r"12\text{ cm}^2", "12"),
    ("15 mph", "15"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(A)}", "(A)"),
    (r"x=5", "5"),
    ("5", "x = 5"),
    ("y = 2x+3", "y = 3 + 2x"),
    ("2y = 4x+6", "y = 2x+3"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"\frac{x+2}{7}", r"\frac{2+x}{7}"),
    (r"6\pi", r"\pi\cdot 6"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    (r"\log_2 8", "3"),
    (r"\sin 2x", r"2\sin x\cos x"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    ("2^{10}", "1024"),
    ("3 - 2i", "-2i+3"),
    ("(1, 2)", r"\left(1,2\right)"),
    (r"(\frac{1}{2}, 3)", "(0.5,3)"),
    ("[2,5)", r"\left[2, 5\right)"),
    (r"(-\infty, 2]", r"(-\infty,2.0]"),
    (r"(-\infty,1)\cup(2,3)", r"(2,3) \cup (-\infty, 1)"),
    (r"\{1,2,3\}", r"\left\{3, 2, 1\right\}"),
    ("1, 2", "2,1"),
    (r"1\text{ and }2", "1,2"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}"),
    (r"x = \pm 3", "3,-3"),
    (r"x \le 5", r"5 \geq x"),
    (r"1 < x \leq 3", "1<x<=3"),
    (r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}", r"\begin{pmatrix}1\\0.5\end{pmatrix}"),
    ("2516_8", "2516_8"),
    (r"\frac{1}{2}.", r"\frac{1}{2}"),
    ("p - q", "-q+p"),
    (r"\theta + 1", r"1+\theta"),
    ("x_1 + x_2", "x_2+x_1"),
    ("|x-1|", r"\lvert 1-x\rvert"),
    ("f(x) = x+1", "x + 1"),
    (r"\frac 59", "5/9"),
    (r"1,\!000,\!000", "1000000"),
    (r"x \in (-\infty, 3]", r"(-\infty,3]"),
    (r"\text{(B)}", "B"),
    (r"1.5 \times 10^{3}", "1500"),
    (r"-\frac12x+3", r"3-\frac{x}{2}"),
    (r"y=\pm\frac{1}{2}x", r"y = \pm \frac{x}{2}"),
    ("a=2, b=3", "2,3"),
    (r"e^{i\pi}", "-1"),
    (r"\tan^2 x", r"(\tan x)^2"),
    (r"8\pi \text{ cubic inches}", r"8\pi"),
]


@pytest.mark.parametrize(("answer", "truth"), SAME)
def test_answers_that_mean_the_same_are_equivalent(answer, truth):
    assert is_equivalent(answer, truth)
    assert is_equivalent(truth, answer)


DIFFERENT = [
    ("5", "6"),
    ("", "5"),
    ("5", ""),
    ("0.33", r"\frac{1}{3}"),
    (r"\frac{1}{2}", "2"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    (r"\{1,2\}", "(1,2)"),
    ("1,2", "1"),
    ("1,2,2", "1,1,2"),
    (r"\sqrt{x^2}", "x"),
    ("x+1", "x+2"),
    ("x", "y"),
    ("y = 2x+3", "y=2x+4"),
    ("x < 5", r"x \le 5"),
    ("x < 5", "x > 5"),
    ("50%", "5"),
    ("2516_8", "2516"),
    (r"\text{Evelyn}", "Angela"),
    ("10000000000000000000001", "10000000000000000000002"),
    ("2^{100}+1", "2^{100}"),
    ("1 \\pm 2", "3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ("1/0", "2/0"),
    (r"\infty", r"-\infty"),
    ("[1,2]", "1,2"),
    ("12", "1,2"),
]


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_answers_that_differ_are_not_equivalent(answer, truth):
    assert not is_equivalent(answer, truth)
    assert not is_equivalent(truth, answer)


# ---------------------------------------------------------------- agreement with lm-eval


def test_what_hendrycks_own_rule_calls_equal_is_equal_here():
    from lm_eval.tasks.hendrycks_math.utils import is_equiv  # slow to import

    agreed = 0
    for answer, truth in SAME:
        if is_equiv(answer, truth):
            agreed += 1
    assert agreed >= 10  # the cases speak of the same things
    for answer, truth in DIFFERENT:
        if answer and truth:
            assert not is_equiv(answer, truth) or is_equivalent(answer, truth)


# ---------------------------------------------------------------- hostile texts


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        "2^{100000000}",
        "1000000!",
        "((((" * 500,
        "{" * 5000,
        "-" * 900 + "1",
        "^".join("9" * 400),
        r"\frac" * 200,
        r"\sqrt" * 300 + "2",
        "__import__('os').system('x')",
        "x" * 100_000,
        "9" * 100_000,
        r"\binom{1500}{700}^{1500}",
        "1," * 500,
        r"\pm" * 300,
        r"\begin{matrix}" * 100,
        "|" * 999,
        "{" * 50_000,
        r"\boxed{" * 20_000,
        r"\(" * 50_000,
        " " * 50_000 + "x",
        "1," * 50_000,
        "\\" * 999,
    ],
)
def test_hostile_answers_are_wrong(text):
    for truth in ("5", "x+1", "(1,2)"):
        assert not is_equivalent(text, truth)
        assert not is_equivalent(text, text + "+1")
    judge(rf"\boxed{{{text}}} " + text, "5")


# ---------------------------------------------------------------- rows and verdicts


def test_strict_and_flexible_scores():
    assert judge(r"Thus \boxed{\frac{2}{4}}.", "0.5").scores == {
        "flexible_match": 1.0,
        "strict_match": 1.0,
    }
    assert judge("Thus $x = 4$.", "4").scores == {"flexible_match": 1.0, "strict_match": 0.0}
    assert judge("Hm.", "4").scores == {"flexible_match": 0.0, "strict_match": 0.0}
    assert judge("Hm.", "4").found == "no answer"


def test_rows_of_math_and_of_math_500_are_read():
    row = {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"\boxed{2}"}
    problem = read_problem(row)
    assert (problem.truth, problem.category, problem.solution) == ("2", "Algebra", r"\boxed{2}")
    assert read_problem({"problem": "?", "answer": "3", "subject": "Algebra"}).truth == "3"
    with pytest.raises(BadProblem, match="boxes no answer"):
        read_problem({"problem": "?", "solution": "two"})
