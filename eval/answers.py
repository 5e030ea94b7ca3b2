"""When two answers count as the same: named rules, chosen by a task's ``answer_rule``."""

from collections.abc import Callable

END_PUNCTUATION = " .,;:!?\"'`“”‘’"


def as_written(text: str) -> str:
    """Everything counts but white space around the answer: for tasks about form."""
    return text.strip()


def as_words(text: str) -> str:
    """The words count; letter case, spacing and punctuation at the ends do not."""
    return " ".join(text.split()).casefold().strip(END_PUNCTUATION)


ANSWER_RULES: dict[str, Callable[[str], str]] = {"as_written": as_written, "as_words": as_words}


def is_correct(answer: str, targets: list[str], rule: str) -> bool:
    """Whether the answer equals one of the accepted ones under the named rule."""
    normalise = ANSWER_RULES[rule]
    return normalise(answer) in {normalise(target) for target in targets}
