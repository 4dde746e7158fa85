"""Which part of a model goes onto a device with so much memory: layers, experts, cache, buffers, and what is left over.

The order goes by operations per byte. In a denoise step of 256 rows all weights are read once, those of the experts
too (256 rows choose 8 of 128 experts each, so nearly every one is chosen), but an expert meets 16 rows where a dense
matrix meets 256. So first the buffers and the head, without which the loop cannot stay on the device, then whole layers
without their experts, each with its part of the cache, then experts; all from the last layer backwards.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pydiffgguf.errors import ModelFormatError

from .inspect import DEFAULT_BATCH, FileReport, Keys, Layers, read_layers
from .output import human
from .report import table

#: What the device's driver, its context, loaded kernels and a matrix library's workspace take before the first tensor:
#: 0.3 to 0.5 GB with CUDA, by reports; more is taken by a desktop on the same card.
RESERVE = 500_000_000
#: Floats of the transposed embedding that exist at a time (build_soft_embedding in csrc/graph.cpp).
SOFT_SLICE_FLOATS = 4 << 20

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
    """`16GB` -> 16 * 10^9 bytes, `16GiB` -> 16 * 2^30, `512 MB`, `1.5GB`, `16000000000`; ValueError for the rest."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"fit: {text!r}, expected a size such as 16GB, 16GiB or 12000MB")
    return round(float(match.group(1)) * unit)


@dataclass(frozen=True)
class Buffers:
    """Bytes of what a session holds besides weights and cache: the logits of a canvas, and everything else."""

    logits: int
    working: int


def estimate_buffers(report: FileReport, layers: Layers, n_ctx: int, n_rows: int) -> Buffers:
    """Not less than `Session::plan` (csrc/session.cpp) takes with its own defaults: the largest intermediate tensors of
    a prompt's chunk, or of a canvas, over a full cache, and those of the soft embedding."""
    keys = Keys(report.keys)
    vocab = next((t.shape[-1] for t in report.tensors if t.name == "token_embd.weight"), None)
    values = {name: keys.integer(name) for name in (".embedding_length", ".attention.head_count")}
    values |= {name: keys.integer(name) for name in (".expert_used_count", ".expert_feed_forward_length")}
    window = keys.integer(".attention.sliding_window")
    known = [value for value in values.values() if value is not None]
    if vocab is None or window is None or len(known) != len(values):
        raise ModelFormatError(f"{report.path}: the keys do not tell what buffers it needs (see inspect's findings)")
    hidden, heads, n_used, expert = known
    batch = max(min(DEFAULT_BATCH, n_ctx), n_rows)
    ring = min(n_ctx, window + batch)
    # A layer's scores [visible, rows, heads], and its V as float32 twice: as it lies in the cache, and transposed.
    attention = max(
        (ring if sliding else n_ctx) * 4 * (batch * heads + 2 * kv_heads * head_dim)
        for sliding, kv_heads, head_dim in zip(layers.sliding, layers.kv_heads, layers.head_dims, strict=True)
    )
    widest = heads * max(layers.head_dims)
    attention += batch * 4 * (widest + 4 * hidden)
    # Gate, up, what becomes of them, and down, for each expert of each row.
    experts = batch * n_used * 4 * (2 * expert + 3 * expert + hidden) + batch * 4 * 4 * hidden
    softmax = n_rows * vocab * 4
    soft_embedding = softmax + 2 * SOFT_SLICE_FLOATS * 4 + 2 * n_rows * hidden * 4
    inputs = 2 * batch * (n_ctx + ring) + n_rows * 4 * (widest + hidden)  # masks; attended, soft
    return Buffers(n_rows * vocab * 4, max(attention, experts) + soft_embedding + inputs)


def plan(report: FileReport, device_bytes: int, *, n_rows: int | None = None) -> FitPlan:
    """The plan for a device with `device_bytes` free, at the context and cache type that the report is for.

    `n_rows`: rows that are denoised together, by default the file's canvas. Raises ValueError for options out of range,
    ModelFormatError when the file's keys do not tell its shape.
    """
    if device_bytes < 1:
        raise ValueError(f"device_bytes: {device_bytes}, expected at least 1")
    keys = Keys(report.keys)
    layers, memory = read_layers(keys), report.memory
    canvas = keys.integer("diffusion.canvas_length") if n_rows is None else n_rows
    if layers is None or memory.kv_layers is None or memory.n_ctx is None or canvas is None:
        raise ModelFormatError(f"{report.path}: the keys do not tell its layers (see inspect's findings)")
    if canvas < 1:
        raise ValueError(f"n_rows: {canvas}, expected at least 1")
    buffers = estimate_buffers(report, layers, memory.n_ctx, canvas)
    n = len(layers.sliding)
    head = 0
    dense: dict[int, int] = defaultdict(int)
    experts: dict[int, int] = defaultdict(int)
    for tensor in report.tensors:
        parts = tensor.name.split(".", 2)
        if parts[0] != "blk":
            head += tensor.n_bytes
        elif tensor.kind == "experts":
            experts[int(parts[1])] += tensor.n_bytes
        else:
            dense[int(parts[1])] += tensor.n_bytes
    free = device_bytes - RESERVE - buffers.logits - buffers.working - head
    first_dense = first_expert = n  # of the layers whose part is on the device
    if free >= 0:
        while first_dense > 0 and dense[first_dense - 1] + memory.kv_layers[first_dense - 1] <= free:
            first_dense -= 1
            free -= dense[first_dense] + memory.kv_layers[first_dense]
    if first_dense == 0:
        while first_expert > 0 and experts[first_expert - 1] <= free:
            first_expert -= 1
            free -= experts[first_expert]
    used = first_dense < n
    n_device, n_experts = n - first_dense, n - first_expert

    def split(what: str, by_layer: list[int], first: int) -> Share:
        return Share(what, sum(by_layer[first:]), sum(by_layer[:first]))

    def whole(what: str, size: int) -> Share:
        return Share(what, size if used else 0, 0 if used else size)

    return FitPlan(
        device_bytes=device_bytes,
        n_ctx=memory.n_ctx,
        type_kv=memory.type_kv,
        n_rows=canvas,
        n_layers=n,
        n_gpu_layers=n_device,
        n_cpu_moe=first_expert,
        offload_kv=used,
        shares=(
            Share("driver, context, workspace", RESERVE if used else 0, 0),
            whole(f"logits, {canvas} rows", buffers.logits),
            whole("working buffers, at most", buffers.working),
            whole("embedding, head, self-conditioning", head),
            split(f"layers without experts, {n_device} of {n}", [dense[i] for i in range(n)], first_dense),
            split(f"KV cache, {memory.n_ctx} positions in {memory.type_kv}", list(memory.kv_layers), first_dense),
            split(f"experts, {n_experts} of {n} layers", [experts[i] for i in range(n)], first_expert),
        ),
    )


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
