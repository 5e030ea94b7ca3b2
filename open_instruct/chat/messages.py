"""What is asked: messages, tools that may be called, and prompts, from JSON as OpenAI writes it."""

import json
from typing import Any

from open_instruct.chat.refusals import shown, wrong
from open_instruct.turns import BadRow, Message, ToolCall, Tools, read_tools, read_turns

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
OF_ROLE = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}
EMPTY: tuple[Any, ...] = (None, [], {})  # what clients send back of an earlier answer's other keys


def read_messages(value: Any) -> tuple[Message, ...]:
    """The turns. Errors: ApiError."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", "must be a list of at least one message.")
    called: set[str] = set()  # ids of the calls so far
    messages = tuple(
        _message(item, f"messages[{place}]", called) for place, item in enumerate(value)
    )
    if messages[-1]["role"] == "assistant":
        raise wrong(
            "messages", "end with an assistant's turn; an answer follows a user's. Remove the last."
        )
    return messages


def _message(value: Any, place: str, called: set[str]) -> Message:
    if not isinstance(value, dict):
        raise wrong(place, 'must be an object such as {"role": "user", "content": "Hello"}.')
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{place}.role", f"is {shown(role)}; it must be one of {[*ROLES]}.")
    known = {"role", "content"} | OF_ROLE.get(role, set())
    for key, content in value.items():
        if key not in known and content not in EMPTY:
            has = ", ".join(sorted(known))
            raise wrong(f"{place}.{key}", f"is not supported: here {role} messages have {has}.")
    content = value.get("content")
    message: Message = {"role": ROLES[role], "content": ""}
    if value.get("tool_calls"):
        message["tool_calls"] = _calls(value["tool_calls"], f"{place}.tool_calls", called)
        if content in (None, "", []):
            return message
    if role == "tool" and value.get("tool_call_id") not in called:
        found = shown(value.get("tool_call_id"))
        raise wrong(f"{place}.tool_call_id", f"is {found}; no call before it has that id.")
    message["content"] = _content(content, f"{place}.content")
    return message


def _calls(value: Any, place: str, called: set[str]) -> list[ToolCall]:
    """Calls of an earlier answer. Their ids are added to ``called``."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("id"), str):
            raise wrong(place, "must be a list of calls with id, type and function.")
        called.add(item["id"])
    _check_encodable(value, place)
    try:
        (turn,) = read_turns([{"role": "assistant", "content": "", "tool_calls": value}], "it")
    except BadRow as error:
        raise wrong(place, f"cannot be read: {error.problem}") from None
    return turn["tool_calls"]


def read_tool_list(value: Any, param: str) -> Tools:
    """The functions that may be called. Errors: ApiError."""
    if not isinstance(value, list):
        raise wrong(param, f"is {shown(value)}; it must be a list of functions.")
    for number, item in enumerate(value):
        place = f"{param}[{number}]"
        if not isinstance(item, dict) or item.get("type") != "function":
            raise wrong(place, "must be an object of the type function; there are no others here.")
        function = item.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"{place}.function", "must be an object with a name.")
        more = set(item) - {"type", "function"} | (
            set(function) - {"name", "description", "parameters", "strict"}
        )
        if more:
            raise wrong(place, f"has {sorted(more)[0]!r}, which is not known here.")
        if function.get("strict"):
            raise wrong(f"{place}.function.strict", "is not supported: calls are read, not forced.")
        _check_encodable(item, place)
    functions = [
        {key: item for key, item in tool["function"].items() if key != "strict"} for tool in value
    ]
    return read_tools({"tools": functions}) or []


def _check_encodable(value: Any, place: str) -> None:
    encodable(json.dumps(value, ensure_ascii=False), place)


def _content(value: Any, place: str) -> str:
    parts = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            kind = part.get("type") if isinstance(part, dict) else part
            raise wrong(place, f"holds a part of type {shown(kind)}; these models read text.")
        if not isinstance(part.get("text"), str):
            raise wrong(place, f"is {shown(part.get('text'))}; it must be a text.")
        texts.append(encodable(part["text"], place))
    return "".join(texts)


def encodable(text: str, place: str) -> str:
    """The text itself, if it can be written down. Errors: ApiError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise wrong(
            place, f"is not Unicode text: half a surrogate pair at character {error.start}."
        ) from None
    return text


def read_prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    is_one = isinstance(value, str) or (
        isinstance(value, list) and value and all(_is_id(item) for item in value)
    )
    prompts: list[str | tuple[int, ...]] = []
    for item in [value] if is_one else value if isinstance(value, list) else []:
        if isinstance(item, str):
            prompts.append(encodable(item, "prompt"))
        elif isinstance(item, list) and all(_is_id(id_) for id_ in item):
            prompts.append(tuple(item))
        else:
            prompts = []
            break
    if not prompts:
        raise wrong(
            "prompt", "must be a text, a list of texts, token ids, or a list of lists of token ids."
        )
    return tuple(prompts)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
