"""An OpenAI-compatible server, and the chat page: HTTP in, answers of the engine out.

    bytes -> JSON -> protocol.Request -> token ids -> Engine -> Delta -> JSON, or events of a stream

Nothing leaves this machine but answers to requests: no telemetry, no fonts or scripts from
elsewhere. A browser's other pages are kept out: no CORS unless asked, foreign origins and foreign
host names are refused, and only JSON bodies are read.
"""

import asyncio
import hmac
import importlib.resources
import ipaddress
import json
import os
import secrets
import socket
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    MutableMapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from olmo_base.model.generate import Generator, load_generator
from olmo_base.run.errors import UserError
from open_instruct.chat.engine import (
    MAX_WAITING,
    Closing,
    Delta,
    Engine,
    QueueFull,
    Token,
    TokenNames,
)
from open_instruct.chat.protocol import (
    ApiError,
    ChatShape,
    CompletionShape,
    chat_request,
    completion_request,
    encodable,
)
from open_instruct.chat.protocol import Request as Asked
from open_instruct.chat.voices import API_KEY_VARIABLE
from open_instruct.encode import ChatEncoder, load_chat_encoder

MAX_BODY_BYTES = 4 * 2**20
SMALL_MODEL = 10_000_000  # weights; a step of one row is then below a few milliseconds
PAGE_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "app.js": ("app.js", "text/javascript; charset=utf-8"),
    "markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "style.css": ("style.css", "text/css; charset=utf-8"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}
SAFE_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Settings:
    """How the server is reached and by whom. ``api_key`` None lets everyone in."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    votes: Path = Path("preferences.jsonl")
    max_waiting: int = MAX_WAITING
    max_body_bytes: int = MAX_BODY_BYTES


# ---------------------------------------------------------------- a model that is served


class Served:
    """A model with its engine and, if it was tuned on dialogues, its chat template."""

    def __init__(self, name: str, generator: Generator, max_waiting: int) -> None:
        self.name = name
        self.created = int(time.time())
        self.encoder: ChatEncoder | None = None
        self.no_chat = ""
        try:
            self.encoder = load_chat_encoder(generator.source or name, None)
            generator.tokenizer = self.encoder.tokenizer  # read once
        except UserError as error:
            self.no_chat = str(error)
        self.tokenizer = generator.tokenizer
        stop_ids = self.encoder.end_of_turn_ids if self.encoder else set()
        self.engine = Engine(generator, stop_ids=stop_ids, max_waiting=max_waiting)
        self.encoding = ThreadPoolExecutor(1, "encode")  # long prompts must not stop the server
        self.first_token_seconds = 0.0
        self.num_first_tokens = 0

    async def prompts(self, asked: Asked) -> list[list[int]]:
        """The token ids of each prompt. Errors: ApiError."""
        if asked.messages and self.encoder is None:
            raise ApiError(400, f"{self.no_chat} /v1/completions needs no template.", param="model")
        length = self.engine.max_length
        if len(asked.messages) > length:
            raise _too_long(f"There are {len(asked.messages)} messages", "messages", length)
        loop = asyncio.get_running_loop()
        try:
            prompts = await loop.run_in_executor(self.encoding, self._encode, asked)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from None
        param = "messages" if asked.messages else "prompt"
        for prompt in prompts:
            limit = 1 if asked.max_tokens is None else asked.max_tokens
            if len(prompt) + limit > length:
                more = "" if asked.max_tokens is None else f" and asks for up to {limit} more"
                raise _too_long(f"The prompt has {len(prompt)} tokens{more}", param, length)
        return prompts

    def _encode(self, asked: Asked) -> list[list[int]]:
        if asked.messages:
            assert self.encoder is not None
            return [self.encoder.encode_prompt(asked.messages)]
        return [
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in asked.prompts
        ]


def _too_long(found: str, param: str, length: int) -> ApiError:
    return ApiError(
        400,
        f"{found}; this model's context holds {length}, the answer included. Shorten the "
        f"{param} or ask for fewer tokens.",
        param=param,
        code="context_length_exceeded",
    )


# ---------------------------------------------------------------- from the engine's thread to ours


class Mailbox:
    """Carries what engines deliver into the event loop, waking it once for all that came."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.letters: deque[tuple[asyncio.Queue, Any]] = deque()
        self.lock = threading.Lock()
        self.is_woken = False

    def put(self, queue: asyncio.Queue, letter: Any) -> None:
        """From any thread."""
        with self.lock:
            self.letters.append((queue, letter))
            if self.is_woken:
                return
            self.is_woken = True
        self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self.lock:
            letters, self.letters = self.letters, deque()
            self.is_woken = False
        for queue, letter in letters:
            queue.put_nowait(letter)


