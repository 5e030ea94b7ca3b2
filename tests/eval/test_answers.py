"""Which answers count as the same."""

import pytest

from eval.answers import is_correct


@pytest.mark.parametrize(
    ("answer", "target", "rule", "expected"),
    [
        ("green", "green", "as_written", True),
        (" green\n", "green", "as_written", True),
        ("Green", "green", "as_written", False),
        ("green.", "green", "as_written", False),
        ("Green.", "green", "as_words", True),
        ("  3   5\t8 ", "3 5 8", "as_words", True),
        ("“Oren”", "Oren", "as_words", True),
        ("3.5", "35", "as_words", False),
        ("a-b", "a b", "as_words", False),
        ("green boat", "green", "as_words", False),
        ("", "green", "as_words", False),
    ],
)
def test_answers_are_compared_by_the_named_rule(answer, target, rule, expected):
    assert is_correct(answer, [target], rule) is expected


def test_any_accepted_answer_will_do():
    assert is_correct("12", ["twelve", "12"], "as_words")
