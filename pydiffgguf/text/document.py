"""A text file with a place in it: read as the model sees it, and written with an insertion, all else byte for byte."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeAlias

from pydiffgguf._arguments import integer
from pydiffgguf.text.files import replace_file

__all__ = [
    "Document",
    "Position",
    "Unit",
    "decode",
    "from_units",
    "newline_of",
    "plain",
    "read_bytes",
    "to_units",
]

#: What a place in a text is counted in: Python's characters, the bytes of a file, or the units of editors that are
#: written in JavaScript or Java and of the language server protocol.
Unit: TypeAlias = Literal["characters", "utf-8", "utf-16"]

BOM = b"\xef\xbb\xbf"


def read_bytes(path: str) -> tuple[str, bytes]:
    """(name for messages, contents) of a file, or of standard input for ``-``."""
    if path == "-":
        return "standard input", sys.stdin.buffer.read()
    with open(path, "rb") as file:
        return path, file.read()


def decode(name: str, data: bytes) -> str:
    """UTF-8 as text. Raises ValueError with the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


@dataclass(frozen=True)
class Position:
    """A place before a character: line and column count from 1; no column is the end of the line."""

    line: int
    column: int | None = None

    @classmethod
    def parse(cls, text: str) -> Position:
        """From ``LINE`` or ``LINE:COL``. Raises ValueError for anything else."""
        line, colon, column = text.partition(":")
        numbers = [line, column] if colon else [line]
        if not all(part.isascii() and part.isdecimal() for part in numbers):
            raise ValueError(f"{text!r} is no position: write LINE or LINE:COL, two numbers that count from 1")
        return cls(int(line), int(column) if colon else None)


class Document:
    """A UTF-8 file. `text` is what a model reads: without a byte order mark, lines ended by a newline alone.

    Args:
        path: the file, or ``-`` for standard input.

    Raises ValueError for bytes that are no UTF-8, OSError for what cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name, self._data = read_bytes(path)
        self._raw = decode(self.name, self._data).removeprefix("\ufeff")
        self.text = plain(self._raw)
        #: What ends most lines, and will end those of an insertion.
        self.newline = newline_of(self._raw)

    def offset(self, position: Position) -> int:
        """Characters of `text` before a position. Raises ValueError with the range for one outside of the file."""
        lines = self.text.split("\n")
        if not 1 <= position.line <= len(lines):
            raise ValueError(f"line {position.line} is not in {self.name}: lines are from 1 to {len(lines)}")
        length = len(lines[position.line - 1])
        column = length + 1 if position.column is None else position.column
        if not 1 <= column <= length + 1:
            raise ValueError(
                f"column {column} is not in line {position.line} of {self.name}: columns are from 1 to {length + 1}"
            )
        return sum(len(line) + 1 for line in lines[: position.line - 1]) + column - 1

    def offset_at(self, n: int, unit: Unit = "characters") -> int:
        """Characters of `text` before a place that an editor gives: counted in the file as it is, line ends with all
        their characters, without the byte order mark. Raises ValueError for a place outside of the file, within a
        character, or an unknown unit."""
        at = from_units(self._raw, n, unit)
        if self._raw[max(0, at - 1) : at + 1] == "\r\n":
            at -= 1
        return len(plain(self._raw[:at]))

    def check_writable(self) -> None:
        """Raises OSError or ValueError for all that would keep `insert` and `write` from writing, as far as it can be
        known beforehand: so that nobody waits for a text that then has no place to go."""
        path = Path(self.path).resolve()
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{self.name} is not a regular file: it cannot be written in place")
        # Root may write what nobody is meant to: the permissions count, as they do for editors.
        if not status.st_mode & 0o222 or not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only", self.path)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "its folder is read-only, so a new file cannot replace it", self.path)
        if status.st_nlink > 1:
            raise ValueError(
                f"{self.name} has {status.st_nlink} names (hard links), of which the others would keep the old text"
            )
        self._check_unchanged()

    def insert(self, offset: int, text: str) -> None:
        """Writes the file with `text` at an offset of `self.text`: whole or not at all, with its permissions, line ends
        and byte order mark. Raises ValueError when the file has changed since it was read, OSError when it cannot be
        written."""
        self._splice(offset, offset, text)

    def write(self, text: str) -> None:
        """Writes the file so that it reads as `text`. Line ends outside of what differs stay as they are; the rest is
        as for `insert`."""
        old, new = self.text, plain(text)
        begin = _common(old, new)
        end = _common(reversed(old[begin:]), reversed(new[begin:]))
        self._splice(begin, len(old) - end, new[begin : len(new) - end])

    def _splice(self, begin: int, end: int, text: str) -> None:
        self._check_unchanged()
        raw = self._raw[: self._raw_offset(begin)] + plain(text).replace("\n", self.newline)
        raw += self._raw[self._raw_offset(end) :]
        data = (BOM if self._data.startswith(BOM) else b"") + raw.encode("utf-8")
        try:
            replace_file(Path(self.path), data)
        except OSError as error:  # its file name is that of a temporary file, which nobody knows
            raise OSError(error.errno, error.strerror, self.path) from error
        self._data, self._raw, self.text = data, raw, plain(raw)

    def _check_unchanged(self) -> None:
        if read_bytes(self.path)[1] != self._data:
            raise ValueError(f"{self.name} has changed since it was read: nothing is written")

    def _raw_offset(self, offset: int) -> int:
        # A line end of two characters is one in the text.
        longer = (match.start() - i for i, match in enumerate(re.finditer("\r\n", self._raw)))
        return offset + sum(1 for _ in takewhile(lambda place: place < offset, longer))


def _common(a: Iterable[str], b: Iterable[str]) -> int:
    """How many characters two texts begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def plain(text: str) -> str:
    """A text with every line ended by a newline alone, as models have seen them."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def newline_of(text: str) -> str:
    """What ends most of a text's lines."""
    both = text.count("\r\n")
    counts = {"\n": text.count("\n") - both, "\r\n": both, "\r": text.count("\r") - both}
    return max(counts, key=lambda newline: counts[newline])


def from_units(text: str, n: int, unit: Unit) -> int:
    """Characters of a text before a place that is counted in other units.

    Raises ValueError for an unknown unit, a place outside of the text, and one within a character.
    """
    whole = to_units(text, len(text), unit)
    if not 0 <= integer("the offset", n, -(2**63), 2**63) <= whole:
        raise ValueError(f"the offset is {n}: it must be from 0 to {whole} in {unit}")
    if unit == "characters":
        return n
    raw = text.encode("utf-8" if unit == "utf-8" else "utf-16-le")
    try:
        return len(raw[: n * len(raw) // max(1, whole)].decode("utf-8" if unit == "utf-8" else "utf-16-le"))
    except UnicodeDecodeError:
        raise ValueError(f"the offset is {n} in {unit}: that is within a character") from None


def to_units(text: str, offset: int, unit: Unit) -> int:
    """A place after this many characters, counted in other units. Raises ValueError for an unknown unit."""
    if unit == "characters":
        return len(text[:offset])
    if unit == "utf-8":
        return len(text[:offset].encode("utf-8"))
    if unit == "utf-16":
        return len(text[:offset].encode("utf-16-le")) // 2
    raise ValueError(f"unit is {unit!r}: it must be 'characters', 'utf-8' or 'utf-16'")
