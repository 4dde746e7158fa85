"""Which part of a model goes onto a device with this much memory: layers, experts, cache, buffers, and what is left.

What goes there, what is kept free and what the buffers take is the engine's to say (model/placement.cpp), which does
the same when it opens a model with `n_gpu_layers="auto"`; here are a file's sizes, from its header alone, and the sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pydiffgguf._binding.functions import memory_available, plan_layers
from pydiffgguf._text import human
from pydiffgguf.errors import ModelFormatError, UnsupportedError

from .inspect import FileReport
from .report import table

#: A size without a unit is in bytes, and no device has fewer.
LEAST_BYTES = 1_000_000
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Share:
    """Bytes of one kind, on the device and on the host."""

    what: str
    device: int
    host: int


@dataclass(frozen=True)
class FitPlan:
    """Where everything goes. Bytes of `shares` on the device and `free` add up to `device_bytes`.

    `n_gpu_layers`: how many layers are on the device, the last ones of `n_layers`; 0: nothing is, the device is too
    small for the head and the buffers. `n_cpu_moe`: the experts of so many layers, the first ones, are on the host.
    `offload_kv`: the cache of layers on the device is there too. `n_ctx` positions in `type_kv`; canvases of `n_rows`.
    """

    device_bytes: int
    n_ctx: int
    type_kv: str
    n_rows: int
    n_layers: int
    n_gpu_layers: int
    n_cpu_moe: int
    offload_kv: bool
    shares: tuple[Share, ...]

    @property
    def free(self) -> int:
        """What is left on the device."""
        return self.device_bytes - sum(share.device for share in self.shares)

    @property
    def is_whole(self) -> bool:
        """Everything is on the device."""
        return self.n_gpu_layers == self.n_layers and self.n_cpu_moe == 0

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON types."""
        return {
            "device_bytes": self.device_bytes,
            "n_ctx": self.n_ctx,
            "type_kv": self.type_kv,
            "n_rows": self.n_rows,
            "n_layers": self.n_layers,
            "n_gpu_layers": self.n_gpu_layers,
            "n_cpu_moe": self.n_cpu_moe,
            "offload_kv": self.offload_kv,
            "shares": [{"what": s.what, "device": s.device, "host": s.host} for s in self.shares],
            "free": self.free,
        }


