"""Regular expressions as automata that know the way out: from wherever a text stands, its shortest ending.

The grammar engine says what may come next; how far the end is, it does not. For a regular expression that can be known
exactly: the distance of each state of a nondeterministic automaton, and of a set of states the smallest.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

__all__ = ["Automaton", "compile_automaton"]

MAX_STATES = 60_000
LAST = 0x10FFFF

_DIGITS = ((0x30, 0x39),)
_WORD = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE = ((0x09, 0x0D), (0x20, 0x20))
_Ranges = tuple[tuple[int, int], ...]
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}


class _Unknown(Exception):
    """A construct that is not read here."""


@dataclass(frozen=True)
class _Class:
    """A set of characters: ranges, and, beyond ASCII, what a test holds for."""

    ranges: _Ranges
    tests: tuple[Callable[[str], bool], ...] = ()
    negated: bool = False

    def holds(self, character: str) -> bool:
        code = ord(character)
        found = any(low <= code <= high for low, high in self.ranges) or (
            code > 0x7F and any(test(character) for test in self.tests)
        )
        return found != self.negated

    def of(self, low: int, high: int) -> str | None:
        """A character from an interval of code points; the first of some thousand that fits."""
        for code in (
            *range(low, min(high, low + 4096) + 1),
            *(start for start, _ in self.ranges if low <= start <= high),
        ):
            if not 0xD800 <= code <= 0xDFFF and self.holds(chr(code)):
                return chr(code)
        return None

    @property
    def shortest(self) -> str | None:
        """A character of few bytes, one that prints where there is one."""
        for low, high in ((0x30, 0x39), (0x61, 0x7A), (0x20, 0x7E), (0x00, 0x7F), (0x80, 0x7FF), (0x800, LAST)):
            found = self.of(low, high)
            if found is not None:
                return found
        return None


@dataclass
class _State:
    """`to`: where each class of characters leads. `free`: where nothing needs to be read."""

    to: list[tuple[_Class, int]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)


class Automaton:
    """Made by `compile_automaton`."""

    def __init__(self, states: list[_State], start: int, end: int) -> None:
        self._states = states
        self._start = start
        self._end = end
        self._distance, self._next = self._distances()

    def _distances(self) -> tuple[list[float], list[tuple[str, int] | None]]:
        """Of each state, bytes to the end, and the step that leads there."""
        back: list[list[tuple[int, str]]] = [[] for _ in self._states]
        for i, state in enumerate(self._states):
            for j in state.free:
                back[j].append((i, ""))
            for class_, j in state.to:
                character = class_.shortest
                if character is not None:
                    back[j].append((i, character))
        distance = [float("inf")] * len(self._states)
        step: list[tuple[str, int] | None] = [None] * len(self._states)
        distance[self._end] = 0.0
        queue = [(0.0, self._end)]
        while queue:
            far, i = heapq.heappop(queue)
            if far > distance[i]:
                continue
            for j, character in back[i]:
                cost = far + len(character.encode())
                if cost < distance[j]:
                    distance[j], step[j] = cost, (character, i)
                    heapq.heappush(queue, (cost, j))
        return distance, step

    def _closure(self, states: set[int]) -> set[int]:
        stack = list(states)
        seen = set(states)
        while stack:
            for j in self._states[stack.pop()].free:
                if j not in seen:
                    seen.add(j)
                    stack.append(j)
        return seen

    def _after(self, text: str) -> set[int]:
        states = self._closure({self._start})
        for character in text:
            states = self._closure({j for i in states for class_, j in self._states[i].to if class_.holds(character)})
        return states

    def matches(self, text: str) -> bool:
        """Whether the whole text is one of the expression's."""
        return self._end in self._after(text)

    def ending(self, head: bytes) -> bytes | None:
        """The shortest bytes that make a whole text of `head`; None where nothing does."""
        text, rest = _split(head)
        states = self._after(text)
        if not rest:
            return self._from(states)
        low, high = _interval(rest)
        found: list[bytes] = []
        for i in states:
            for class_, j in self._states[i].to:
                character = class_.of(low, high)
                if character is not None:
                    tail = self._from(self._closure({j}))
                    if tail is not None:
                        found.append(character.encode()[len(rest) :] + tail)
        return min(found, key=len, default=None)

    def _from(self, states: set[int]) -> bytes | None:
        best = min(states, key=lambda i: (self._distance[i], i), default=None)
        if best is None or self._distance[best] == float("inf"):
            return None
        text = ""
        while best != self._end:
            step = self._next[best]
            assert step is not None
            text += step[0]
            best = step[1]
        return text.encode()


