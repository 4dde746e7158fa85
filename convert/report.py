"""A FileReport as a table for the terminal, and as JSON types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gguf import LlamaFileType
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .gguf_file import Scalar, Value
from .inspect import FileReport, MemoryEstimate, TypeShare
from .output import human


def to_dict(report: FileReport, *, tensors: bool = False) -> dict[str, Any]:
    """The report in JSON types. Arrays of over 64 elements are cut (`count` has their length); `tensors`: one entry
    per tensor too."""

    def plain(value: Scalar) -> Scalar | None:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def key(value: Value) -> dict[str, Any]:
        if isinstance(value.value, list):
            return {"type": value.type, "count": value.count, "value": [plain(v) for v in value.value[:64]]}
        return {"type": value.type, "value": plain(value.value)}

    def share(s: TypeShare) -> dict[str, int]:
        return {"tensors": s.tensors, "values": s.values, "bytes": s.n_bytes}

    out: dict[str, Any] = {
        "path": str(report.path),
        "bytes": report.size,
        "gguf_version": report.version,
        "parameters": report.n_parameters,
        "n_tensors": len(report.tensors),
        "keys": {name: key(value) for name, value in report.keys.items()},
        "types": {kind: share(s) for kind, s in report.types.items()},
        "classes": {name: {kind: share(s) for kind, s in kinds.items()} for name, kinds in report.classes.items()},
        "memory": {
            "n_ctx": report.memory.n_ctx,
            "type_kv": report.memory.type_kv,
            "weight_bytes": report.memory.weight_bytes,
            "kv_bytes": report.memory.kv_bytes,
        },
        "findings": [{"level": f.level, "text": f.text} for f in report.findings],
    }
    if tensors:
        out["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.n_bytes, "class": t.kind}
            for t in report.tensors
        ]
    return out


def printable(text: str, limit: int = 100) -> str:
    """A stranger's text for a terminal: one line without control characters, which could move the cursor."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def show_value(value: Value) -> str:
    """A key's value on one line."""
    if isinstance(value.value, list):
        shown = ", ".join(printable(str(v), 20) for v in value.value[:8])
        return f"[{shown}{', ...' if value.count > 8 else ''}]"
    return printable(f"{value.value:.7g}" if isinstance(value.value, float) else str(value.value), 60)


def render(report: FileReport, *, tensors: bool = False) -> RenderableType:
    """The report for rich: a summary, keys, types by class, memory, findings; `tensors`: a table of them too."""
    name = report.keys.get("general.name")
    title = printable(str(name.value)) if name else report.path.name
    file_type = report.keys.get("general.file_type")
    parts: list[RenderableType] = [
        Text.assemble(
            (title, "bold"),
            f"  {report.n_parameters / 1e6:,.1f} M parameters, {len(report.tensors)} tensors, {human(report.size)}, ",
            f"GGUF v{report.version}, {show_file_type(file_type)}",
        ),
        table("Keys", ["key", "type", "count", "value"], [key_row(*item) for item in report.keys.items()], right={2}),
        table("Types", ["class", "type", "tensors", "values", "size"], list(type_rows(report)), right={2, 3, 4}),
        table("Memory", ["what", "size"], memory_rows(report.memory), right={1}),
    ]
    if tensors:
        rows = [
            (printable(t.name), " x ".join(map(str, t.shape)), t.type, human(t.n_bytes), t.kind) for t in report.tensors
        ]
        parts.append(table("Tensors", ["tensor", "shape", "type", "size", "class"], rows, right={3}))
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    parts += [Text.assemble((f"{f.level}: ", styles[f.level]), printable(f.text, 300)) for f in report.findings]
    if not report.findings:
        parts.append(Text("Nothing is missing."))
    return Group(*parts)


def show_file_type(value: Value | None) -> str:
    """`general.file_type` by its name: 7 -> "MOSTLY_Q8_0"."""
    if value is None:
        return "no file type"
    try:
        return LlamaFileType(value.value).name  # type: ignore[arg-type]  # another type is a ValueError too
    except ValueError:
        return f"file type {show_value(value)}"


def key_row(name: str, value: Value) -> tuple[str, ...]:
    count = str(value.count) if isinstance(value.value, list) else ""
    return printable(name), value.type, count, show_value(value)


def type_rows(report: FileReport) -> list[tuple[str, ...]]:
    kinds = [*report.classes.items(), ("all", report.types)]
    return [
        (name if i == 0 else "", kind, str(s.tensors), f"{s.values:,}", human(s.n_bytes))
        for name, by_type in kinds
        for i, (kind, s) in enumerate(by_type.items())
    ]


def memory_rows(memory: MemoryEstimate) -> list[tuple[str, str]]:
    rows = [("weights", human(memory.weight_bytes))]
    if memory.kv_bytes is not None:
        rows.append((f"KV cache, {memory.n_ctx} positions in {memory.type_kv}", human(memory.kv_bytes)))
        rows.append(("together, working buffers on top", human(memory.weight_bytes + memory.kv_bytes)))
    return rows


def table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]], right: set[int]) -> Table:
    """A plain table; cells are Text, so that brackets in a file's strings are not markup."""
    out = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))
    return out
