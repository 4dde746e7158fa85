"""A request's fields: each is asked for by name and type; what nobody asked for is ignored, and named in a header."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.wire import show

__all__ = ["NOTHING", "Fields", "described", "ignored_header"]

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
MAX_NAMED = 32
MAX_NUMBER = 1e30
#: Values that ask for nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


class Fields:
    """The fields of one object; null counts as absent.

    Args:
        body: the object.
        where: put in front of a field's name in messages, such as "diffusion.".
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where
        self._asked: list[str] = []

    def _ask(self, name: str, **form: Any) -> Any:
        """A field's value. Everything that is asked for passes here; `form`: what it may be, as a JSON schema."""
        self._asked.append(name)
        return self._left.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def peek(self, name: str) -> Any:
        """A field's value, left where it is; None without it."""
        return self._left.get(name)

    def take(self, name: str, **form: Any) -> Any:
        """A field's value, of any type; None without it."""
        return self._ask(name, **form)

    def lacks(self, name: str) -> bool:
        """Whether a field that must be there is not."""
        return name not in self._left

    def need(self, *names: str) -> None:
        """Raises where one is lacking."""
        for name in names:
            if self.lacks(name):
                raise self.refuse(name, f'"{name}" is required')

    def wrong(self, name: str, expected: str, value: Any) -> ApiError:
        name = self._where + name
        return ApiError(400, f"{name}: it must be {expected}, but is {show(value)}", param=name)

    def refuse(self, name: str, message: str) -> ApiError:
        return ApiError(400, message, param=self._where + name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._ask(name, type="integer", minimum=low, maximum=high)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer", value)
        if not low <= value <= high:
            raise self.wrong(name, f"from {low} to {high}", value)
        return value

    def number(self, name: str, low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> float | None:
        """`low` and `high` are allowed."""
        value = self._ask(name, type="number", minimum=low, maximum=high)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "a number", value)
        if not low <= value <= high:
            raise self.wrong(name, f"from {low:g} to {high:g}", value)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._ask(name, type="boolean", default=default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def string(self, name: str) -> str | None:
        value = self._ask(name, type="string")
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        return value

    def items(self, name: str, least: int = 0, most: int | None = None, of: Mapping[str, Any] | None = None) -> Any:
        """A list, whose items `of` describes, and somebody else checks; None without it."""
        bounds = {"minItems": least or None, "maxItems": most, "items": of}
        value = self._ask(name, type="array", **{key: bound for key, bound in bounds.items() if bound is not None})
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        if not least <= len(value) <= (len(value) if most is None else most):
            raise self.wrong(name, f"a list of {least} to {most} items", f"{len(value)} items")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self._ask(name, type="object")
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return value

    def inside(self, name: str) -> Fields:
        """The fields of a field that is an object; none without it."""
        return type(self)(self.object(name) or {}, f"{self._where}{name}.")

    def strings(self, name: str, most: int, longest: int) -> list[str]:
        """A string or a list of them; empty ones are dropped."""
        one = {"type": "string", "maxLength": longest}
        value = self._ask(name, anyOf=[one, {"type": "array", "items": one, "maxItems": most}])
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
            if self._ask(name, enum=NOTHING):
                raise self.refuse(name, f"{self._where}{name} is not offered")

    def no_more(self) -> None:
        """Raises for a field that nobody asked for: where a misspelt one would change the result."""
        if self._left:
            known = ", ".join(self._asked)
            raise ApiError(400, f"{self._where[:-1]} has an unknown key; there are {known}", param=self._where[:-1])

    def rest(self, strict: bool) -> list[str]:
        """Names of the fields that nobody took. Raises ApiError 400 for the first with `strict`."""
        names = list(self._left)
        if strict and names:
            raise self.refuse(
                names[0], f"{show(names[0])} has no effect here, and the server refuses such (--strict-params)"
            )
        self._left.clear()
        return names


def described(read: Callable[[Fields], Any], example: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of what a function reads, which is found by reading an example: so a description says what the
    checks do, and nothing else."""
    fields = _Described(example)
    read(fields)
    return {**fields.schema, "examples": [dict(example)]}


class _Described(Fields):
    """Fields that keep what was asked of them."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        super().__init__(body, where)
        self.schema: dict[str, Any] = {"type": "object", "properties": {}}

    def _ask(self, name: str, **form: Any) -> Any:
        # Of two checks the narrower one comes first.
        must = name in self.schema.get("required", ())
        self.schema["properties"].setdefault(name, form if must else _or_null(form))
        return super()._ask(name, **form)

    def lacks(self, name: str) -> bool:
        self.schema.setdefault("required", []).append(name)
        return super().lacks(name)

    def inside(self, name: str) -> Fields:
        inner = super().inside(name)
        assert isinstance(inner, _Described)
        inner.schema["type"] = ["object", "null"]
        self.schema["properties"][name] = inner.schema  # filled when somebody asks
        return inner

    def no_more(self) -> None:
        super().no_more()
        self.schema["additionalProperties"] = False


def _or_null(form: Mapping[str, Any]) -> dict[str, Any]:
    """The same, or null, which counts as absent."""
    if isinstance(form.get("type"), str):
        return {**form, "type": [form["type"], "null"]}
    return {**form, "anyOf": [*form["anyOf"], {"type": "null"}]} if "anyOf" in form else dict(form)


def ignored_header(names: list[str]) -> str:
    """The value of ``x-ignored-params``: names of ignored fields, those that are no plain words left out of it."""
    plain = [name for name in names if _PLAIN.fullmatch(name)]
    named = plain[:MAX_NAMED]
    others = len(names) - len(named)
    return ", ".join([*named, f"{others} more"] if others else named)
