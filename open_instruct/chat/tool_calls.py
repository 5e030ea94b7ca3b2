"""Calls of tools in an answer's text, as ChatML models write them.

<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>
"""

import json
import secrets
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """What an answer says, and the calls in it in OpenAI's shape.

    What stands between the marks and is no call stays in the text, marks and all: nothing is lost.
    """
    said, calls, position = [], [], 0
    while (begin := text.find(BEGIN, position)) >= 0:
        end = text.find(END, begin)
        inside = text[begin + len(BEGIN) : end if end >= 0 else len(text)]
        call = _call(inside)
        after = len(text) if end < 0 else end + len(END)
        said.append(text[position : begin if call else after])
        if call:
            calls.append(call)
        position = after
    said.append(text[position:])
    whole = "".join(said)
    return (whole.strip() if calls else whole), calls


def _call(inside: str) -> dict[str, Any] | None:
    try:
        value = json.loads(inside)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


class CallReader:
    """``split_calls`` for a text that is still coming: from the first mark on it is held back."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, text: str) -> str:
        """What can be shown already."""
        self.held += text
        begin = self.held.find(BEGIN)
        if begin < 0:
            ends = (n for n in range(len(BEGIN) - 1, 0, -1) if self.held.endswith(BEGIN[:n]))
            begin = len(self.held) - next(ends, 0)
        shown, self.held = self.held[:begin], self.held[begin:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls."""
        rest, self.held = self.held, ""
        return split_calls(rest)
