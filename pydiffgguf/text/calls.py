"""Tool calls as Gemma writes them: ``call:NAME{key:<|"|>text<|"|>,n:1}``, read leniently.

Strings are between quotes of their own, one token, in which nothing is escaped; keys are bare or quoted. Numbers,
booleans, null, lists and objects are JSON's. What a model writes beside that and still means one thing is taken too:
JSON strings, bare words, ``None``. What cannot be read is no call.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["CALL_CLOSE", "CALL_OPEN", "QUOTE", "Quoted", "ToolCall", "parse_calls"]

CALL_OPEN = "<|tool_call>"
CALL_CLOSE = "<tool_call|>"
QUOTE = '<|"|>'
MAX_DEPTH = 64

#: Text outside of quotes and text inside, alternating.
Quoted: TypeAlias = "list[str]"

_NAME = re.compile(r"\s*call:\s*([^\s{}\[\],:\"'][^\s{}\"']*)\s*\{")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_BARE_KEY = re.compile(r"[^\s:,{}\[\]\"][^:,{}\[\]\"]*")
_BARE_VALUE = re.compile(r"[^\s:,{}\[\]\"][^,{}\[\]\"]*")
_WORDS: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "True": True,
    "False": False,
    "None": None,
}
_JSON_STRING = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    name: str
    arguments: dict[str, Any]

    def as_openai(self, key: str) -> dict[str, Any]:
        """The dictionary of the OpenAI API. Its id is made of the call and of `key`, so that seeds reproduce it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        id_ = hashlib.sha256(f"{key} {self.name} {arguments}".encode()).hexdigest()[:24]
        return {"id": f"call_{id_}", "type": "function", "function": {"name": self.name, "arguments": arguments}}


class _Unreadable(Exception):
    pass


def parse_calls(quoted: Quoted) -> list[ToolCall] | None:
    """The calls between two markers, usually one; None where the text is no call."""
    if len(quoted) == 1:
        # A model that spells the quotes instead of writing their token.
        quoted = quoted[0].split(QUOTE)
    if len(quoted) % 2 == 0:
        return None  # a string is not closed
    try:
        return _Parser(quoted).calls()
    except (_Unreadable, RecursionError):
        return None


class _Parser:
    """`_i`: the piece of text outside of quotes; `_at`: the place in it. The string behind piece i is piece i + 1."""

    def __init__(self, quoted: Quoted) -> None:
        self._pieces = quoted
        self._i = 0
        self._at = 0

    def calls(self) -> list[ToolCall]:
        calls: list[ToolCall] = []
        while not calls or not self._is_over():
            found = _NAME.match(self._pieces[self._i], self._at)
            if not found:
                raise _Unreadable
            self._at = found.end()
            calls.append(ToolCall(found[1], self._object(1)))
        return calls

    def _is_over(self) -> bool:
        return not self._next() and self._i == len(self._pieces) - 1

    def _next(self) -> str:
        """The next character that is no white space; "" where a quoted string, or the end, is next."""
        text = self._pieces[self._i]
        while self._at < len(text) and text[self._at].isspace():
            self._at += 1
        return text[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        if self._next() != character:
            return False
        self._at += 1
        return True

    def _string(self) -> str | None:
        """A quoted string, where one is next."""
        following = self._next()
        if following == '"':
            try:
                value, self._at = _JSON_STRING.raw_decode(self._pieces[self._i], self._at)
            except ValueError:
                raise _Unreadable from None
            return str(value)
        if following or self._i + 1 >= len(self._pieces):
            return None
        text = self._pieces[self._i + 1]
        self._i, self._at = self._i + 2, 0
        return text

    def _bare(self, pattern: re.Pattern[str]) -> str:
        self._next()
        found = pattern.match(self._pieces[self._i], self._at)
        if not found:
            raise _Unreadable
        self._at = found.end()
        if self._at == len(self._pieces[self._i]) and self._i + 1 < len(self._pieces):
            raise _Unreadable  # a quote in the middle of a word
        return found[0].strip()

    def _object(self, depth: int) -> dict[str, Any]:
        """What is between braces, of which the first was taken."""
        result: dict[str, Any] = {}
        if self._take("}"):
            return result
        while True:
            key = self._string()
            if key is None:
                key = self._bare(_BARE_KEY)
            if not self._take(":"):
                raise _Unreadable
            result[key] = self._value(depth)
            if self._take("}"):
                return result
            if not self._take(","):
                raise _Unreadable

    def _list(self, depth: int) -> list[Any]:
        result: list[Any] = []
        if self._take("]"):
            return result
        while True:
            result.append(self._value(depth))
            if self._take("]"):
                return result
            if not self._take(","):
                raise _Unreadable

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _Unreadable
        text = self._string()
        if text is not None:
            return text
        if self._take("{"):
            return self._object(depth + 1)
        if self._take("["):
            return self._list(depth + 1)
        word = self._bare(_BARE_VALUE)
        if word in _WORDS:
            return _WORDS[word]
        return _number(word) if _NUMBER.fullmatch(word) else word


def _number(word: str) -> int | float:
    if not any(mark in word for mark in ".eE"):
        try:
            return int(word)
        except ValueError:  # more digits than Python reads
            raise _Unreadable from None
    value = float(word)
    if not math.isfinite(value):
        raise _Unreadable
    return value
