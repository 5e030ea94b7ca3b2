"""OpenAI's API as JSON: bodies in, checked requests out; answers in, their objects out; errors.

Every parameter that OpenAI documents stands in one of the dictionaries below, and is honoured or
refused with a reason. None is ignored; one that nobody knows is refused with the nearest known.
``null`` means that a parameter was left out.
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olmo_base.run.errors import UserError
from open_instruct.chat.engine import MAX_TOP_LOGPROBS, Delta, Sampling, Token, TokenNames
from open_instruct.examples import Message

MAX_STOPS = 16
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions when it is left out, as OpenAI's


class ApiError(Exception):
    """A refusal in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kinds = {429: "rate_limit_error", 401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _wrong(param: str, problem: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"{param} {problem}", param=param, code=code)


# ---------------------------------------------------------------- values


def _number(value: Any, param: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise _wrong(param, f"is {_shown(value)}; it must be a number.")
    return value


def _whole(value: Any, param: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(param, f"is {_shown(value)}; it must be a whole number.")
    return value


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(param, f"is {_shown(value)}; it must be true or false.")
    return value


def _stops(value: Any, param: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _wrong(param, f"is {_shown(value)}; it must be a text or a list of texts.")
    if len(texts) > MAX_STOPS:
        raise _wrong(param, f"holds {len(texts)} texts; at most {MAX_STOPS} are looked for.")
    return tuple(texts)


def _bias(value: Any, param: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise _wrong(param, 'must be an object such as {"50": -100}: token id, then a number.')
    biases = []
    for id_, number in value.items():
        if not id_.isascii() or not id_.isdigit():
            raise _wrong(param, f"has the key {_shown(id_)}; keys are token ids.")
        bias = _number(number, f"logit_bias[{id_}]")
        if not -100 <= bias <= 100:
            raise _wrong(param, f"is {bias} for token {id_}; it must be from -100 to 100.")
        biases.append((int(id_), float(bias)))
    return tuple(biases)


def _stream_options(value: Any, param: str) -> bool:
    """Whether the last event of a stream carries the usage."""
    if not isinstance(value, dict):
        raise _wrong(param, 'must be an object such as {"include_usage": true}.')
    for key, content in value.items():
        if key == "include_usage":
            continue
        if key == "include_obfuscation" and content is False:
            continue
        raise _wrong(param, f"has {key!r}; only include_usage is known here.")
    return _flag(value.get("include_usage", False), "stream_options.include_usage")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- which parameters there are

Reader = Callable[[Any, str], Any]  # (value, parameter) -> the checked value

SAMPLING: dict[str, Reader] = {
    "temperature": _number,
    "top_p": _number,
    "top_k": _whole,
    "min_p": _number,
    "max_tokens": _whole,
    "stop": _stops,
    "seed": _whole,
    "frequency_penalty": _number,
    "presence_penalty": _number,
    "logit_bias": _bias,
}
BOTH: dict[str, Reader] = {
    "n": _whole,
    "stream": _flag,
    "stream_options": _stream_options,
    **SAMPLING,
}
CHAT: dict[str, Reader] = {
    "max_completion_tokens": _whole,
    "logprobs": _flag,
    "top_logprobs": _whole,
    **BOTH,
}
COMPLETION: dict[str, Reader] = {"logprobs": _whole, **BOTH}

# Values at which a parameter asks for nothing that is not done anyway, and why others are refused.
Refusal = tuple[tuple[Any, ...], str]

NO_TOOLS = "no chat template served here can write tools or read their calls"
NO_RECORDS = "this server keeps no records of who asks what; leave it out"
NO_REASONING = "these models have no such setting; leave it out"
OPENAI_ONLY = "this is a service of OpenAI's own platform; leave it out"

CHAT_REFUSED: dict[str, Refusal] = {
    "response_format": (
        ({"type": "text"},),
        "answers cannot be held to a form here, so nothing but text is promised",
    ),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none",), NO_TOOLS),
    "parallel_tool_calls": ((), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none",), NO_TOOLS),
    "modalities": ((["text"],), "these models write text only"),
    "audio": ((), "these models write text only"),
    "prediction": ((), "predicted outputs are not used here; leave it out"),
    "reasoning_effort": ((), NO_REASONING),
    "verbosity": ((), NO_REASONING),
    "store": ((False,), NO_RECORDS),
    "metadata": (({},), NO_RECORDS),
    "user": ((), NO_RECORDS),
    "safety_identifier": ((), NO_RECORDS),
    "moderation": ((), OPENAI_ONLY),
    "prompt_cache_key": ((), "prompts that begin alike are found by their tokens; leave it out"),
    "prompt_cache_options": ((), "what is kept of prompts cannot be chosen; leave it out"),
    "prompt_cache_retention": ((), "what is kept of prompts cannot be chosen; leave it out"),
    "service_tier": (("auto", "default"), OPENAI_ONLY),
    "web_search_options": ((), OPENAI_ONLY),
}
COMPLETION_REFUSED: dict[str, Refusal] = {
    "best_of": ((1,), "ask for n answers and choose among them"),
    "echo": ((False,), "the prompt is not repeated in the answer"),
    "suffix": ((), "these models only go on from a prompt; they do not fill a gap"),
    "user": ((), NO_RECORDS),
}


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """What both endpoints ask for. ``max_tokens`` None: as many as the context holds."""

    model: str
    num_answers: int
    stream: bool
    include_usage: bool
    settings: dict[str, Any]  # of Sampling, without max_tokens
    max_tokens: int | None
    messages: tuple[Message, ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()

    def sampling(self, room: int) -> Sampling:
        """How answers are drawn when ``room`` tokens are left. Errors: ApiError."""
        limit = room if self.max_tokens is None else self.max_tokens
        try:
            return Sampling(max_tokens=limit, **self.settings)
        except UserError as error:
            name = str(error).split()[0]
            raise ApiError(400, str(error), param=name) from None


def chat_request(body: Any) -> Request:
    """The body of /v1/chat/completions. Errors: ApiError."""
    values = _read(body, CHAT, CHAT_REFUSED, "messages")
    if "max_tokens" in values and "max_completion_tokens" in values:
        raise _wrong("max_tokens", "and max_completion_tokens mean the same; give one of them.")
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    top = values.pop("top_logprobs", None)
    wants_logprobs = values.pop("logprobs", False)
    if top is not None and not wants_logprobs:
        raise _wrong("top_logprobs", "needs logprobs: true beside it.")
    if wants_logprobs:
        values["logprobs"] = _within("top_logprobs", top or 0, 0, MAX_TOP_LOGPROBS)
    return _request(body["model"], values, messages=_messages(body["messages"]))


def completion_request(body: Any) -> Request:
    """The body of /v1/completions. Errors: ApiError."""
    values = _read(body, COMPLETION, COMPLETION_REFUSED, "prompt")
    values.setdefault("max_tokens", COMPLETION_TOKENS)
    if "logprobs" in values:
        _within("logprobs", values["logprobs"], 0, MAX_TOP_LOGPROBS)
    return _request(body["model"], values, prompts=_prompts(body["prompt"]))


def _within(param: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise _wrong(param, f"is {value}; it must be from {low} to {high}.")
    return value


def _request(
    model: str,
    values: dict[str, Any],
    messages: tuple[Message, ...] = (),
    prompts: tuple[str | tuple[int, ...], ...] = (),
) -> Request:
    stream = values.pop("stream", False)
    if "stream_options" in values and not stream:
        raise _wrong("stream_options", "needs stream: true beside it.")
    include_usage = values.pop("stream_options", False)
    num_answers = _within("n", values.pop("n", 1), 1, 64)
    max_tokens = values.pop("max_tokens", None)
    if max_tokens is not None and max_tokens < 1:
        raise _wrong("max_tokens", f"is {max_tokens}; it must be at least 1.")
    request = Request(
        model, num_answers, stream, include_usage, values, max_tokens, messages, prompts
    )
    request.sampling(1)  # values out of range are refused before anything is encoded
    return request


def _read(
    body: Any, readers: Mapping[str, Reader], refused: Mapping[str, Refusal], content: str
) -> dict[str, Any]:
    """The checked values of a body; ``model`` and the content are there, and left to the caller."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    values = {}
    for param, value in body.items():
        if param in ("model", content) or value is None:
            continue
        if param in readers:
            values[param] = readers[param](value, param)
        elif param in refused:
            neutral, reason = refused[param]
            if not any(value == item and type(value) is type(item) for item in neutral):
                raise ApiError(
                    400,
                    f"{param}: {_shown(value)} is not supported: {reason}.",
                    param=param,
                    code="unsupported_parameter",
                )
        else:
            near = difflib.get_close_matches(param, [*readers, *refused, "model", content], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ApiError(
                400, f"Unknown parameter: {_shown(param)}.{hint}", param=param[:80],
                code="unknown_parameter",
            )  # fmt: skip
    if not isinstance(body.get("model"), str):
        raise _wrong("model", "is missing: name one of /v1/models.")
    if body.get(content) is None:
        raise _wrong(content, "is missing.")
    return values


# ---------------------------------------------------------------- what is asked

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
EMPTY: tuple[Any, ...] = (None, [], {})  # what clients send back of an earlier answer's other keys


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "must be a list of at least one message.")
    messages = tuple(_message(item, f"messages[{place}]") for place, item in enumerate(value))
    if messages[-1]["role"] == "assistant":
        raise _wrong(
            "messages", "end with an assistant's turn; an answer follows a user's. Remove the last."
        )
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise _wrong(place, 'must be an object such as {"role": "user", "content": "Hello"}.')
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        reason = f": {NO_TOOLS}" if role in ("tool", "function") else ""
        raise _wrong(f"{place}.role", f"is {_shown(role)}; it must be one of {[*ROLES]}{reason}.")
    for key, content in value.items():
        if key not in ("role", "content") and content not in EMPTY:
            raise _wrong(
                f"{place}.{key}", "is not supported: a message has a role and a content here."
            )
    return {"role": ROLES[role], "content": _content(value.get("content"), f"{place}.content")}


def _content(value: Any, place: str) -> str:
    parts = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            kind = part.get("type") if isinstance(part, dict) else part
            raise _wrong(place, f"holds a part of type {_shown(kind)}; these models read text.")
        if not isinstance(part.get("text"), str):
            raise _wrong(place, f"is {_shown(part.get('text'))}; it must be a text.")
        texts.append(encodable(part["text"], place))
    return "".join(texts)


def encodable(text: str, place: str) -> str:
    """The text itself, if it can be written down. Errors: ApiError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _wrong(
            place, f"is not Unicode text: half a surrogate pair at character {error.start}."
        ) from None
    return text


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
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
        raise _wrong(
            "prompt", "must be a text, a list of texts, token ids, or a list of lists of token ids."
        )
    return tuple(prompts)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------- answers in OpenAI's shape


class ChatShape:
    """The objects of /v1/chat/completions."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, names: TokenNames, asked: Request) -> None:
        self.names = names
        self.wants_logprobs = "logprobs" in asked.settings

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A choice of a stream's event."""
        has_content = delta.text or (delta.tokens and self.wants_logprobs)
        content = {"content": delta.text} if has_content else {}
        return {
            "index": index,
            "delta": content,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": delta.finish_reason,
        }

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        """A choice of a whole answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(*pair) for pair in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id_: int, logprob: float | None) -> dict[str, Any]:
        content = self.names.bytes_of(id_)
        return {
            "token": content.decode("utf-8", "replace"),
            "logprob": logprob,
            "bytes": list(content),
        }


class CompletionShape:
    """The objects of /v1/completions."""

    prefix, whole, piece = "cmpl-", "text_completion", "text_completion"

    def __init__(self, names: TokenNames, asked: Request) -> None:
        self.names = names
        self.wants_logprobs = "logprobs" in asked.settings
        self.offsets: Counter[int] = Counter()  # characters of each choice so far

    def opening(self, index: int) -> dict[str, Any] | None:
        """A stream begins with text."""
        return None

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A choice of a stream's event."""
        return self._choice(index, delta.text, delta.tokens, delta.finish_reason)

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        """A choice of a whole answer."""
        return self._choice(index, text, tokens, reason)

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": reason,
        }
        if self.wants_logprobs:
            offsets = []
            for token in tokens:
                offsets.append(self.offsets[index])
                self.offsets[index] += self._num_characters(token.id)
            choice["logprobs"] = {
                "tokens": [self._name(token.id) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    {self._name(id_): logprob for id_, logprob in token.alternatives}
                    for token in tokens
                ],
                "text_offset": offsets,
            }
        return choice

    def _name(self, id_: int) -> str:
        """Its text; a part of a character is written in bytes, so that no two are the same."""
        content = self.names.bytes_of(id_)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _num_characters(self, id_: int) -> int:
        """Characters that begin in it; control tokens are not shown."""
        if id_ in self.names.special:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.names.bytes_of(id_))