def parse_size(text: str) -> int:
    """`16GB` -> 16 * 10^9 bytes, `16GiB` -> 16 * 2^30, `512 MB`, `1.5GB`, `16000000000`; ValueError for the rest, and
    for a number without a unit that is too small to be one of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"fit: {text!r}, expected a size such as 16GB, 16GiB or 12000MB")
    size = round(float(match.group(1)) * unit)
    if not match.group(2) and size < LEAST_BYTES:
        raise ValueError(f"fit: {text!r} would be bytes: write {text.strip()}GB or {text.strip()}GiB")
    return size


def plan(
    report: FileReport,
    device_bytes: int,
    *,
    n_rows: int | None = None,
    adapter_bytes: int = 0,
    signal_copy: bool = False,
) -> FitPlan:
    """The plan for a device with `device_bytes` free, at the context and cache type that the report is for.

    `n_rows`: rows that are denoised together, by default the file's canvas. `adapter_bytes`: of adapters that will run
    beside the weights, as the engine counts them: the same for each layer. `signal_copy`: the embedding is there once
    more, transposed, in F16. Raises ValueError for options out of range, ModelFormatError when the file's keys do not
    tell its shape, UnsupportedError for the copy where the file has no self-conditioning.
    """
    if device_bytes < 1:
        raise ValueError(f"device_bytes: {device_bytes}, expected at least 1")
    if n_rows is not None and n_rows < 1:
        raise ValueError(f"n_rows: {n_rows}, expected at least 1")
    figures, memory = report.figures, report.memory
    if figures is None or memory.needs is None:
        raise ModelFormatError(f"{report.path}: the keys do not tell its layers (see inspect's findings)")
    needs = memory.needs
    if n_rows is not None:
        needs = figures.needs(n_ctx=needs.n_ctx, type_kv=memory.type_kv, n_rows=n_rows)
    n = len(figures.layers)
    head, dense, experts = sum_tensors(report, n)
    if signal_copy and not figures.values["has_self_conditioning"]:
        raise UnsupportedError(f"signal_copy: {report.path} has no self-conditioning, so there is no signal")
    copy = 2 * figures.values["n_vocab"] * figures.values["n_embd"] if signal_copy else 0
    placed = plan_layers(
        list(zip(dense, experts, strict=True)), head + copy, needs, [(device_bytes, "")], adapters=adapter_bytes
    )
    used = placed.n_gpu_layers > 0
    first_dense, first_expert = n - placed.n_gpu_layers, max(placed.n_cpu_moe, n - placed.n_gpu_layers)

    def split(what: str, by_layer: Sequence[int], first: int) -> Share:
        return Share(what, sum(by_layer[first:]), sum(by_layer[:first]))

    def whole(what: str, size: int) -> Share:
        return Share(what, size if used else 0, 0 if used else size)

    return FitPlan(
        device_bytes=device_bytes,
        n_ctx=needs.n_ctx,
        type_kv=memory.type_kv,
        n_rows=needs.n_rows,
        n_layers=n,
        n_gpu_layers=placed.n_gpu_layers,
        n_cpu_moe=placed.n_cpu_moe,
        offload_kv=used,
        shares=(
            Share("driver, context, workspace", placed.reserve if used else 0, 0),
            whole(f"logits, {needs.n_rows} rows", needs.logits),
            whole("working buffers, at most", needs.passes + needs.sampling),
            whole("embedding, which is the head", head),
            *([Share("the signal's copy of the embedding", copy if used else 0, 0)] if copy else ()),
            split(f"layers without experts, {placed.n_gpu_layers} of {n}", dense, first_dense),
            split(f"KV cache, {needs.n_ctx} positions in {memory.type_kv}", needs.cache, first_dense),
            split(f"experts, {n - first_expert} of {n} layers", experts, first_expert),
            *([split("adapters", [adapter_bytes // n] * n, first_dense)] if adapter_bytes else ()),
        ),
    )


def in_memory(report: FileReport, adapter_bytes: int = 0) -> tuple[str, dict[str, Any]]:
    """Whether this machine's memory holds the model and a session, in a sentence and in JSON types."""
    available, total = memory_available(), report.memory.total_bytes
    if total is None:
        raise ModelFormatError(f"{report.path}: the keys do not tell its layers (see inspect's findings)")
    total += adapter_bytes
    if available is None:
        text = f"It needs {human(total)}; the system does not tell what is available."
    elif large := report.too_large(available - adapter_bytes):
        text = f"It does not fit: {large}."
    else:
        text = f"It fits: it needs {human(total)}, and {human(available)} are available."
    fits = None if available is None else total <= available
    return text, {"available_bytes": available, "total_bytes": total, "fits": fits}


def sum_tensors(report: FileReport, n_layers: int) -> tuple[int, list[int], list[int]]:
    """Bytes as the engine sums them (sizes_of in csrc/model/placement.cpp): the embedding; each layer without its
    experts, the first with what is no layer's; each layer's experts."""
    head, dense, experts = 0, [0] * n_layers, [0] * n_layers
    for tensor in report.tensors:
        parts = tensor.name.split(".", 2)
        layer = int(parts[1]) if parts[0] == "blk" and len(parts) == 3 and parts[1].isdecimal() else 0
        if tensor.name == "token_embd.weight":
            head += tensor.n_bytes
        elif layer < n_layers:
            (experts if "_exps.weight" in tensor.name else dense)[layer] += tensor.n_bytes
    return head, dense, experts


def render(plan: FitPlan) -> RenderableType:
    """The plan for rich: every share, the sums, and the options that ask for it."""
    rows = [(s.what, exact(s.device), exact(s.host)) for s in plan.shares]
    rows.append(("together", exact(sum(s.device for s in plan.shares)), exact(sum(s.host for s in plan.shares))))
    rows.append((f"free, of {human(plan.device_bytes)}", exact(plan.free), ""))
    if plan.n_gpu_layers == 0:
        text = "The device is too small for the head and the buffers: everything stays on the host (n_gpu_layers=0)."
    else:
        text = f"n_gpu_layers={plan.n_gpu_layers}, n_cpu_moe={plan.n_cpu_moe}, offload_kv={plan.offload_kv}"
        text += ": everything is on the device" if plan.is_whole else ""
    title = f"Fit into {human(plan.device_bytes)}"
    return Group(table(title, ["what", "device, MB", "host, MB"], rows, right={1, 2}), Text(text))


def exact(n: int) -> str:
    """Bytes in millions, with a digit behind the point, so that a column can be added up."""
    return f"{n / 1e6:,.1f}" if n else ""