class Run:
    """The answers to one HTTP request on their way. ``cancel`` it whatever happens."""

    def __init__(self, served: Served, asked: Asked, prompts: list[list[int]], mailbox: Mailbox):
        self.served = served
        self.prompts = prompts
        self.num_answers = asked.num_answers
        self.queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.num_open = len(prompts) * asked.num_answers
        self.num_completion_tokens = 0
        self.began = time.monotonic()
        self.tickets = []
        most = served.engine.max_waiting
        if self.num_open > most:
            raise ApiError(400, f"This asks for {self.num_open} answers; at most {most} can wait.")
        try:
            for place, prompt in enumerate(prompts):
                self.tickets.append(
                    served.engine.submit(
                        prompt,
                        asked.sampling(served.engine.max_length - len(prompt)),
                        self._delivery(place, mailbox),
                        asked.num_answers,
                    )
                )
        except QueueFull:
            self.cancel()
            raise ApiError(
                429,
                f"{served.engine.num_waiting} answers wait already. Try again later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except Closing:
            raise _closing() from None
        except UserError as error:
            self.cancel()
            raise ApiError(400, str(error)) from None

    def _delivery(self, place: int, mailbox: Mailbox) -> Callable[[Delta], None]:
        return lambda delta: mailbox.put(self.queue, (place, delta))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the choice, what became known of it) until all are finished.

        Errors: ApiError if the model failed.
        """
        is_first = True
        while self.num_open:
            place, delta = await self.queue.get()
            if is_first:
                self.served.first_token_seconds += time.monotonic() - self.began
                self.served.num_first_tokens += 1
                is_first = False
            if delta.error is not None:
                raise ApiError(500, delta.error, code="model_failed")
            if delta.finish_reason is not None:
                self.num_open -= 1
                self.num_completion_tokens += delta.num_tokens
            yield place * self.num_answers + delta.index, delta

    def cancel(self) -> None:
        """Nothing more of it is computed. Harmless where all is finished."""
        for ticket in self.tickets:
            if ticket.num_open:
                self.served.engine.cancel(ticket)

    def usage(self) -> dict[str, int]:
        """Token counts in OpenAI's shape; an end token counts as generated."""
        num_prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": num_prompt + self.num_completion_tokens,
        }


def _closing() -> ApiError:
    return ApiError(
        503, "The server is stopping and takes no new requests.", code="shutting_down",
        headers={"Connection": "close"},
    )  # fmt: skip


# ---------------------------------------------------------------- streams and clients that leave


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Awaitable[None]) -> bool:
    """Do the work unless the client leaves before it is done; whether it was done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, until they end or the client leaves."""

    def __init__(self, events: AsyncIterator[Any], run: Run) -> None:
        super().__init__()
        self.events = events
        self.run = run

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application of one response."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
        ]

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self.events:
                data = event if isinstance(event, str) else _json(event)
                body = f"data: {data}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await while_connected(receive, write())
        finally:
            self.run.cancel()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---------------------------------------------------------------- the server


