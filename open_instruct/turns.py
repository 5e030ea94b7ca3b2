"""The turns of a dialogue, checked: known roles, text that is there, an order that makes sense."""

import json
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict


class Function(TypedDict):
    """What is called, and with what."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """One call of a tool, as chat templates expect it."""

    type: str  # function
    function: Function


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str  # system, user, assistant or tool
    content: str  # empty only where an assistant merely calls tools
    tool_calls: NotRequired[list[ToolCall]]
    train: NotRequired[bool]  # false: an assistant's turn that is not learnt


Tools = list[dict[str, Any]]  # functions that an assistant may call: name, description, parameters


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
    "developer": "system",
    "user": "user",
    "human": "user",  # ShareGPT
    "assistant": "assistant",
    "gpt": "assistant",  # ShareGPT
    "function_call": "assistant",  # ShareGPT; its text is the call
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",  # ShareGPT
    "tool_response": "tool",
    "function": "tool",
    "ipython": "tool",
}
CALLS = {"function_call", "tool_call"}
ASKING = {"user", "tool"}  # what an assistant answers to
# Keys by which a turn says whether it is learnt: OpenAI's 0 or 1, and true or false.
TRAIN_KEYS = ("weight", "train", "training")


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
    return [_turn(turn, f"turn {number} of {what}") for number, turn in enumerate(value, start=1)]


def _turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("turns are not objects", f"{place} is {kind_of(turn)}, not an object.", "")
    is_sharegpt = "from" in turn and "role" not in turn
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    calls = turn.get("tool_calls")
    for key in (role_key,) if calls else (role_key, content_key):
        if key not in turn:
            raise BadRow(
                "missing key", f"{place} has no key {key!r}; found {listed_keys(turn)}.", ""
            )
    role, content = _role(turn[role_key], place), turn.get(content_key)
    message: Message = {"role": role, "content": ""}
    if turn[role_key] in CALLS:
        message["tool_calls"] = _tool_calls(_parsed(content, f"the call in {place}"), place)
    elif calls:
        message["tool_calls"] = _tool_calls(calls, place)
        message["content"] = checked_text(content, f"the content of {place}") if content else ""
    elif turn.get("function_call"):
        message["tool_calls"] = _tool_calls([turn["function_call"]], place)
        message["content"] = checked_text(content, f"the content of {place}") if content else ""
    else:
        message["content"] = checked_text(content, f"the content of {place}")
    if "tool_calls" in message and role != "assistant":
        raise BadRow("tool calls of others", f"{place} calls tools, but is a {role} turn.", "")
    said = [key for key in TRAIN_KEYS if turn.get(key) is not None]
    if said:
        message["train"] = _is_trained(turn[said[0]], said[0], place)
    return message


def _role(value: Any, place: str) -> str:
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    raise BadRow(
        "unknown role", f"{place} has the role {value!r}.", f"Known roles: {', '.join(ROLES)}."
    )


def _is_trained(value: Any, key: str, place: str) -> bool:
    if value in (0, 1):  # true and false are such too
        return bool(value)
    raise BadRow(
        "weight is not 0 or 1",
        f"{key!r} of {place} is {value!r}.",
        "A turn is learnt (1, true) or not (0, false).",
    )


# ---------------------------------------------------------------- tools


def _parsed(value: Any, what: str) -> Any:
    """A JSON value that may be written as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(checked_text(value, what))
    except (ValueError, RecursionError) as error:
        raise BadRow("broken JSON in a tool call", f"{what} is not JSON: {error}.", "") from None


def _tool_calls(value: Any, place: str) -> list[ToolCall]:
    """Calls as templates expect them; each is {name, arguments}, in "function" or by itself."""
    calls: list[ToolCall] = []
    for item in value if isinstance(value, list) else [value]:
        call = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            raise BadRow(
                "tool call without a name",
                f"a tool call in {place} names no function: {json.dumps(item)[:80]}.",
                'Write {"name": "...", "arguments": {...}}.',
            )
        arguments = call.get("arguments", call.get("parameters"))
        arguments = _parsed(arguments, f"the arguments of {call['name']!r} in {place}")
        if not isinstance(arguments, dict):
            raise BadRow(
                "arguments of a tool call are no object",
                f"the arguments of {call['name']!r} in {place} are {kind_of(arguments)}.",
                'Write {"name": "...", "arguments": {...}}.',
            )
        calls.append(
            {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        )
    if not calls:
        raise BadRow("tool call without a name", f"{place} calls no function.", "")
    return calls


def read_tools(row: dict[str, Any]) -> Tools | None:
    """The functions in a row's ``tools``, as templates expect them; None if there are none."""
    value = row.get("tools")
    if value is None or value == "":
        return None
    value = _parsed(value, "'tools'")
    if not isinstance(value, list):
        raise BadRow("tools are not a list", f"'tools' is {kind_of(value)}, not a list.", "")
    tools: Tools = []
    for number, item in enumerate(value, start=1):
        tool = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise BadRow(
                "tool without a name", f"item {number} of 'tools' names no function.", "Mend it."
            )
        tools.append({"type": "function", "function": tool})
    return tools or None


# ---------------------------------------------------------------- a dialogue as a whole


def user_turn(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> Message:
    return {"role": "assistant", "content": text}


def check_order(messages: Sequence[Message], what: str) -> None:
    """System first if at all, then user and assistant in turn; tools answer those who call them."""
    roles = [turn["role"] for turn in messages]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise BadRow(
            "system turn not first",
            f"turn {number} of {what} is a system turn; only the first may be.",
            "Move or remove it.",
        )
    first = 1 if roles[:1] == ["system"] else 0
    before: Message = {"role": "assistant", "content": ""}
    for number, turn in enumerate(messages[first:], start=first):
        if turn["role"] in _may_follow(before):
            before = turn
            continue
        if number == first:
            problem = f"{what} starts with the {turn['role']}; a user turn must come before."
        elif turn["role"] == before["role"]:
            problem = f"turns {number} and {number + 1} of {what} are both {turn['role']} turns."
        elif turn["role"] == "tool":
            problem = f"turn {number + 1} of {what} answers a tool call that nobody made."
        else:
            problem = (
                f"turn {number + 1} of {what} is {with_article(turn['role'])} turn where "
                f"{' or '.join(_may_follow(before))} must follow."
            )
        raise BadRow("turns do not alternate", problem, "Join or remove turns.")


def _may_follow(turn: Message) -> tuple[str, ...]:
    if turn["role"] == "assistant":
        return ("tool",) if "tool_calls" in turn else ("user",)
    return ("assistant", "tool") if turn["role"] == "tool" else ("assistant",)


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
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in messages):
        raise BadRow(
            "no turn is learnt",
            f"every assistant turn of {what} says that it is not to be learnt.",
            "Remove the row.",
        )
