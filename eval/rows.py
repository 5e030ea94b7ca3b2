"""Rows of a JSON file with their place, so that a message can name file and line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from olmo_base.run.errors import DataError
from open_instruct.examples import BadRow, read_rows


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each row. Errors: DataError."""
    for row in read_rows(path):
        if isinstance(row.value, BadRow):
            raise DataError(path, row.line, row.value.problem, row.value.next_step)
        if not isinstance(row.value, dict):
            raise DataError(path, row.line, f"found {named(row.value)}, needed an object.")
        yield row.line, row.value


class Row:
    """A row with its place, for messages."""

    def __init__(self, path: Path, line: int, row: dict[str, Any]) -> None:
        self.path, self.line, self.row = path, line, row

    def fail(self, problem: str, next_step: str = "") -> NoReturn:
        raise DataError(self.path, self.line, problem, next_step)

    def get(self, key: str, kind: type | tuple[type, ...], needed: str) -> Any:
        """The value of a key that must be there and of a type."""
        if key not in self.row:
            keys = ", ".join(map(repr, self.row)) or "none"
            self.fail(f"the key {key!r} is missing; found {keys}.", f"Needed: {needed}.")
        value = self.row[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(f"{key!r} holds {named(value)}.", f"Needed: {needed}.")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair: "\\ud83d"
            self.fail(f"{key!r} holds half a surrogate pair.", "Mend or remove the row.")
        return value

    def texts(self, key: str, needed: str) -> tuple[str, ...]:
        """A list of texts that is not empty."""
        values = self.get(key, list, needed)
        if not values or not all(isinstance(value, str) for value in values):
            self.fail(f"{key!r} holds {named(values)}.", f"Needed: {needed}.")
        return tuple(values)

    def text_or_none(self, key: str) -> str | None:
        """The text of a key that may be left out."""
        value = self.row.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(f"{key!r} holds {named(value)}.", "Needed: text.")
        return value


def named(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else words[:57] + "…"


def numbered(path: Path) -> Iterator[tuple[int, tuple[int, dict[str, Any]]]]:
    return enumerate(rows(path))