@dataclass
class Server:
    """The models and what is known of the requests to them."""

    models: dict[str, Served]
    settings: Settings
    is_closing: bool = False
    num_active: int = 0
    responses: Counter[tuple[str, int]] = field(default_factory=Counter)  # (path, status)
    on_idle: Callable[[], None] = lambda: None  # called when the last request ends while closing
    votes_lock: threading.Lock = field(default_factory=threading.Lock)
    mailbox: Mailbox | None = None

    def _mailbox(self) -> Mailbox:
        """One for all requests, made in the loop that serves them."""
        if self.mailbox is None:
            self.mailbox = Mailbox(asyncio.get_running_loop())
        return self.mailbox

    # ------------------------------------------------ answers

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, chat_request, ChatShape)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, completion_request, CompletionShape)

    async def _answer(
        self,
        request: Request,
        read: Callable[[Any], Asked],
        new_shape: Callable[[TokenNames, Asked], ChatShape | CompletionShape],
    ) -> Response:
        asked = read(await self._body(request))
        served = self._model(asked.model)
        shape = new_shape(served.engine.names, asked)
        prompts = await served.prompts(asked)
        run = Run(served, asked, prompts, self._mailbox())
        head = {
            "id": shape.prefix + uuid.uuid4().hex,
            "object": shape.piece if asked.stream else shape.whole,
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            return EventStream(self._events(run, asked, shape, head), run)
        texts: dict[int, list[str]] = {}
        tokens: dict[int, list[Token]] = {}
        reasons: dict[int, str] = {}

        async def gather() -> None:
            async for index, delta in run.deltas():
                texts.setdefault(index, []).append(delta.text)
                tokens.setdefault(index, []).extend(delta.tokens)
                if delta.finish_reason is not None:
                    reasons[index] = delta.finish_reason

        try:
            is_done = await while_connected(request.receive, gather())
        finally:
            run.cancel()
        if not is_done:
            return Response(status_code=499)  # nobody reads it; the number is what proxies log
        choices = [
            shape.choice(index, "".join(texts[index]), tokens[index], reasons[index])
            for index in sorted(reasons)
        ]
        return JSONResponse({**head, "choices": choices, "usage": run.usage()})

    async def _events(
        self, run: Run, asked: Asked, shape: ChatShape | CompletionShape, head: dict[str, Any]
    ) -> AsyncIterator[Any]:
        extra = {"usage": None} if asked.include_usage else {}
        for index in range(run.num_open):
            if (choice := shape.opening(index)) is not None:
                yield {**head, "choices": [choice], **extra}
        try:
            async for index, delta in run.deltas():
                if not (delta.text or delta.finish_reason or shape.wants_logprobs):
                    continue  # a part of a character
                yield {**head, "choices": [shape.chunk(index, delta)], **extra}
        except ApiError as error:
            yield error.body
            return
        if asked.include_usage:
            yield {**head, "choices": [], "usage": run.usage()}
        yield "[DONE]"

    def _model(self, name: str) -> Served:
        if name not in self.models:
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here. Served: {', '.join(self.models)}.",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    async def _body(self, request: Request) -> Any:
        """The request's JSON. Errors: ApiError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "The body must be sent as Content-Type: application/json.")
        limit = self.settings.max_body_bytes
        too_large = ApiError(
            413, f"The body is larger than {limit} bytes.", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise too_large
        try:
            return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            raise ApiError(400, f"The body is not UTF-8 at byte {error.start}.") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not valid JSON: {error}.", code="bad_json") from None

    # ------------------------------------------------ about the server

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [*map(_card, self.models.values())]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/{name}"""
        return JSONResponse(_card(self._model(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while requests are taken."""
        status = "stopping" if self.is_closing else "ok"
        body = {"status": status, "models": [*self.models]}
        return JSONResponse(body, status_code=503 if self.is_closing else 200)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, in Prometheus' text format."""
        return PlainTextResponse(
            metrics_text(self), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    # ------------------------------------------------ the page

    async def page(self, request: Request) -> Response:
        """GET / and the files of the page."""
        name = request.path_params.get("file", "")
        if name not in PAGE_FILES:
            raise ApiError(404, f"There is no /page/{name[:100]}.")
        file, kind = PAGE_FILES[name]
        folder = importlib.resources.files("open_instruct.chat") / "page"
        return Response((folder / file).read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    async def rendered_prompt(self, request: Request) -> Response:
        """POST /page/prompt: what a model really reads for the body of a chat request."""
        asked = chat_request(await self._body(request))
        served = self._model(asked.model)
        (ids,) = await served.prompts(asked)
        names = served.engine.names
        tokens = [
            {
                "id": id_,
                "text": names.bytes_of(id_).decode("utf-8", "replace"),
                "bytes": list(names.bytes_of(id_)),
                "is_control": id_ in names.special,
            }
            for id_ in ids
        ]
        text = served.tokenizer.decode(ids, skip_special_tokens=False)
        return JSONResponse({"text": text, "tokens": tokens, "context": served.engine.max_length})

    async def vote(self, request: Request) -> Response:
        """POST /page/vote: one pair for the preference stage, added to a file."""
        row = pair_row(await self._body(request))
        try:
            with self.votes_lock:
                append_row(self.settings.votes, row)
        except OSError as error:
            raise ApiError(
                500, f"{self.settings.votes} cannot be written: {error.strerror}."
            ) from None
        return JSONResponse({"file": str(self.settings.votes)})

    def close(self) -> None:
        """End the engines."""
        for served in self.models.values():
            served.engine.close()
            served.encoding.shutdown()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "open-instruct",
        "max_model_len": served.engine.max_length,
        "has_chat_template": served.encoder is not None,
    }


# ---------------------------------------------------------------- votes


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


# ---------------------------------------------------------------- metrics


def metrics_text(server: Server) -> str:
    """What has happened so far, by model."""
    lines: list[str] = []

    def family(name: str, kind: str, meaning: str, samples: dict[str, float]) -> None:
        lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"])
        lines.extend(f"{sample} {value}" for sample, value in samples.items())

    def by_model(name: str, kind: str, meaning: str, read: Callable[[Served], float]) -> None:
        samples = {
            f'{name}{{model="{_label(served.name)}"}}': read(served)
            for served in server.models.values()
        }
        family(name, kind, meaning, samples)

    prefix = "open_instruct_"
    name = prefix + "responses_total"
    family(
        name,
        "counter",
        "Responses by path and status.",
        {
            f'{name}{{path="{_label(path)}",status="{status}"}}': number
            for (path, status), number in sorted(server.responses.items())
        },
    )
    by_model(prefix + "answers_running", "gauge", "Answers that are being written.",
             lambda served: served.engine.num_running)  # fmt: skip
    by_model(prefix + "answers_waiting", "gauge", "Answers that wait for a row.",
             lambda served: served.engine.num_waiting)  # fmt: skip
    by_model(prefix + "prompt_tokens_total", "counter", "Tokens of prompts.",
             lambda served: served.engine.figures.prompt_tokens)  # fmt: skip
    by_model(prefix + "prompt_tokens_reused_total", "counter", "Of these, found in the cache.",
             lambda served: served.engine.batch.num_reused)  # fmt: skip
    by_model(prefix + "generated_tokens_total", "counter", "Tokens of answers.",
             lambda served: served.engine.figures.generated_tokens)  # fmt: skip
    by_model(prefix + "rows_together", "gauge", "Answers that one call of the model goes on with.",
             lambda served: served.engine.batch.stable_sizes[-1])  # fmt: skip
    by_model(prefix + "steps_total", "counter", "Steps of the batch.",
             lambda served: served.engine.figures.steps)  # fmt: skip
    name = prefix + "answers_total"
    family(
        name,
        "counter",
        "Answers that ended, by reason.",
        {
            f'{name}{{model="{_label(served.name)}",reason="{reason}"}}': number
            for served in server.models.values()
            for reason, number in sorted(served.engine.figures.finished.items())
        },
    )
    name = prefix + "first_token_seconds"
    samples: dict[str, float] = {}
    for served in server.models.values():
        label = f'{{model="{_label(served.name)}"}}'
        samples[f"{name}_sum{label}"] = served.first_token_seconds
        samples[f"{name}_count{label}"] = served.num_first_tokens
    family(name, "summary", "From a checked request to its first text.", samples)
    return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ---------------------------------------------------------------- who may come in


class Guard:
    """Outermost of all: who may ask, how many are here, and headers that every answer carries."""

    def __init__(self, app: Any, server: Server) -> None:
        self.app = app
        self.server = server
        self.key = server.settings.api_key
        self.is_local = is_loopback(server.settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal: ApiError | None = None

        def path_label() -> str:  # a bounded number of labels
            if refusal is not None or "endpoint" not in scope:
                return "other"
            path = str(scope["path"])
            return "/v1/models/NAME" if path.startswith("/v1/models/") else path

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.server.responses[path_label(), message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), *SAFE_HEADERS.items()]
            await send(message)

        self.server.num_active += 1
        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else _as_response(refusal)
            await app(scope, receive, send_safely)
        finally:
            self.server.num_active -= 1
            if self.server.is_closing and self.server.num_active == 0:
                self.server.on_idle()
        return None

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if self.server.is_closing and path not in ("/health", "/metrics"):
            return _closing()
        host = headers.get("host", "")
        if self.is_local and not is_loopback(_without_port(host)):
            # A page elsewhere may give its own name this machine's address.
            return ApiError(403, f"The host name {host[:100]!r} is not this server's.")
        origin = headers.get("origin")
        allowed = self.server.settings.cors_origins
        if origin and "*" not in allowed and origin not in allowed:
            same = {f"http://{host}", f"https://{host}"}
            if origin not in same:
                return ApiError(
                    403, f"The origin {origin[:100]} is not allowed. Start with --cors-origin."
                )
        if (
            self.key
            and (path.startswith("/v1/") or path in PROTECTED)
            and not self._has_key(headers)
        ):
            if scope["method"] == "OPTIONS" and allowed:  # a browser asks first, without the key
                return None
            return ApiError(
                401,
                "The API key is missing or wrong. Send Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        assert self.key is not None
        is_right = hmac.compare_digest(given.strip().encode(), self.key.encode())
        return kind.lower() == "bearer" and is_right


PROTECTED = ("/metrics", "/page/vote", "/page/prompt")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _as_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _as_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "is not a path of this server", 405: f"does not take {request.method}"}
    message = f"{request.url.path[:200]} {what.get(error.status_code, error.detail)}."
    return _as_response(ApiError(error.status_code, message, headers=error.headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    return _as_response(ApiError(500, f"The server failed: {type(error).__name__}."))


def new_app(server: Server) -> Any:
    """The ASGI application."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/models", server.list_models),
            Route("/v1/models/{name:path}", server.one_model),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
            Route("/page/prompt", server.rendered_prompt, methods=["POST"]),
            Route("/page/vote", server.vote, methods=["POST"]),
            Route("/page/{file}", server.page),
            Route("/", server.page),
        ]
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return Guard(app, server)


# ---------------------------------------------------------------- from start to end

ONE_BY_ONE = (
    "answers are computed one row at a time, which is slow for many clients. Either the model "
    "keeps more than keys and values, or this machine's products change with the size of a batch, "
    "and a seeded answer would depend on who else asks."
)


class Uvicorn(uvicorn.Server):
    """Ends when running answers have ended; a second signal ends at once."""

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            new_app(server), log_level="warning", access_log=False, server_header=False
        )
        super().__init__(config)
        self.ours = server
        server.on_idle = self._leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by SIGTERM and SIGINT."""
        server = self.ours
        if server.is_closing:
            super().handle_exit(sig, frame)
            return
        server.is_closing = True
        if server.num_active == 0:
            self._leave()
        else:
            print(f"Stopping after {server.num_active} running requests.", file=sys.stderr)

    def _leave(self) -> None:
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound but not yet served. Errors: UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be listened at: {error.strerror}. Choose another --port or "
            "--host, or end what listens there."
        ) from None
    return bound


def load_models(names: Sequence[str], max_waiting: int = MAX_WAITING) -> dict[str, Served]:
    """Each model with its engine, under the name that was given. Errors: UserError."""
    generators: dict[str, Generator] = {}
    for name in (name.rstrip("/") or name for name in names):
        if name in generators:
            raise UserError(f"{name} is given twice. Give each model once.")
        generators[name] = load_generator(name)
    if all(_is_small(generator.model) for generator in generators.values()):
        torch.set_num_threads(1)  # threads would wait for each other longer than they compute
    return {name: Served(name, generator, max_waiting) for name, generator in generators.items()}


def _is_small(model: torch.nn.Module) -> bool:
    return sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL


def serve(names: Sequence[str], settings: Settings) -> None:
    """Serve models until SIGTERM or Ctrl-C. Errors: UserError."""
    # MKL's products of a row otherwise change with the rows beside it as soon as there are two
    # threads. It reads this at its first product; slots.py would go back to one row at a time.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    key = settings.api_key or os.environ.get(API_KEY_VARIABLE)
    if not settings.votes.parent.is_dir():
        raise UserError(f"--votes {settings.votes}: there is no folder {settings.votes.parent}.")
    bound = listen(settings.host, settings.port)
    is_new_key = key is None and not is_loopback(settings.host)
    key = secrets.token_urlsafe(32) if is_new_key else key
    settings = Settings(**{**settings.__dict__, "api_key": key})
    server = Server(load_models(names, settings.max_waiting), settings)
    for served in server.models.values():
        if served.engine.batch.stable_sizes == (1,):
            print(f"{served.name}: {ONE_BY_ONE}", file=sys.stderr)
        if served.no_chat:
            print(f"{served.name}: /v1/completions only. {served.no_chat}", file=sys.stderr)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if is_new_key:
        print(f"API key, shown this once: {key}", file=sys.stderr)
    print(
        f"Serving {', '.join(server.models)} at http://{shown}:{port}", file=sys.stderr, flush=True
    )
    uvicorn_server = Uvicorn(server)
    try:
        uvicorn_server.run(sockets=[bound])
    finally:
        server.close()