def _split(head: bytes) -> tuple[str, bytes]:
    """The characters, and the bytes of one that is not finished."""
    for n in range(min(3, len(head)) + 1):
        try:
            return head[: len(head) - n].decode(), head[len(head) - n :]
        except UnicodeDecodeError:
            continue
    return head.decode(errors="replace"), b""


def _interval(rest: bytes) -> tuple[int, int]:
    """The code points whose UTF-8 begins with these bytes."""
    n = 2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4
    value = rest[0] & (0xFF >> (n + 1))
    for byte in rest[1:]:
        value = value << 6 | byte & 0x3F
    missing = 6 * (n - len(rest))
    low = value << missing
    return max(low, (0x80, 0x800, 0x10000)[n - 2]), min(low | (1 << missing) - 1, LAST)


def compile_automaton(pattern: str, *, anywhere: bool = False) -> Automaton | None:
    """The automaton of an expression in Rust's syntax that the whole text must match; None where it holds what is not
    read here.

    Args:
        anywhere: the expression may match a part, as in JSON schemas, where ``^`` and ``$`` say otherwise.
    """
    builder = _Builder()
    ends = ["", ""]
    if anywhere:
        ends = ["(?s:.)*", "(?s:.)*"]
        if pattern.startswith("^"):
            pattern, ends[0] = pattern[1:], ""
        if pattern.endswith("$") and not pattern.endswith(r"\$"):
            pattern, ends[1] = pattern[:-1], ""
    try:
        start, end = builder.parse(f"{ends[0]}(?:{pattern}){ends[1]}" if anywhere else pattern)
    except (_Unknown, RecursionError, IndexError, ValueError):
        return None
    return Automaton(builder.states, start, end)


