"""OpenAI's API as JSON: bodies in, checked requests out; answers in, their objects out; errors.

Every parameter that OpenAI documents stands in one of the dictionaries below, and is honoured or
refused with a reason. None is ignored; one that nobody knows is refused with the nearest known.
``null`` means that a parameter was left out.
"""

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from olmo_base.run.errors import UserError
from open_instruct.chat.engine import Delta
from open_instruct.chat.forms import ANY_OBJECT
from open_instruct.chat.messages import read_messages, read_prompts, read_tool_list
from open_instruct.chat.refusals import ApiError, shown, wrong
from open_instruct.chat.sampling import MAX_TOP_LOGPROBS, Sampling
from open_instruct.chat.token_text import Token, TokenNames
from open_instruct.chat.tool_calls import CallReader, split_calls
from open_instruct.turns import Message, Tools

MAX_STOPS = 16
COMPLETION_TOKENS = 16  # max_tokens of /v1/completions when it is left out, as OpenAI's


# ---------------------------------------------------------------- values


def _number(value: Any, param: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise wrong(param, f"is {shown(value)}; it must be a number.")
    return value


def _whole(value: Any, param: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong(param, f"is {shown(value)}; it must be a whole number.")
    return value


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(param, f"is {shown(value)}; it must be true or false.")
    return value


def _stops(value: Any, param: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong(param, f"is {shown(value)}; it must be a text or a list of texts.")
    if len(texts) > MAX_STOPS:
        raise wrong(param, f"holds {len(texts)} texts; at most {MAX_STOPS} are looked for.")
    return tuple(texts)


def _bias(value: Any, param: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise wrong(param, 'must be an object such as {"50": -100}: token id, then a number.')
    biases = []
    for id_, number in value.items():
        if not id_.isascii() or not id_.isdigit():
            raise wrong(param, f"has the key {shown(id_)}; keys are token ids.")
        bias = _number(number, f"logit_bias[{id_}]")
        if not -100 <= bias <= 100:
            raise wrong(param, f"is {bias} for token {id_}; it must be from -100 to 100.")
        biases.append((int(id_), float(bias)))
    return tuple(biases)


def _stream_options(value: Any, param: str) -> bool:
    """Whether the last event of a stream carries the usage."""
    if not isinstance(value, dict):
        raise wrong(param, 'must be an object such as {"include_usage": true}.')
    for key, content in value.items():
        if key == "include_usage":
            continue
        if key == "include_obfuscation" and content is False:
            continue
        raise wrong(param, f"has {key!r}; only include_usage is known here.")
    return _flag(value.get("include_usage", False), "stream_options.include_usage")


def _schema(value: Any, param: str) -> Any:
    """The JSON schema of an answer; None for plain text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if value == {"type": "text"}:
        return None
    if value == {"type": "json_object"}:
        return ANY_OBJECT
    if kind != "json_schema" or set(value) - {"type", "json_schema"}:
        raise wrong(param, f"is {shown(value)}; its type is text, json_object or json_schema.")
    form = value.get("json_schema")
    if not isinstance(form, dict) or not isinstance(form.get("schema"), dict):
        raise wrong(f"{param}.json_schema", "must be an object with a schema, which is an object.")
    for key, content in form.items():
        if key not in ("name", "schema", "strict") and content is not None:
            raise wrong(f"{param}.json_schema.{key}", "is not read here; put it into a message.")
    return form["schema"]


def _tool_choice(value: Any, param: str) -> bool:
    """Whether tools may be called."""
    if value not in ("auto", "none"):
        raise ApiError(
            400,
            f"{param}: {shown(value)} is not supported: a call cannot be forced; auto and none can "
            "be chosen.",
            param=param,
            code="unsupported_parameter",
        )
    return bool(value == "auto")


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
    "response_format": _schema,
    "tools": read_tool_list,
    "tool_choice": _tool_choice,
    "max_completion_tokens": _whole,
    "logprobs": _flag,
    "top_logprobs": _whole,
    **BOTH,
}
COMPLETION: dict[str, Reader] = {"logprobs": _whole, "echo": _flag, **BOTH}

# Values at which a parameter asks for nothing that is not done anyway, and why others are refused.
Refusal = tuple[tuple[Any, ...], str]

OLD_TOOLS = "it was replaced by tools and tool_choice; use those"
NO_RECORDS = "this server keeps no records of who asks what; leave it out"
NO_REASONING = "these models have no such setting; leave it out"
OPENAI_ONLY = "this is a service of OpenAI's own platform; leave it out"

CHAT_REFUSED: dict[str, Refusal] = {
    "parallel_tool_calls": ((True,), "a model may call several tools in one answer"),
    "functions": (([],), OLD_TOOLS),
    "function_call": (("none",), OLD_TOOLS),
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
    tools: Tools | None = None
    schema: Any = None  # the JSON schema that answers are held to
    echo: bool = False  # the prompt comes back, scored; max_tokens is then 0 or 1

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
        raise wrong("max_tokens", "and max_completion_tokens mean the same; give one of them.")
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    top = values.pop("top_logprobs", None)
    wants_logprobs = values.pop("logprobs", False)
    if top is not None and not wants_logprobs:
        raise wrong("top_logprobs", "needs logprobs: true beside it.")
    if wants_logprobs:
        values["logprobs"] = _within("top_logprobs", top or 0, 0, MAX_TOP_LOGPROBS)
    schema = values.pop("response_format", None)
    tools = values.pop("tools", None) or None
    if "tool_choice" in values and not tools and values["tool_choice"]:
        raise wrong("tool_choice", "needs tools beside it.")
    if not values.pop("tool_choice", True):
        tools = None  # the model is not told of them, so it calls none
    if tools and schema is not None:
        raise wrong("response_format", "and tools cannot be asked for together: a call is no JSON.")
    request = _request(body["model"], values, messages=read_messages(body["messages"]))
    return replace(request, tools=tools, schema=schema)


def completion_request(body: Any) -> Request:
    """The body of /v1/completions. Errors: ApiError."""
    values = _read(body, COMPLETION, COMPLETION_REFUSED, "prompt")
    values.setdefault("max_tokens", COMPLETION_TOKENS)
    if "logprobs" in values:
        _within("logprobs", values["logprobs"], 0, MAX_TOP_LOGPROBS)
    if values.pop("echo", False):
        return _echo_request(body, values)
    return _request(body["model"], values, prompts=read_prompts(body["prompt"]))


# What changes nothing where no token is drawn by chance.
ECHO_SETTINGS = {"logprobs", "max_tokens", "temperature", "seed", "top_p", "top_k", "min_p"}
ECHO_ONLY_SCORES = "echo repeats given text to score it"


def _echo_request(body: Any, values: dict[str, Any]) -> Request:
    """A prompt to be scored, with at most the likeliest next token."""
    refused = [
        (values.pop("stream", False), "stream", "it comes at once; leave stream out"),
        (values.pop("n", 1) != 1, "n", "all answers would be the same; leave n out"),
        (
            values["max_tokens"] > 1,
            "max_tokens",
            "max_tokens must be 0 or 1; ask for a continuation without echo",
        ),
        (
            values["max_tokens"] == 1 and values.get("temperature") != 0,
            "temperature",
            "the next token is the likeliest; set temperature to 0, or max_tokens to 0",
        ),
        *((True, name, f"leave {name} out") for name in values.keys() - ECHO_SETTINGS),
    ]
    for is_so, param, reason in refused:
        if is_so:
            raise ApiError(
                400,
                f"{param}: {ECHO_ONLY_SCORES}: {reason}.",
                param=param,
                code="unsupported_parameter",
            )
    num_new = values.pop("max_tokens")
    _within("max_tokens", num_new, 0, 1)
    request = _request(body["model"], values, prompts=read_prompts(body["prompt"]))
    return replace(request, max_tokens=num_new, echo=True)


def _within(param: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise wrong(param, f"is {value}; it must be from {low} to {high}.")
    return value


def _request(
    model: str,
    values: dict[str, Any],
    messages: tuple[Message, ...] = (),
    prompts: tuple[str | tuple[int, ...], ...] = (),
) -> Request:
    stream = values.pop("stream", False)
    if "stream_options" in values and not stream:
        raise wrong("stream_options", "needs stream: true beside it.")
    include_usage = values.pop("stream_options", False)
    num_answers = _within("n", values.pop("n", 1), 1, 64)
    max_tokens = values.pop("max_tokens", None)
    if max_tokens is not None and max_tokens < 1:
        raise wrong("max_tokens", f"is {max_tokens}; it must be at least 1.")
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
                    f"{param}: {shown(value)} is not supported: {reason}.",
                    param=param,
                    code="unsupported_parameter",
                )
        else:
            near = difflib.get_close_matches(param, [*readers, *refused, "model", content], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ApiError(
                400, f"Unknown parameter: {shown(param)}.{hint}", param=param[:80],
                code="unknown_parameter",
            )  # fmt: skip
    if not isinstance(body.get("model"), str):
        raise wrong("model", "is missing: name one of /v1/models.")
    if body.get(content) is None:
        raise wrong(content, "is missing.")
    return values


# ---------------------------------------------------------------- answers in OpenAI's shape


class ChatShape:
    """The objects of /v1/chat/completions."""

    prefix, whole, piece = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, names: TokenNames, asked: Request) -> None:
        self.names = names
        self.wants_logprobs = "logprobs" in asked.settings
        self.readers = defaultdict[int, CallReader](CallReader) if asked.tools else None

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the text."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A choice of a stream's event."""
        text, reason = delta.text, delta.finish_reason
        calls: list[dict[str, Any]] = []
        if self.readers is not None:
            text = self.readers[index].push(text)
            if reason is not None:
                rest, calls = self.readers[index].finish()
                text += rest
        content: dict[str, Any] = {}
        if text or (delta.tokens and self.wants_logprobs):
            content["content"] = text
        if calls:
            content["tool_calls"] = [{"index": at, **call} for at, call in enumerate(calls)]
        return {
            "index": index,
            "delta": content,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": "tool_calls" if calls and reason == "stop" else reason,
        }

    def choice(self, index: int, text: str, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        """A choice of a whole answer."""
        said, calls = (text, []) if self.readers is None else split_calls(text)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if calls:
            message |= {"content": said or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": "tool_calls" if calls and reason == "stop" else reason,
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
                    None  # the first token of an echo: nothing stands before it
                    if token.logprob is None
                    else {self._name(id_): logprob for id_, logprob in token.alternatives}
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
