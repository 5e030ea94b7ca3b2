"""Votes of the chat page as rows of a JSON-lines file that the preference stage reads."""

import json
import os
from pathlib import Path
from typing import Any

from open_instruct.chat.messages import encodable
from open_instruct.chat.protocol import chat_request
from open_instruct.chat.refusals import ApiError


def pair_row(body: Any) -> dict[str, Any]:
    """A vote as a row of {prompt, chosen, rejected} messages. Errors: ApiError.

    Two models may answer alike; then nothing is preferred and there is no pair.
    """
    prompt = chat_request({"model": "", "messages": _of(body, "prompt", list)}).messages
    if prompt[-1]["role"] != "user":
        raise ApiError(400, "prompt must end with the user's turn.", param="prompt")
    sides = {key: _of(body, key, str) for key in ("chosen", "rejected")}
    for key, text in sides.items():
        if not encodable(text, key).strip():
            raise ApiError(400, f"{key} is empty; there is nothing to learn from it.", param=key)
    if sides["chosen"] == sides["rejected"]:
        raise ApiError(400, "chosen and rejected are the same, so neither is preferred.")
    row: dict[str, Any] = {"prompt": list(prompt)}
    for key, text in sides.items():
        row[key] = [{"role": "assistant", "content": text}]
    for key in ("chosen_model", "rejected_model"):
        row[key] = encodable(_of(body, key, str), key)
    return row


def _of(body: Any, key: str, kind: type) -> Any:
    value = body.get(key) if isinstance(body, dict) else None
    if not isinstance(value, kind):
        raise ApiError(400, f"{key} is missing or not a {kind.__name__}.", param=key)
    return value


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file, on a line of its own whatever stands there."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
