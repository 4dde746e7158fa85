"""Infill tasks from the published JSONL files, as they are published: nothing is downloaded, nothing rewritten.

HumanEval-Infilling (github.com/openai/human-eval-infilling; single-line, multi-line, random-span): `task_id`, `prompt`,
`suffix`, `canonical_solution`, `test`, `entry_point`; Python. `test` and `entry_point` may be missing, and `language`
(`python` when missing) may say that an item is no code: so is benchmarks/data/infill_demo.jsonl written.

SantaCoder-FIM (huggingface.co/datasets/bigcode/santacoder-fim-task, and the JSONL of its repository): `name`,
`language` (`py`, `js`, `java`), `prompt`, `suffix`, `canonical_solution`, `tests`.

In both, `prompt` is what stands before the gap and `canonical_solution` what belongs into it. Unknown fields are left
alone. A file ends in .jsonl, or in .jsonl.gz when it is compressed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["HUMAN_EVAL", "SANTA_CODER", "Item", "ItemFile", "ItemFileError", "read_items"]

HUMAN_EVAL = "HumanEval-Infilling"
SANTA_CODER = "SantaCoder-FIM"

#: The fields that a line must have, by format; each holds a string. The first one tells the formats apart.
FIELDS: dict[str, tuple[str, ...]] = {
    HUMAN_EVAL: ("task_id", "prompt", "suffix", "canonical_solution"),
    SANTA_CODER: ("name", "language", "prompt", "suffix", "canonical_solution"),
}
LANGUAGES = {"py": "python", "js": "javascript"}


class ItemFileError(ValueError):
    """A file that cannot be used; the message begins with its name, and the line where there is one."""


@dataclass(frozen=True)
class Item:
    """One task. `line`: where it stands, from 1. `test`: defines `check(candidate)`, to be called with what
    `entry_point` names; None where the item cannot be executed."""

    id: str
    line: int
    language: str
    prefix: str
    middle: str
    suffix: str
    test: str | None = None
    entry_point: str | None = None

    @property
    def is_python(self) -> bool:
        return self.language == "python"

    def program(self, middle: str) -> str | None:
        """The text that HumanEval-Infilling executes for that middle; None where there is no test."""
        if self.test is None or self.entry_point is None:
            return None
        return f"{self.prefix}{middle}{self.suffix}\n{self.test}\ncheck({self.entry_point})"


@dataclass(frozen=True)
class ItemFile:
    """A file that was read. `format`: a key of FIELDS."""

    path: Path
    format: str
    items: list[Item]


def read_items(path: Path, limit: int | None = None) -> ItemFile:
    """Reads the tasks of a file, the first `limit` of them when given; the format is told by the first line's fields.

    Raises ItemFileError for what is not one of the formats, naming the file and the line; OSError where the file cannot
    be opened.
    """
    items: list[Item] = []
    found: str | None = None
    for number, values in objects(path):
        where = f"{path}:{number}"
        if found is None:
            found = format_of(values, where)
        if limit is not None and len(items) >= limit:
            break
        items.append(parse(values, found, number, where))
    if found is None:
        raise ItemFileError(f"{path}: no tasks: the file has no lines with text")
    return ItemFile(path, found, items)


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of each line that is not blank."""
    open_file: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_line(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ItemFileError(f"{path}:{number + 1}: not a whole gzip file: {error}") from error


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """A line as the JSON object that it must be."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ItemFileError(f"{where}: not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ItemFileError(f"{where}: not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ItemFileError(f"{where}: JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ItemFileError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def format_of(values: dict[str, Any], where: str) -> str:
    """The format whose first field the object has."""
    for name, fields in FIELDS.items():
        if fields[0] in values:
            return name
    expected = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS.items())
    raise ItemFileError(
        f"{where}: unknown format: the fields are {', '.join(values) or '(none)'}; known are {expected}"
    )


def parse(values: dict[str, Any], format: str, number: int, where: str) -> Item:
    """A line's object as an Item."""

    def text(name: str) -> str:
        if name not in values:
            raise ItemFileError(f"{where}: {name} is missing: {format} lines have {', '.join(FIELDS[format])}")
        value = values[name]
        if not isinstance(value, str):
            raise ItemFileError(f"{where}: {name} must be a string, but is {type(value).__name__}")
        return value

    def optional(name: str) -> str | None:
        return text(name) if values.get(name) is not None else None

    language = text("language") if format == SANTA_CODER else optional("language") or "python"
    item = Item(
        id=text(FIELDS[format][0]),
        line=number,
        language=LANGUAGES.get(language, language),
        prefix=text("prompt"),
        middle=text("canonical_solution"),
        suffix=text("suffix"),
        # SantaCoder-FIM's tests belong to another harness (MultiPL-E), and its measure is the exact match.
        test=optional("test") if format == HUMAN_EVAL else None,
        entry_point=optional("entry_point") if format == HUMAN_EVAL else None,
    )
    if not item.middle:
        raise ItemFileError(f"{where}: canonical_solution is empty: there is no gap to fill")
    if item.entry_point is not None and not item.entry_point.isidentifier():
        raise ItemFileError(f"{where}: entry_point {item.entry_point!r:.60} is not a name")
    return item
