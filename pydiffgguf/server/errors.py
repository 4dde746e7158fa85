"""What a request can be refused with, and which of the library's exceptions means which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydiffgguf.errors import (
    ContextOverflowError,
    DeviceError,
    DiffGGUFError,
    ModelFormatError,
    OutOfMemoryError,
    UnsupportedError,
)

__all__ = ["ApiError", "from_exception", "overflow", "worded"]

#: The ``type`` of an error that names none, by status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    422: "json_unmet_error",
    429: "overloaded_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        message: one line; nothing of a path on this machine.
        param: the field at fault.
        headers: further ones of the answer.
        extra: further keys beside ``message``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.type = type or TYPES.get(status, "invalid_request_error")
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self) -> dict[str, Any]:
        """The answer, in the shape of OpenAI's errors."""
        error = {"code": self.status, "message": self.message, "type": self.type, "param": self.param}
        return {"error": {**error, **self.extra}}


def worded(error: ApiError, path: str) -> tuple[int, dict[str, Any]]:
    """Status and body of an error. ``/v1/systemone`` has a form of its own: ``detail`` in place of ``error``, and 529
    for a full queue."""
    if path != "/v1/systemone":
        return error.status, error.body()
    detail = error.extra.get("detail", {"error_type": error.type, "message": error.message})
    return 529 if error.status == 429 else error.status, {"detail": detail}


def overflow(n_prompt: int, room: int, n_ctx: int) -> ApiError:
    """A prompt that does not fit. The sentence is the one that agents look for to shorten their history."""
    return ApiError(
        400,
        f"request ({n_prompt} tokens) exceeds the available context size ({room} tokens), try increasing it",
        type="exceed_context_size_error",
        extra={"n_prompt_tokens": n_prompt, "n_ctx": n_ctx},
    )


def from_exception(error: BaseException) -> ApiError:
    """The answer for an exception of the library. Anything unknown is a defect: 500, without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextOverflowError):
        return ApiError(400, str(error), type="exceed_context_size_error")
    if isinstance(error, (ValueError, TypeError)):
        return ApiError(400, str(error), param=_named(error))
    if isinstance(error, UnsupportedError):
        return ApiError(400, str(error), param=_named(error))
    if isinstance(error, DeviceError):
        return ApiError(503, str(error), headers={"retry-after": "60"})
    if isinstance(error, (OutOfMemoryError, ModelFormatError)):
        return ApiError(500, str(error))
    if isinstance(error, DiffGGUFError):
        return ApiError(500, f"the engine failed: {error}")
    return ApiError(500, "a defect of the server; its log has the traceback")


def _named(error: Exception) -> str | None:
    """The field that a message of the library begins with, such as the "messages" of "messages[2].role is ..."."""
    found = re.match(r"([a-z_]+)(?:\[\d+\]|\.\w+)*(?::| is | must | has | holds )", str(error))
    return found[1] if found else None
