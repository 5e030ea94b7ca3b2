"""Rows written to files and read as examples, for the tests of data."""

import json
from pathlib import Path
from typing import Any

from olmo_base.run.artefact import ExampleCounts
from open_instruct.examples import Dialogue, Pair, Source, read_dialogues, read_pairs
from open_instruct.turns import Message


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


SYSTEM: Message = {"role": "system", "content": "s"}


def write(path: Path, *rows: Any) -> str:
    """Rows as JSON lines; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def dialogues(
    *sources: Source | str, counts: ExampleCounts | None = None, **keys
) -> list[Dialogue]:
    keys = {"seed": 0, "on_bad_row": "error", **keys}
    items = [Source(item) if isinstance(item, str) else item for item in sources]
    return read_dialogues(items, counts=counts or ExampleCounts(), **keys)


def pairs(*sources: str, counts: ExampleCounts | None = None, **keys) -> list[Pair]:
    keys = {"seed": 0, "on_bad_row": "error", **keys}
    return read_pairs([Source(item) for item in sources], counts=counts or ExampleCounts(), **keys)


def turns(*messages: Any) -> dict[str, Any]:
    """A row of the format messages."""
    return {"messages": list(messages)}


GOOD = turns(user("q"), assistant("a"))
