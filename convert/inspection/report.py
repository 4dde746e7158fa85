"""A FileReport or a FileDiff as a table for the terminal, and as JSON types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gguf import LlamaFileType
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pydiffgguf._binding.functions import memory_available
from pydiffgguf._text import human, printable

from .diff import FileDiff, first_difference
from .gguf_file import Scalar, TensorInfo, Value
from .inspect import FileReport, MemoryEstimate, TypeShare, base_name


def to_dict(report: FileReport, *, tensors: bool = False) -> dict[str, Any]:
    """The report in JSON types. Arrays of over 64 elements are cut (`count` has their length); `tensors`: one entry
    per tensor too."""

    def share(s: TypeShare) -> dict[str, int]:
        return {"tensors": s.tensors, "values": s.values, "bytes": s.n_bytes}

    out: dict[str, Any] = {
        "path": str(report.path),
        "parts": [str(part) for part in report.parts],
        "bytes": report.size,
        "gguf_version": report.version,
        "parameters": report.n_parameters,
        "n_tensors": len(report.tensors),
        "keys": {name: value_to_dict(value) for name, value in report.keys.items()},
        "types": {kind: share(s) for kind, s in report.types.items()},
        "classes": {name: {kind: share(s) for kind, s in kinds.items()} for name, kinds in report.classes.items()},
        "memory": {
            "n_ctx": report.memory.n_ctx,
            "type_kv": report.memory.type_kv,
            "weight_bytes": report.memory.weight_bytes,
            "kv_bytes": report.memory.kv_bytes,
            "buffer_bytes": report.memory.buffer_bytes,
            "total_bytes": report.memory.total_bytes,
            "available_bytes": memory_available(),
        },
        "findings": [{"level": f.level, "text": f.text} for f in report.findings],
    }
    if tensors:
        out["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.n_bytes, "class": t.kind}
            for t in report.tensors
        ]
    return out


def value_to_dict(value: Value) -> dict[str, Any]:
    """A key's value in JSON types; what is no finite number is null."""

    def plain(value: Scalar) -> Scalar | None:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    if isinstance(value.value, list):
        return {"type": value.type, "count": value.count, "value": [plain(v) for v in value.value[:64]]}
    return {"type": value.type, "value": plain(value.value)}


def diff_to_dict(diff: FileDiff) -> dict[str, Any]:
    """The comparison in JSON types. `data`: names of tensors whose weights differ, null when they were not compared."""
    a, b = diff.a, diff.b

    def tensor(t: TensorInfo) -> dict[str, Any]:
        return {"type": t.type, "shape": list(t.shape), "bytes": t.n_bytes}

    return {
        "a": str(a.path),
        "b": str(b.path),
        "same": diff.same,
        "keys": {
            "only_a": {name: value_to_dict(a.keys[name]) for name in diff.keys_only_a},
            "only_b": {name: value_to_dict(b.keys[name]) for name in diff.keys_only_b},
            "changed": {
                name: {
                    "a": value_to_dict(a.keys[name]),
                    "b": value_to_dict(b.keys[name]),
                    "first_difference": first_difference(a.keys[name], b.keys[name]),
                }
                for name in diff.changed_keys
            },
        },
        "tensors": {
            "only_a": {name: tensor(a.tensors[name]) for name in diff.tensors_only_a},
            "only_b": {name: tensor(b.tensors[name]) for name in diff.tensors_only_b},
            "changed": {
                name: {"a": tensor(a.tensors[name]), "b": tensor(b.tensors[name])} for name in diff.changed_tensors
            },
        },
        "data": None if diff.changed_data is None else list(diff.changed_data),
    }


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
    size = human(report.size) + (f" in {len(report.parts)} files" if len(report.parts) > 1 else "")
    parts: list[RenderableType] = [
        Text.assemble(
            (title, "bold"),
            f"  {report.n_parameters / 1e6:,.1f} M parameters, {len(report.tensors)} tensors, {size}, ",
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
    if large := report.too_large(memory_available()):
        parts.append(Text(f"It does not fit into this machine's memory: {large}.", "yellow"))
    return Group(*parts)


def render_diff(diff: FileDiff) -> RenderableType:
    """The comparison for rich. Layers whose tensors of a name changed alike stand on one line."""
    a, b = diff.a, diff.b
    keys = [(printable(name), show_value(a.keys[name]), "") for name in diff.keys_only_a]
    keys += [(printable(name), "", show_value(b.keys[name])) for name in diff.keys_only_b]
    keys += [(printable(name), *show_change(a.keys[name], b.keys[name])) for name in diff.changed_keys]
    tensors = [(name, show_tensor(a.tensors[name]), "") for name in diff.tensors_only_a]
    tensors += [(name, "", show_tensor(b.tensors[name])) for name in diff.tensors_only_b]
    tensors += [(name, show_tensor(a.tensors[name]), show_tensor(b.tensors[name])) for name in diff.changed_tensors]
    tensors += [(name, "other weights", "other weights") for name in diff.changed_data or ()]
    parts: list[RenderableType] = [
        Text(f"{letter}: {printable(str(head.path), 300)}, {human(head.size)}, {len(head.tensors)} tensors")
        for letter, head in (("a", a), ("b", b))
    ]
    if keys:
        parts.append(table("Keys", ["key", "a", "b"], keys, right=set()))
    if tensors:
        parts.append(table("Tensors", ["tensor", "layers", "a", "b"], by_layers(tensors), right=set()))
    if diff.same:
        parts.append(Text("Nothing differs."))
    if diff.changed_data is None:
        parts.append(Text("The weights were not compared."))
    return Group(*parts)


def show_tensor(tensor: TensorInfo) -> str:
    return f"{tensor.type} {' x '.join(map(str, tensor.shape))}"


def show_change(one: Value, other: Value) -> tuple[str, str]:
    """Two values that differ; of arrays the first entry that does, where it is known."""
    at = first_difference(one, other)
    if at is None or not isinstance(one.value, list) or not isinstance(other.value, list):
        shown = [f"{v.count} entries" if isinstance(v.value, list) else show_value(v) for v in (one, other)]
        if one.type != other.type:
            return f"{shown[0]}, {one.type}", f"{shown[1]}, {other.type}"
        return shown[0], f"{shown[1]}, others" if shown[0] == shown[1] else shown[1]
    return f"[{at}]: {printable(str(one.value[at]), 40)}", f"[{at}]: {printable(str(other.value[at]), 40)}"


def by_layers(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, ...]]:
    """(name, a, b) of tensors -> (name without the layer, layers, a, b), one row for all layers that agree."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    for name, one, other in rows:
        base = base_name(name)
        found = layers.setdefault((base, one, other), [])
        if base != name:
            found.append(int(name.split(".")[1]))
    return [(printable(name), show_runs(numbers), one, other) for (name, one, other), numbers in layers.items()]


def show_runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{first}-{last}" if first != last else f"{first}" for first, last in runs)


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
    if memory.buffer_bytes is not None and memory.total_bytes is not None:
        rows.append(("buffers, at most", human(memory.buffer_bytes)))
        rows.append(("together", human(memory.total_bytes)))
    available = memory_available()
    if available is not None:
        rows.append(("this machine has available", human(available)))
    return rows


def table(title: str, columns: list[str], rows: Sequence[tuple[str, ...]], right: set[int]) -> Table:
    """A plain table; cells are Text, so that brackets in a file's strings are not markup."""
    out = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        out.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))
    return out
