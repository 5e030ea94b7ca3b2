"""The application: which paths there are, and what each does with a request.

bytes -> JSON -> protocol.Request -> token ids -> Engine -> Delta -> JSON, or events of a stream
"""

import asyncio
import importlib.resources
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from open_instruct.chat.echo import refuse_unreadable
from open_instruct.chat.figures import metrics_text
from open_instruct.chat.guard import Guard, Receive, Settings, as_response
from open_instruct.chat.protocol import (
    ChatShape,
    CompletionShape,
    chat_request,
    completion_request,
)
from open_instruct.chat.protocol import Request as Asked
from open_instruct.chat.refusals import ApiError
from open_instruct.chat.served import Mailbox, Run, Served
from open_instruct.chat.token_text import Token, TokenNames
from open_instruct.chat.votes import append_row, pair_row

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


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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
            engines = [served.engine for served in self.models.values()]
            self.mailbox = Mailbox(asyncio.get_running_loop(), engines)
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
        if asked.echo:
            return await self._echoed(request, asked, served, shape, prompts)
        matcher = await served.matcher(asked)
        run = Run(served, asked, prompts, self._mailbox(), matcher)
        head = self._head(asked, shape)
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

    def _head(self, asked: Asked, shape: ChatShape | CompletionShape) -> dict[str, Any]:
        return {
            "id": shape.prefix + uuid.uuid4().hex,
            "object": shape.piece if asked.stream else shape.whole,
            "created": int(time.time()),
            "model": asked.model,
        }

    async def _echoed(
        self,
        request: Request,
        asked: Asked,
        served: Served,
        shape: ChatShape | CompletionShape,
        prompts: list[list[int]],
    ) -> Response:
        choices: list[dict[str, Any]] = []

        async def score() -> None:
            for index, prompt in enumerate(prompts):
                tokens = await served.scored(asked, prompt)
                text = served.tokenizer.decode(
                    [token.id for token in tokens],
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )
                choices.append(shape.choice(index, text, tokens, "length"))

        refuse_unreadable(served.engine.generator, prompts)
        if not await while_connected(request.receive, score()):
            return Response(status_code=499)
        num_prompt = sum(map(len, prompts))
        num_new = (asked.max_tokens or 0) * len(prompts)
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
        }
        head = self._head(asked, shape)
        return JSONResponse({**head, "choices": choices, "usage": usage})

    async def _events(
        self, run: Run, asked: Asked, shape: ChatShape | CompletionShape, head: dict[str, Any]
    ) -> AsyncIterator[Any]:
        before = _json(head)[:-1] + ',"choices":['  # written once, not once a token
        after = '],"usage":null}' if asked.include_usage else "]}"
        for index in range(run.num_open):
            if (choice := shape.opening(index)) is not None:
                yield before + _json(choice) + after
        try:
            async for index, delta in run.deltas():
                if not (delta.text or delta.finish_reason or shape.wants_logprobs):
                    continue  # a part of a character
                choice = shape.chunk(index, delta)
                if choice.get("delta") == {} and choice["finish_reason"] is None:
                    continue  # text that may become a call
                yield before + _json(choice) + after
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
        patience_s = self.settings.max_upload_s
        try:
            async with asyncio.timeout(patience_s):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"The body had not come whole after {patience_s:g} s.", code="slow_body",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
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
            served.scoring.shutdown()


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


# ---------------------------------------------------------------- requests to methods


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return as_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "is not a path of this server", 405: f"does not take {request.method}"}
    message = f"{request.url.path[:200]} {what.get(error.status_code, error.detail)}."
    return as_response(ApiError(error.status_code, message, headers=error.headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    return as_response(ApiError(500, f"The server failed: {type(error).__name__}."))


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
