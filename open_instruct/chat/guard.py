"""Who may come in: hosts, origins and keys, and headers that every answer carries."""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from open_instruct.chat.engine import MAX_WAITING
from open_instruct.chat.hosts import is_loopback, without_port
from open_instruct.chat.refusals import ApiError
from open_instruct.chat.served import closing

if TYPE_CHECKING:
    from open_instruct.chat.app import Server

MAX_BODY_BYTES = 4 * 2**20
PROTECTED = ("/metrics", "/page/vote", "/page/prompt")  # beside /v1/
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
    max_upload_s: float = 30.0  # a client that stalls must not keep the server from stopping


class Guard:
    """Outermost of all: who may ask, how many are here, and headers that every answer carries."""

    def __init__(self, app: Any, server: "Server") -> None:
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
            app = self.app if refusal is None else as_response(refusal)
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
            return closing()
        host = headers.get("host", "")
        if self.is_local and not is_loopback(without_port(host)):
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


def as_response(error: ApiError) -> JSONResponse:
    """A refusal, on its way out."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)
