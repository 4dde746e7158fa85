"""Where a filling meets the text behind it, and where a text that nothing follows is complete.

A model that sees what follows sometimes writes its beginning once more: ``x) {`` before ``) {``. What is repeated is
cut off, but only where the document is the better for it: ``foo(bar)`` before ``)`` keeps its bracket.
"""

from __future__ import annotations

import re

from pydiffgguf.engine.options import Until

__all__ = ["complete", "is_blank_line", "without_indentation", "without_repeat"]

#: Characters on either side of a joint that are looked at.
WINDOW = 2000
#: A repetition that leaves brackets and quotes as they are has at least this many characters that are not white space,
#: or whole lines with this many: shorter ones may be meant ("that that", "i++; i++;").
LONG, LONG_LINE = 12, 4

_PAIRS = {")": "(", "]": "[", "}": "{", "】": "【", "）": "（", "」": "「", "』": "『", "》": "《", "”": "“"}  # noqa: RUF001
_TAG = re.compile(r"<(/?)([A-Za-z][\w.-]*)(?:\s[^<>]*)?(?<!/)>")
#: Tags of HTML that nothing closes.
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_BRACKET = re.compile(rf"{_TAG.pattern}|[{re.escape(''.join((*_PAIRS, *_PAIRS.values())))}]")


def without_repeat(prefix: str, text: str, suffix: str) -> str:
    """`text` without an ending that repeats how `suffix` begins, white space aside."""
    before, behind = prefix[-WINDOW:], suffix[:WINDOW]
    letters = [i for i, c in enumerate(text) if not c.isspace()][-WINDOW:]
    tail = "".join(text[i] for i in letters)
    places = [i for i, c in enumerate(behind) if not c.isspace()]
    head = "".join(behind[i] for i in places)
    whole = _unmatched(before, text, behind)
    for n in range(min(len(tail), len(head)), 0, -1):
        if not head.startswith(tail[-n:]):
            continue
        at = letters[-n]
        kept = text[:at]
        if behind[:1].isspace():
            kept = kept.rstrip()
        without = _unmatched(before, kept, behind)
        words = n >= LONG and not (text[at - 1 : at].isalnum() and text[at].isalnum())
        line_begins = text[:at].rstrip(" \t").endswith("\n")
        line_ends = behind[places[n - 1] + 1 :].lstrip(" \t")[:1] in ("", "\n")
        long = words or (n >= LONG_LINE and line_begins and line_ends)
        if (without < whole or (long and without == whole)) and not _closes(text, at):
            return kept
    return text


def _tokens(text: str) -> list[tuple[int, str, bool]]:
    """(place, kind, whether it closes) of brackets and tags."""
    found = []
    for match in _BRACKET.finditer(text):
        bracket = match[0]
        if match[2] is not None:
            if match[2].lower() not in _VOID:
                found.append((match.start(), f"<{match[2].lower()}", bool(match[1])))
        else:
            found.append((match.start(), _PAIRS.get(bracket, bracket), bracket in _PAIRS))
    return found


def _match(text: str) -> tuple[list[tuple[int, int]], int]:
    """(pairs of places, how many brackets and tags have no partner)."""
    stack: list[tuple[int, str]] = []
    pairs = []
    alone = 0
    for place, kind, closes in _tokens(text):
        if not closes:
            stack.append((place, kind))
        elif stack and stack[-1][1] == kind:
            pairs.append((stack.pop()[0], place))
        else:
            alone += 1
    return pairs, alone + len(stack)


def _unmatched(before: str, text: str, behind: str) -> int:
    """Brackets, tags and quotes of a document without a partner: quotes in the line where `text` meets `behind`."""
    line = (before + text).rpartition("\n")[2] + behind.partition("\n")[0]
    return _match(before + text + behind)[1] + sum(line.count(quote) % 2 for quote in "\"'`")


def _closes(text: str, at: int) -> bool:
    """Whether the text from `at` on closes what the text before opens."""
    return any(opens < at <= closes for opens, closes in _match(text)[0])


def is_blank_line(prefix: str) -> bool:
    """Whether the line that a gap is in has nothing before the gap but white space, and some of it."""
    line = prefix.rpartition("\n")[2]
    return bool(line) and not line.strip()


def without_indentation(prefix: str, text: str) -> str:
    """`text` without the indentation that the line it begins in has already, which the text may have on a line of its
    own."""
    if not is_blank_line(prefix):
        return text
    indentation = prefix.rpartition("\n")[2]
    stripped = text.lstrip(" \t")
    if not stripped.startswith("\n"):
        return stripped
    rest = stripped.lstrip("\n")
    again = rest.startswith(indentation) and not rest[len(indentation) :][:1].isspace()
    return rest[len(indentation) :] if again else text


def complete(prefix: str, text: str, until: Until) -> int | None:
    """Characters of `text` up to where it is complete, or None while it is not. Empty lines before the first line with
    something in it end nothing, unless the prefix's last line has something in it.

    - "line": before the end of the line.
    - "block": before the first line with less indentation than the block, and where that has none, before the first
      empty line.
    - "end": never; the model ends it.
    """
    if until == "end":
        return None
    line = prefix.rpartition("\n")[2]
    begun = bool(line.strip())  # the line in which the gap is
    indent = _indent(line) if begun else None
    at = 0
    for piece in text.splitlines(keepends=True):
        ends = piece.endswith("\n")
        whole = piece.rstrip("\n") if at else line + piece.rstrip("\n")
        blank = not whole.strip()
        if until == "block" and begun and at:
            if blank and not indent and ends:
                return len(text[:at].rstrip("\n"))
            if not blank and indent and _indent(whole) < indent:
                return len(text[:at].rstrip("\n"))
        if not blank:
            indent = _indent(whole) if indent is None else indent
            begun = True
        at += len(piece)
        if until == "line" and begun and ends:
            return at - 1
    return None


def _indent(line: str) -> int:
    """Width of a line's indentation, a tab being a character like others."""
    return len(line) - len(line.lstrip(" \t"))
