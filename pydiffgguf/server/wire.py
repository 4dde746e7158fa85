"""JSON in and out, and bodies within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pydiffgguf.server.errors import ApiError

__all__ = ["dump", "event", "inflate", "parse", "show"]

MAX_DEPTH = 64
MAX_DIGITS = 20


def dump(value: Any) -> bytes:
    """Compact JSON on one line: llama.vim looks for a quote right behind ``"content":``, and shows nothing where a
    space stands between."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def show(value: Any) -> str:
    """A caller's value for a message: JSON, escaped, at most 80 characters."""
    text = json.dumps(value, allow_nan=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def parse(body: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises ApiError 400 for what Python's parser would take or choke on: NaN and infinities, doubled keys, deep
    nesting, integers without end, halves of surrogate pairs; and for anything that is not a JSON object.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, but is {show(value)}")
    _check(value, surrogates="\\ud" in text.lower())
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"the key {show(twice)} is twice in one object")
    return found


def _constant(text: str) -> Any:
    raise ApiError(400, f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS + text.startswith("-"):
        raise ApiError(400, f"an integer has {len(text)} digits, at most {MAX_DIGITS} are read")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, f"{show(text)} is beyond what a number can be")
    return value


def _check(value: Any, surrogates: bool) -> None:
    """Depth and, only where the body has an escape of one, halves of surrogate pairs."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                if surrogates:
                    below.extend(item)
            elif isinstance(item, list):
                below.extend(item)
            elif surrogates and isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ApiError(400, "a string holds half a surrogate pair, which is no character") from None
        if not below:
            return
        level = below
    raise ApiError(400, f"the body nests deeper than {MAX_DEPTH}")


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """A body without its Content-Encoding. Raises ApiError 415 for one that this Python cannot read, 413 where the
    result passes `limit`."""
    if encoding in ("", "identity"):
        return body
    decompressor = _zstd() if encoding == "zstd" else None
    if decompressor is None:
        raise ApiError(415, f"Content-Encoding {show(encoding)} is not read here: send the body as it is")
    try:
        out: bytes = decompressor.decompress(body, max_length=limit + 1)
    except Exception as error:
        raise ApiError(400, f"the body is not zstd: {error}") from None
    if len(out) > limit:
        raise ApiError(413, f"the body has over {limit} bytes once it is unpacked")
    if not decompressor.eof:
        raise ApiError(400, "the body is cut zstd")
    return out


def _zstd() -> Any:
    """A decompressor of Python 3.14, or of the package backports.zstd; None without either."""
    from importlib import import_module

    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name).ZstdDecompressor()
        except ImportError:
            continue
    return None
