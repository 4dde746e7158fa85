"""The shortest known ending of a text that a grammar has begun, as bytes.

A choice or a regular expression knows its ending exactly. For schemas and grammars it is searched over single bytes
with the engine itself: what it forces is taken whole, else the byte that closes most; where that leads nowhere (an
address wants its @, a pattern its letter), a search by length looks for bytes that change what is allowed.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pydiffgguf.structured.automaton import Automaton
from pydiffgguf.structured.tables import Symbols, engine

if TYPE_CHECKING:
    import llguidance

__all__ = ["Endings", "ends_of_automaton", "ends_of_choices", "search_endings"]

#: The longest ending that is searched, in bytes, and how many bytes one mask may stay.
MOST_BYTES = 20_000
MOST_EQUAL = 5_000
#: Nodes of the search by length, and how often it looks at one mask.
MOST_NODES = 600
MOST_VISITS = 2

_CLOSING = b"}])"
_STRUCTURE = b",:"
_SPACE = tuple(b" \n\t\r")
_ENDS = {*_CLOSING, *_STRUCTURE}


class Endings(Protocol):
    """From the symbols of a text's head to those that end it; None where none is known."""

    def __call__(self, head: Sequence[int]) -> list[int] | None: ...


def ends_of_choices(choices: Sequence[str]) -> Endings:
    texts = sorted((choice.encode() for choice in choices), key=lambda text: (len(text), text))

    def ending(head: Sequence[int]) -> list[int] | None:
        begun = bytes(head)
        return next((list(text[len(begun) :]) for text in texts if text.startswith(begun)), None)

    return ending


def ends_of_automaton(automaton: Automaton) -> Endings:
    def ending(head: Sequence[int]) -> list[int] | None:
        found = automaton.ending(bytes(head))
        return None if found is None else list(found)

    return ending


def search_endings(
    grammar: str, symbols: Symbols, *, json_text: bool = False, patterns: Sequence[Automaton] = ()
) -> Endings:
    """For any grammar.

    Args:
        json_text: texts are JSON: quotes close strings, and `patterns` are those that its strings may have to match.
    """
    search = _Search(grammar, symbols, json_text, patterns)
    return search.ending


