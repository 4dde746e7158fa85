"""A request's fields: each is asked for by name and type; what nobody asked for is ignored, and named in a header."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.wire import show

__all__ = ["Fields", "ignored_header"]

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
MAX_NAMED = 32


class Fields:
    """The fields of one object; null counts as absent.

    Args:
        body: the object.
        where: put in front of a field's name in messages, such as "diffusion.".
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def peek(self, name: str) -> Any:
        """A field's value, left where it is; None without it."""
        return self._left.get(name)

    def take(self, name: str) -> Any:
        """A field's value, of any type; None without it."""
        return self._left.pop(name, None)

    def wrong(self, name: str, expected: str, value: Any) -> ApiError:
        name = self._where + name
        return ApiError(400, f"{name}: it must be {expected}, but is {show(value)}", param=name)

    def refuse(self, name: str, message: str) -> ApiError:
        return ApiError(400, message, param=self._where + name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer", value)
        if not low <= value <= high:
            raise self.wrong(name, f"from {low} to {high}", value)
        return value

    def number(self, name: str) -> float | None:
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.wrong(name, "a number", value)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def string(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        return value

    def choice(self, name: str, values: Collection[str]) -> str | None:
        value = self.string(name)
        if value is not None and value not in values:
            raise self.wrong(name, "one of " + ", ".join(values), value)
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return value

    def strings(self, name: str, most: int, longest: int) -> list[str]:
        """A string or a list of them; empty ones are dropped."""
        value = self.take(name)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.wrong(name, "a string or a list of strings", value)
        if len(texts) > most:
            raise self.wrong(name, f"at most {most} strings", f"{len(texts)} strings")
        if any(len(text) > longest for text in texts):
            raise self.wrong(name, f"strings of at most {longest} characters", max(texts, key=len))
        return [text for text in texts if text]

    def not_offered(self, *names: str) -> None:
        """Raises for a field that would change what the answer means, unless it is false, zero or empty."""
        for name in names:
            if self.take(name):
                raise self.refuse(name, f"{self._where}{name} is not offered")

    def rest(self, strict: bool) -> list[str]:
        """Names of the fields that nobody took. Raises ApiError 400 for the first with `strict`."""
        names = list(self._left)
        if strict and names:
            raise self.refuse(
                names[0], f"{show(names[0])} has no effect here, and the server refuses such (--strict-params)"
            )
        self._left.clear()
        return names


def ignored_header(names: list[str]) -> str:
    """The value of ``x-ignored-params``: names of ignored fields, those that are no plain words left out of it."""
    plain = [name for name in names if _PLAIN.fullmatch(name)]
    named = plain[:MAX_NAMED]
    others = len(names) - len(named)
    return ", ".join([*named, f"{others} more"] if others else named)