class _Builder:
    """A parser that makes states as it reads (Thompson's construction). A piece is read again for each repetition."""

    def __init__(self) -> None:
        self.states: list[_State] = []
        self._text = ""
        self._at = 0

    def parse(self, pattern: str) -> tuple[int, int]:
        flags = re.match(r"\(\?([is]+)\)", pattern)
        self._text, self._at = pattern, flags.end() if flags else 0
        made = self._alternatives(flags[1] if flags else "")
        if self._at != len(pattern):
            raise _Unknown
        return made

    def _new(self) -> int:
        if len(self.states) >= MAX_STATES:
            raise _Unknown
        self.states.append(_State())
        return len(self.states) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _alternatives(self, flags: str) -> tuple[int, int]:
        start, end = self._new(), self._new()
        while True:
            first, last = self._sequence(flags)
            self.states[start].free.append(first)
            self.states[last].free.append(end)
            if not self._take("|"):
                return start, end

    def _sequence(self, flags: str) -> tuple[int, int]:
        start = last = self._new()
        while self._peek() and self._peek() not in "|)":
            begins = self._at
            first, end = self._atom(flags)
            for low, high in self._repeats():
                first, end = self._repeated(begins, flags, (first, end), low, high)
            self.states[last].free.append(first)
            last = end
        return start, last

    def _repeats(self) -> Iterator[tuple[int, int | None]]:
        found = re.compile(r"([*+?])|\{(\d+)(,?)(\d*)\}").match(self._text, self._at)
        if not found:
            return
        self._at = found.end()
        self._take("?")  # lazy: the same texts
        if self._peek() in ("*", "+", "?", "{"):
            raise _Unknown
        if found[1]:
            yield {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[1]]
        else:
            low = int(found[2])
            yield low, (int(found[4]) if found[4] else None) if found[3] else low

    def _again(self, begins: int, flags: str) -> tuple[int, int]:
        after = self._at
        self._at = begins
        made = self._atom(flags)
        self._at = after
        return made

    def _repeated(self, begins: int, flags: str, first: tuple[int, int], low: int, high: int | None) -> tuple[int, int]:
        start = self._new()
        end = start
        copies = iter(range(max(low, 1 if high is None else high)))
        piece = first
        if high == 0:
            return start, start
        for n in copies:
            if n:
                piece = self._again(begins, flags)
            self.states[end].free.append(piece[0])
            if n >= low and high is not None:  # this one, and all behind it, may be left out
                last = self._new()
                self.states[piece[1]].free.append(last)
                self.states[end].free.append(last)
                # skipping one skips the rest: `last` of each leads on
                end = last
            else:
                end = piece[1]
        if high is None:
            after = self._new()
            self.states[piece[1]].free += [piece[0], after]
            if low == 0:
                self.states[start].free.append(after)
            end = after
        return start, end

    def _atom(self, flags: str) -> tuple[int, int]:
        character = self._peek()
        self._at += 1
        if character == "(":
            return self._group(flags)
        if character == "[":
            return self._edge(self._class(flags))
        if character == ".":
            return self._edge(_Class((), (), True) if "s" in flags else _Class(((0x0A, 0x0A),), (), True))
        if character == "\\":
            return self._edge(self._escape(flags))
        if character in "*+?{^$)":
            raise _Unknown
        return self._edge(_literal(character, flags))

    def _edge(self, class_: _Class) -> tuple[int, int]:
        start, end = self._new(), self._new()
        self.states[start].to.append((class_, end))
        return start, end

    def _group(self, flags: str) -> tuple[int, int]:
        if self._take("?"):
            found = re.compile(r"([imsUux-]*)([:)])|P?<\w+>").match(self._text, self._at)
            if not found:
                raise _Unknown
            self._at = found.end()
            if found[2] == ")" or (found[1] and set(found[1]) - set("is")):
                raise _Unknown
            flags += found[1] or ""
        made = self._alternatives(flags)
        if not self._take(")"):
            raise _Unknown
        return made

    def _escape(self, flags: str) -> _Class:
        character = self._peek()
        self._at += 1
        if character in "dDwWsS":
            ranges, test = {
                "d": (_DIGITS, str.isdecimal),
                "w": (_WORD, lambda c: c.isalnum()),
                "s": (_SPACE, str.isspace),
            }[character.lower()]
            return _Class(ranges, (test,), character.isupper())
        if character in ("x", "u", "U"):
            found = re.compile(r"\{([0-9a-fA-F]+)\}|" + r"[0-9a-fA-F]" * {"x": 2, "u": 4, "U": 8}[character]).match(
                self._text, self._at
            )
            if not found:
                raise _Unknown
            self._at = found.end()
            return _literal(chr(int(found[1] or found[0], 16)), flags)
        if character in _ESCAPES:
            return _literal(_ESCAPES[character], flags)
        if not character or character.isalnum():
            raise _Unknown
        return _literal(character, flags)

    def _class(self, flags: str) -> _Class:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        tests: list[Callable[[str], bool]] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._one(flags)
            if low.tests or len(low.ranges) != 1 or low.negated:
                if low.negated:
                    raise _Unknown
                ranges += low.ranges
                tests += low.tests
                continue
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._one("")
                if high.tests or len(high.ranges) != 1:
                    raise _Unknown
                span = (low.ranges[0][0], high.ranges[0][1])
                ranges.append(span)
                if "i" in flags:
                    ranges += _other_case(span)
            else:
                ranges += low.ranges
        self._at += 1
        return _Class(tuple(ranges), tuple(tests), negated)

    def _one(self, flags: str) -> _Class:
        character = self._peek()
        if character in ("", "[") or self._text.startswith(("&&", "--", "~~"), self._at):
            raise _Unknown
        self._at += 1
        return self._escape(flags) if character == "\\" else _literal(character, flags)


def _literal(character: str, flags: str) -> _Class:
    forms = {character, character.lower(), character.upper()} if "i" in flags else {character}
    return _Class(tuple((ord(form), ord(form)) for form in sorted(forms) if len(form) == 1))


def _other_case(span: tuple[int, int]) -> list[tuple[int, int]]:
    made = []
    for low, high, by in ((0x41, 0x5A, 32), (0x61, 0x7A, -32)):
        first, last = max(low, span[0]), min(high, span[1])
        if first <= last:
            made.append((first + by, last + by))
    return made