class _Search:
    def __init__(self, grammar: str, symbols: Symbols, json_text: bool, patterns: Sequence[Automaton]) -> None:
        self._start: llguidance.LLMatcher = engine().LLMatcher(symbols.table, grammar, log_level=0)
        self._symbols = symbols
        self._json = json_text
        self._patterns = patterns
        self._known: dict[bytes, list[int] | None] = {}

    def ending(self, head: Sequence[int]) -> list[int] | None:
        key = np.asarray(head, dtype=np.uint16).tobytes()
        if key not in self._known:
            if len(self._known) > 500:
                self._known.clear()
            matcher = self._start.deep_copy()
            found = None
            if matcher.try_consume_tokens(list(head)) == len(head):
                found = self._greedy(matcher, _Quotes(head) if self._json else None)
            self._known[key] = found
        return self._known[key]

    def _greedy(self, matcher: llguidance.LLMatcher, quotes: _Quotes | None) -> list[int] | None:
        made: list[int] = []
        last: bytes | None = None
        equal = 0
        searched = False
        while not matcher.is_accepting():
            if len(made) > MOST_BYTES or matcher.is_error():
                return None
            taken = self._forced(matcher)
            if not taken and quotes is not None and quotes.inside and self._patterns:
                taken = self._by_pattern(matcher, quotes)
            if not taken:
                mask = bytes(matcher.compute_bitmask())
                equal = equal + 1 if mask == last else 0
                if (equal == 2 and not searched) or equal == MOST_EQUAL:
                    # The same again and again: count on (a shortest length), or leave (an address).
                    searched = True
                    taken = self._leave(matcher, mask, quotes) or []
                    if not taken and equal == MOST_EQUAL:
                        return None
                elif mask != last:
                    searched = False
                last = mask
                if not taken:
                    chosen = self._choose(_allowed(mask), quotes)
                    if chosen is None:
                        return None
                    taken = [chosen]
            if not matcher.consume_tokens(taken):
                return None
            made += taken
            if quotes is not None:
                quotes.feed(taken)
        return made

    def _forced(self, matcher: llguidance.LLMatcher) -> list[int]:
        """What must come, as the engine has it: bytes; a marker alone, by its mask."""
        forced = bytes(matcher.compute_ff_bytes())
        at = forced.find(b"\xff[")
        return list(forced if at < 0 else forced[:at])

    def _choose(self, allowed: Sequence[int], quotes: _Quotes | None) -> int | None:
        """The symbol that closes most. In a text that is a string's, its quote, then something that prints."""
        inside = quotes is not None and quotes.inside
        order: list[Sequence[int]]
        markers = range(Symbols.END + 1, Symbols.END + 1 + len(self._symbols.markers))
        if inside:
            order = [b'"', markers, b"0123456789", range(0x61, 0x7B), range(0x23, 0x5C), range(0x20, 0x7F)]
        else:
            order = [markers, _CLOSING, _STRUCTURE, b"0123456789", b"ntf", b'"', b"-", b"[{("]
            order += [range(0x61, 0x7B), range(0x21, 0x7F)]
        present = set(allowed)
        for group in (*order, range(256), _SPACE):
            for symbol in group:
                if symbol in present and (group is _SPACE or symbol not in _SPACE or len(present) == 1 or inside):
                    return symbol
        return next(iter(allowed), None)

    def _by_pattern(self, matcher: llguidance.LLMatcher, quotes: _Quotes) -> list[int]:
        """What a pattern lacks of the string that is open, where the engine takes it together with the quote."""
        try:
            text = json.loads(b'"' + bytes(quotes.text) + b'"')
        except ValueError:
            return []
        found = []
        for pattern in self._patterns:
            rest = pattern.ending(text.encode("utf-8", "replace"))
            if rest is not None:
                found.append(list(json.dumps(rest.decode(), ensure_ascii=False)[1:].encode()))
        for rest_and_quote in sorted(found, key=len):
            if matcher.validate_tokens(rest_and_quote) == len(rest_and_quote):
                return rest_and_quote
        return []

    def _leave(self, matcher: llguidance.LLMatcher, mask: bytes, quotes: _Quotes | None) -> list[int] | None:
        """The shortest bytes, by a search that looks at each mask few times, to where a string may be closed, or the
        text may end, or what is allowed is something that was not allowed here at all."""
        here = set(_allowed(mask))
        inside = quotes is not None and quotes.inside
        visits: dict[bytes, int] = {mask: MOST_VISITS}
        queue: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        count = 0
        while queue and count < MOST_NODES:
            _, _, path = heapq.heappop(queue)
            base = matcher.deep_copy()
            if path and not base.consume_tokens(path):
                continue
            for symbol in _representatives(_allowed(bytes(base.compute_bitmask())) if path else sorted(here)):
                if inside and symbol == 0x5C:
                    continue  # an escape is a character as any other
                after = base.deep_copy()
                if not after.consume_token(symbol):
                    continue
                count += 1
                now = [*path, symbol]
                if after.is_accepting():
                    return now
                reached = bytes(after.compute_bitmask())
                allowed = set(_allowed(reached))
                if inside and ord('"') in allowed and ord('"') not in here:
                    return now
                new = allowed - here
                if not inside and (new == allowed or new & _ENDS) and new:
                    return now
                if visits.get(reached, 0) < MOST_VISITS:
                    visits[reached] = visits.get(reached, 0) + 1
                    heapq.heappush(queue, (len(now), count, now))
        return None


def _allowed(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return [int(symbol) for symbol in np.flatnonzero(bits) if symbol != Symbols.END]


def _representatives(allowed: Sequence[int]) -> list[int]:
    """Few symbols for many: a digit, a small and a capital letter, and everything that is no letter or digit."""
    kept: list[int] = []
    seen: set[str] = set()
    for symbol in allowed:
        if symbol >= 0x80 and symbol < Symbols.END:
            kind = "high"
        elif 0x30 <= symbol <= 0x39:
            kind = "digit" if len(allowed) > 12 else f"{symbol}"
        elif 0x61 <= symbol <= 0x7A or 0x41 <= symbol <= 0x5A:
            kind = ("small" if symbol >= 0x61 else "capital") if len(allowed) > 12 else f"{symbol}"
        else:
            kind = f"{symbol}"
        if kind not in seen:
            seen.add(kind)
            kept.append(symbol)
    return kept


class _Quotes:
    """Where JSON strings begin and end. `text`: what the open one holds so far, as written."""

    def __init__(self, head: Sequence[int]) -> None:
        self.inside = False
        self.text: list[int] = []
        self._escaped = False
        self.feed(head)

    def feed(self, symbols: Sequence[int]) -> None:
        for symbol in symbols:
            if not self.inside:
                if symbol == 0x22:
                    self.inside, self.text = True, []
            elif self._escaped:
                self._escaped = False
                self.text.append(symbol)
            elif symbol == 0x22:
                self.inside = False
            else:
                self._escaped = symbol == 0x5C
                self.text.append(symbol)
