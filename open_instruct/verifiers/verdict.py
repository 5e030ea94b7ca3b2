"""What every verifier is given and gives back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class BadProblem(Exception):
    """A row of a data set that holds no problem of this kind; the reader adds file and line."""


@dataclass(frozen=True)
class Problem:
    """A question whose answer can be verified."""

    prompt: str
    truth: Any  # what the verifier compares with; JSON
    shown_truth: str  # the same, for people
    solution: str | None = None  # worked out, as an example to others
    category: str | None = None
    cluster: str | None = None  # what it shares with other problems: their passage, say


@dataclass(frozen=True)
class Verdict:
    """How good one answer is."""

    scores: dict[str, float]  # metric -> 0 to 1
    found: str = ""  # the answer as it was read, or what is wrong with it
    num_parts: int = 1  # how many things were asked for at once

    @classmethod
    def of(cls, found: str = "", **scores: bool) -> "Verdict":
        """A verdict of rights and wrongs."""
        return cls({metric: float(is_right) for metric, is_right in scores.items()}, found)


def field(row: Mapping[str, Any], key: str, kind: type[str] | type[list] = str) -> Any:
    """A value of a row. Errors: BadProblem if it lacks or is of another kind."""
    if key not in row:
        raise BadProblem(f"the key {key!r} is missing; found {', '.join(map(repr, row))}.")
    if not isinstance(row[key], kind) or row[key] == kind():
        words = json.dumps(row[key], ensure_ascii=False, default=str)[:60]
        raise BadProblem(f"{key!r} holds {words}, needed {'text' if kind is str else 'a list'}.")
    return row[key]
