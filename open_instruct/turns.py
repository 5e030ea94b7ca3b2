"""The turns of a dialogue, checked: known roles, text that is there, an order that makes sense."""

from collections.abc import Sequence
from typing import Any, TypedDict


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str  # system, user or assistant
    content: str


class BadRow(Exception):
    """A row that cannot be used. ``reason`` is what such rows are counted under."""

    def __init__(self, reason: str, problem: str, next_step: str = "") -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem
        self.next_step = next_step


# ---------------------------------------------------------------- turns

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",  # ShareGPT
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT
}
NOT_YET = {
    "function_call": "tool calls",
    "observation": "tool calls",
    "tool": "tool calls",
    "tool_call": "tool calls",
    "tool_response": "tool calls",
    "function": "tool calls",
    "ipython": "tool calls",
    "developer": "developer turns",
}


def not_supported(what: str, found: str) -> BadRow:
    return BadRow(
        f"{what} not supported yet",
        f"{found}: {what} are not supported yet.",
        "Remove such rows, or set on_bad_row: drop.",
    )


def checked_text(value: Any, what: str) -> str:
    """A text that is not empty and can be encoded."""
    if not isinstance(value, str):
        raise BadRow(
            "content is not text",
            f"{what} is {kind_of(value)}, not text.",
            "Write it as one string.",
        )
    if not value.strip():
        raise BadRow("empty content", f"{what} is empty.", "Fill it in or remove the row.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(
            "content is not text",
            f"{what} holds half a surrogate pair (\\ud800 to \\udfff), which is no character.",
            "Remove it.",
        ) from None
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def with_article(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


def field(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRow(
            "missing key",
            f"the key {key!r} is missing; found {listed_keys(row)}.",
            "Every row needs the keys of the first.",
        )
    return row[key]


def listed_keys(row: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "no keys"


def read_turns(value: Any, what: str) -> list[Message]:
    """Turns {role, content} or {from, value}, with our names of the roles."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(
            "turns are not a list", f"{what} is {kind_of(value)}, not a list of turns.", ""
        )
    if not value:
        raise BadRow("empty dialogue", f"{what} holds no turns.", "Remove the row.")
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        place = f"turn {number} of {what}"
        if not isinstance(turn, dict):
            raise BadRow("turns are not objects", f"{place} is {kind_of(turn)}, not an object.", "")
        is_sharegpt = "from" in turn and "role" not in turn
        role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
        for key in (role_key, content_key):
            if key not in turn:
                raise BadRow(
                    "missing key", f"{place} has no key {key!r}; found {listed_keys(turn)}.", ""
                )
        messages.append({"role": _role(turn[role_key], place), "content": ""})
        for key in ("tool_calls", "function_call", "tool_call_id", "function_calls"):
            if turn.get(key):
                raise not_supported("tool calls", f"{place} holds {key!r}")
        messages[-1]["content"] = checked_text(turn[content_key], f"the content of {place}")
    return messages


def _role(value: Any, place: str) -> str:
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    if isinstance(value, str) and value in NOT_YET:
        raise not_supported(NOT_YET[value], f"{place} is of role {value!r}")
    raise BadRow(
        "unknown role", f"{place} has the role {value!r}.", f"Known roles: {', '.join(ROLES)}."
    )


def user_turn(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> Message:
    return {"role": "assistant", "content": text}


def check_order(messages: Sequence[Message], what: str) -> None:
    """System first if at all, then user and assistant in turn."""
    roles = [turn["role"] for turn in messages]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise BadRow(
            "system turn not first",
            f"turn {number} of {what} is a system turn; only the first may be.",
            "Move or remove it.",
        )
    first = 1 if roles[:1] == ["system"] else 0
    for number, role in enumerate(roles[first:], start=first):
        needed = "user" if (number - first) % 2 == 0 else "assistant"
        if role == needed:
            continue
        if number == first:
            problem = f"{what} starts with the assistant; a user turn must come before."
        else:
            problem = f"turns {number} and {number + 1} of {what} are both {role} turns."
        raise BadRow("turns do not alternate", problem, "Join or remove turns.")


def check_dialogue(messages: Sequence[Message], what: str = "the dialogue") -> None:
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise BadRow(
            "no assistant turn",
            f"{what} has no assistant turn, so there is nothing to learn.",
            "Add the answer or remove the row.",
        )
    check_order(messages, what)
    if roles[-1] != "assistant":
        raise BadRow(
            "ends without an answer",
            f"{what} ends with {with_article(roles[-1])} turn that nobody answers.",
            "Add the answer or remove the turn.",
        )
