"""Refusals in the shape of OpenAI's errors."""

from collections.abc import Mapping
from typing import Any


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


def wrong(param: str, problem: str, code: str | None = None) -> ApiError:
    """The refusal of a parameter's value."""
    return ApiError(400, f"{param} {problem}", param=param, code=code)


def shown(value: Any) -> str:
    """A value in a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
