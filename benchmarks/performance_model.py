"""A denoise step of the released model on paper: bytes, operations and launches, the floors they set on a device, and
an estimate of what the engine as it is built would take.

    python benchmarks/performance_model.py            # the tables of docs/PERFORMANCE.md
    python benchmarks/performance_model.py --n-past 8192 --json

Nothing is measured here. A floor is what a device cannot beat with this division of work: for each part of the step
the larger of bytes over bandwidth and operations over peak, added up, since the parts follow one another. The
estimates come from one published time of the same layers with the same kernels (ggml's), which is far above its
floor. Shapes and types are those of the published files (shapes.py), the division of work is csrc/pass/graph.cpp's
and csrc/cuda's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import shapes

from pydiffgguf.convert.inspection.fit import FitPlan, plan
from pydiffgguf.convert.inspection.inspect import inspect_file
from pydiffgguf.convert.source.checkpoint import CheckpointTensor

SHAPE = "26b-a4b"
CONFIG = shapes.shape(SHAPE)
CANVAS = CONFIG.canvas_length
N_LAYERS = len(CONFIG.layers)
STEPS = (12, 16, 24)
GB = 10**9

#: Operations of one layer in a step's CUDA graph, kernels and a copy, as the CUDA build launches them on a stand-in for
#: the runtime that says it has 128 multiprocessors: tests/test_cuda_stand_in.py counts them.
SLIDING_LAUNCHES, FULL_LAUNCHES = 79, 75
#: Head, embedding and self-conditioning; then our three.
LAUNCHES_BESIDES = 22 + 3
#: Seconds from one kernel of a replayed CUDA graph to the next, when both are short. An assumption.
LAUNCH = 1.5e-6
#: Seconds of 256 rows through the layers of this very shape in Q4_K_M, by llama.cpp on a card of an RTX 4090's class:
#: its pull request 26977 has 33.8 ms for 128 rows and 53.9 ms for 512; this is on the line between them.
CALIBRATOR = 40.5e-3


@dataclass(frozen=True)
class Device:
    """Peaks from the vendor's data sheet, without sparsity. `memory`: what --fit may fill; None: it all fits."""

    name: str
    bandwidth: float  # bytes a second
    int8: float  # operations a second: quantized products (MMQ)
    half: float  # operations a second, FP16 with FP32 sums: attention, the generic soft embedding
    memory: int | None = None
    issue: float = 0.0  # multiprocessors times boost clock in GHz: what instructions that are no tensor ones go by


H100 = Device("H100 SXM", 3.35e12, 1979e12, 989e12, None, 132 * 1.755)
RTX_5090 = Device("RTX 5090", 1.792e12, 838e12, 209.5e12, 32 * GB, 170 * 2.407)
RTX_4090 = Device("RTX 4090", 1.008e12, 660.6e12, 165.2e12, 24 * GB, 128 * 2.52)
RTX_4070 = Device("RTX 4070 (12 GB)", 0.504e12, 233e12, 58.3e12, 12 * GB, 46 * 2.475)
DEVICES = (H100, RTX_5090, RTX_4090, RTX_4070)
#: Cards that have no column in the tables, and floors where a first hour meets them.
OTHERS = (Device("H200", 4.8e12, 1979e12, 989e12, None, 132 * 1.83),)


def card(name: str) -> Device | None:
    """The device that the driver calls `name`; None for one whose peaks are not here."""
    for device in (*DEVICES, *OTHERS):
        plain = device.name.removesuffix(" (12 GB)").removesuffix(" SXM")
        if re.search(rf"\b{plain}(?! (?:Ti|SUPER|D|Laptop|NVL|PCIe)\b)", name):
            return device
    return None


@dataclass(frozen=True)
class Host:
    """What the experts meet that do not fit: a desktop with 8 cores. Memory and bus are assumptions, the cores'
    rates were measured on one (benchmarks/results/levels.md, experts of this very shape) and are taken eight times."""

    name: str
    rates: Mapping[str, Mapping[int, float]]  # by file and rows an expert: operations a second of one core
    cores: int = 8
    bandwidth: float = 89.6e9  # two channels of DDR5-5600
    mapped: float = 8e9  # PCIe 4.0 x16 from pages of a mapped file, which the driver copies through a buffer of its own
    pinned: float = 25e9  # the same from memory that is pinned for the device

    def seconds(self, type: str, rows: int, n_bytes: float, operations: float) -> float:
        """Of experts whose file is `type`, in a pass of so many rows; the work is that of this pass."""
        rate = self.rates[type][round(rows * CONFIG.experts_used / CONFIG.experts)]
        return max(n_bytes / self.bandwidth, operations / (self.cores * rate))


# Experts of Q4_K_M files are Q4_K and Q5_0, and the second was measured; 32 rows an expert are those of 512.
AVX2 = Host("AVX2", {"q4_k_m": {16: 81e9, 32: 106e9}, "q8_0": {16: 70e9, 32: 74e9}})
VNNI = Host("AVX-512 with VNNI", {"q4_k_m": {16: 125e9, 32: 176e9}, "q8_0": {16: 132e9, 32: 185e9}})
HOSTS = (AVX2, VNNI)
#: Rows of a pass that encodes a prompt (n_batch).
CHUNK = 512


@dataclass(frozen=True)
class Part:
    """One part of a step: bytes read and written, operations, and on which of a device's units."""

    name: str
    n_bytes: float
    operations: float
    unit: str = "int8"

    def floor(self, device: Device) -> float:
        """Seconds."""
        return max(self.n_bytes / device.bandwidth, self.operations / getattr(device, self.unit))


@dataclass(frozen=True)
class Weights:
    """One tensor of the file; `kind`: its class in convert/names.py, `layer` None for the global ones."""

    name: str
    kind: str
    layer: int | None
    n_elements: int
    n_bytes: int


@functools.cache
def tensors(type: str) -> tuple[Weights, ...]:
    """All tensors of the published file of that type."""
    found = []
    for p in shapes.plan(SHAPE, type)[0]:
        tensor = p.tensor
        assert isinstance(tensor, CheckpointTensor)
        layer = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else None
        found.append(Weights(tensor.name, tensor.rule.kind, layer, math.prod(tensor.shape), p.n_bytes))
    return tuple(found)


def products(some: Sequence[Weights], rows: float) -> tuple[float, float]:
    """Bytes and operations of matrices that each meet so many rows."""
    return sum(t.n_bytes for t in some), 2 * rows * sum(t.n_elements for t in some)


def visible(layer: int, n_past: int) -> int:
    """Cached positions that a row of the canvas sees."""
    return min(n_past, CONFIG.sliding_window - 1) if CONFIG.layers[layer].sliding else n_past


def step_parts(type: str, n_past: int) -> list[Part]:
    """A step of one canvas over `n_past` cached positions, in float16, with the kernels of csrc/cuda."""
    every = list(tensors(type))
    experts = [t for t in every if t.kind == "experts"]
    layers = [t for t in every if t.layer is not None and t.kind != "experts"]
    embedding = [t for t in every if t.kind == "embedding"]
    conditioning = [t for t in every if t.kind == "self-conditioning"]
    kv = attention = 0.0
    for layer in range(N_LAYERS):
        shape, seen = CONFIG.layers[layer], visible(layer, n_past)
        # Read, and the canvas's own written and read.
        kv += 2 * 2 * shape.kv_heads * shape.head_dim * (seen + 2 * CANVAS)
        attention += 2 * 2 * CANVAS * (seen + CANVAS) * CONFIG.heads * shape.head_dim
    logits = CANVAS * CONFIG.vocab_size * 4
    return [
        Part("dense weights", *products(layers + conditioning, CANVAS)),
        # Each row takes 8 of 128, so each expert meets 16 rows; all are read.
        Part("experts", *products(experts, CANVAS * CONFIG.experts_used / CONFIG.experts)),
        Part("attention", kv, attention, "half"),
        Part("head", *products(embedding, CANVAS)),
        # Written, softcapped in place, and read by dg_sample_rows, which leaves the processed ones.
        Part("logits: softcap, sampler", logits * (1 + 2 + 2), 0.0),
        Part("self-conditioning, gathered", gather_bytes(every, 100), 0.0),
    ]


def gather_bytes(every: Sequence[Weights], candidates: int) -> float:
    """Of dg_gather_signal, when each row has so many candidates."""
    (embedding,) = (t for t in every if t.kind == "embedding")
    return CANVAS * candidates * embedding.n_bytes / CONFIG.vocab_size


def dense_signal(type: str) -> Part:
    """The generic soft embedding in place of the gather: the softmax written and read, the embedding read, and as
    float32 written, transposed (read and written), and read by the product."""
    (embedding,) = (t for t in tensors(type) if t.kind == "embedding")
    softmax = CANVAS * CONFIG.vocab_size * 4
    n_bytes = 3 * softmax + embedding.n_bytes + 4 * 4 * embedding.n_elements
    return Part("self-conditioning, generic", n_bytes, 2 * CANVAS * embedding.n_elements, "half")


def copied_signal(type: str) -> Part:
    """The generic one with `signal_copy`: the softmax written and read, scaled in place (read and written), and the
    transposed embedding in F16 read by the product."""
    (embedding,) = (t for t in tensors(type) if t.kind == "embedding")
    softmax = CANVAS * CONFIG.vocab_size * 4
    n_bytes = 5 * softmax + 2 * embedding.n_elements
    return Part("self-conditioning, generic with the copy", n_bytes, 2 * CANVAS * embedding.n_elements, "half")


def n_launches() -> int:
    n_sliding = sum(layer.sliding for layer in CONFIG.layers)
    return n_sliding * SLIDING_LAUNCHES + (N_LAYERS - n_sliding) * FULL_LAUNCHES + LAUNCHES_BESIDES


def encode_parts(type: str, n_past: int) -> list[Part]:
    """The canvas into the cache: a step without head, logits and signal."""
    return [p for p in step_parts(type, n_past) if p.name in ("dense weights", "experts", "attention")]


@dataclass(frozen=True)
class Floors:
    """Seconds. `host`: of the experts that stay on the host, where the CPU computes them."""

    device: str
    type: str
    memory: float  # the step's parts on the device, one after the other
    launches: float
    host: float
    n_cpu_moe: int
    encode: float

    @property
    def step(self) -> float:
        """Kernels of a graph overlap with nothing: the memory's floor, or the launches' where that is more."""
        return max(self.memory, self.launches) + self.host

    def tokens_per_second(self, steps: int) -> float:
        """256 tokens for so many steps and the pass that encodes them."""
        return CANVAS / (steps * self.step + self.encode)


def fit(type: str, device: Device, n_ctx: int) -> FitPlan | None:
    """What `inspect --fit` says of the published file on this device."""
    if device.memory is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        shapes.write_head(path, SHAPE, type=type)
        return plan(inspect_file(path, n_ctx=n_ctx), device.memory)


def floors(type: str, device: Device, n_past: int, n_ctx: int = 8192, host: Host = AVX2) -> Floors:
    """Of a step and of the pass that encodes a canvas, with the experts that do not fit on the host."""
    placed = fit(type, device, n_ctx)
    n_cpu_moe = placed.n_cpu_moe if placed else 0
    n_bytes, operations = experts_of(type, n_cpu_moe)
    away = host.seconds(type, CANVAS, n_bytes, operations)
    scale = {"experts": 1 - n_bytes / experts_of(type, N_LAYERS)[0]}
    memory = sum(p.floor(device) * scale.get(p.name, 1.0) for p in step_parts(type, n_past))
    encode = sum(p.floor(device) * scale.get(p.name, 1.0) for p in encode_parts(type, n_past)) + away
    return Floors(device.name, type, memory, n_launches() * LAUNCH, away, n_cpu_moe, encode)


def experts_of(type: str, n_layers: int) -> tuple[float, float]:
    """Bytes and operations of the first layers' experts in a step."""
    some = [t for t in tensors(type) if t.kind == "experts" and t.layer is not None and t.layer < n_layers]
    return products(some, CANVAS * CONFIG.experts_used / CONFIG.experts)


#: Tokens of a prompt before an answer of one canvas at 16 steps.
PROMPTS = (1024, 8192)


@dataclass(frozen=True)
class Away:
    """The experts that a device has no room for: `n_bytes` of the first `n_layers`, and `operations` of a canvas.
    `step` and `encode`: seconds that the device itself takes."""

    device: Device
    type: str
    n_layers: int
    n_bytes: float
    operations: float
    step: float
    encode: float

    def computed(self, host: Host, rows: int) -> float:
        """Seconds of a pass of so many rows, on the host."""
        return host.seconds(self.type, rows, self.n_bytes, self.operations * rows / CANVAS)

    def answer(self, host: Host, n_prompt: int, copied: float | None) -> float:
        """Seconds of a prompt and one canvas at 16 steps. `copied`: bytes a second at which the experts go to the
        device for each pass of the prompt; None: they are computed on the host there too, as in the steps."""
        away = self.computed(host, CHUNK) if copied is None else self.n_bytes / copied
        prompt = math.ceil(n_prompt / CHUNK) * (self.encode + away)
        return prompt + 16 * (self.step + self.computed(host, CANVAS))


def every_away(n_past: int) -> list[Away]:
    """Of the devices that do not hold their file."""
    out = []
    for device, type in ((RTX_4090, "q8_0"), (RTX_4070, "q4_k_m"), (RTX_4070, "q8_0")):
        f = floors(type, device, n_past)
        n_bytes, operations = experts_of(type, f.n_cpu_moe)
        out.append(Away(device, type, f.n_cpu_moe, n_bytes, operations, f.step - f.host, f.encode - f.host))
    return out


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step as the engine is built, between two bounds, and of the pass that encodes the canvas.

    `best`: ggml's kernels are as far above the floor as they were where they were timed, the signal is gathered.
    `worst`: their time goes with the card's instructions (its multiprocessors times its clock) and not with its
    bandwidth or tensor cores; attention's products are float32 ones, which cuBLAS makes in TF32 at half of FP16's rate;
    rows are flat, so their signal is the generic one; no launch is hidden.
    """

    best: float
    worst: float
    encode_best: float
    encode_worst: float

    def tokens_per_second(self, steps: int) -> tuple[float, float]:
        """The lower and the upper bound."""
        return (
            CANVAS / (steps * self.worst + self.encode_worst),
            CANVAS / (steps * self.best + self.encode_best),
        )


def estimate(type: str, device: Device, n_past: int) -> Estimate:
    """From the one published time (CALIBRATOR) and the floors."""
    timed = sum(p.floor(RTX_4090) for p in encode_parts("q4_k_m", n_past))
    factor = CALIBRATOR / timed
    floor = floors(type, device, n_past)
    layers = factor * (floor.encode - floor.host)
    rest = factor * (floor.memory - (floor.encode - floor.host))
    (attention,) = (p for p in encode_parts(type, n_past) if p.name == "attention")
    issued = max(layers, CALIBRATOR * RTX_4090.issue / device.issue) + attention.operations / (device.half / 2)
    return Estimate(
        best=layers + rest + floor.host,
        worst=issued + rest + dense_signal(type).floor(device) + floor.launches + floor.host,
        encode_best=layers + floor.host,
        encode_worst=issued + floor.launches + floor.host,
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def tables(n_past: int) -> dict[str, str]:
    """The generated tables of docs/PERFORMANCE.md, by name."""
    out = {}
    for type in ("q4_k_m", "q8_0"):
        parts = [*step_parts(type, n_past), dense_signal(type), copied_signal(type)]
        out[f"parts {type}"] = markdown_table(
            ["part", "GB", "TOP", *(f"{d.name}, ms" for d in DEVICES)],
            [
                [p.name, f"{p.n_bytes / GB:.3f}", f"{p.operations / 1e12:.3f}", *(ms(p.floor(d)) for d in DEVICES)]
                for p in parts
            ],
        )
    rows = []
    for device in DEVICES:
        for type in ("q4_k_m", "q8_0"):
            f = floors(type, device, n_past)
            where = f"{f.n_cpu_moe} of {N_LAYERS} layers: {ms(f.host)} ms" if f.n_cpu_moe else "none"
            rows.append(
                [f"{device.name}, {type.upper()}", ms(f.memory), where, ms(f.step), ms(f.encode)]
                + [f"{f.tokens_per_second(n):,.0f}" for n in STEPS]
            )
    out["floors"] = markdown_table(
        ["device, file", "on the device, ms", "experts on the host", "step, ms", "encode, ms"]
        + [f"tokens/s at {n} steps" for n in STEPS],
        rows,
    )
    rows = []
    for device in DEVICES:
        for type in ("q4_k_m", "q8_0"):
            f, e = floors(type, device, n_past), estimate(type, device, n_past)
            low, high = e.tokens_per_second(16)
            rows.append(
                [
                    f"{device.name}, {type.upper()}",
                    ms(f.step),
                    f"{ms(e.best)} to {ms(e.worst)}",
                    f"{low:,.0f} to {high:,.0f}",
                    "not measured",
                ]
            )
    out["as built"] = markdown_table(
        ["device, file", "floor, ms", "as built, ms (estimate)", "tokens/s at 16 steps (estimate)", "measured"], rows
    )
    rows = [
        [
            f"{a.device.name}, {a.type.upper()}",
            f"{a.n_layers} of {N_LAYERS}: {a.n_bytes / GB:.2f}",
            f"{n_rows}",
            *(ms(a.computed(host, n_rows)) for host in HOSTS),
            ms(a.n_bytes / AVX2.mapped),
            ms(a.n_bytes / AVX2.pinned),
        ]
        for a in every_away(n_past)
        for n_rows in (CANVAS, CHUNK)
    ]
    columns = ["device, file", "layers: GB", "rows", *(f"computed, {host.name}, ms" for host in HOSTS)]
    out["experts away"] = markdown_table([*columns, "copied, mapped, ms", "copied, pinned, ms"], rows)
    rows = [
        [
            f"{a.device.name}, {a.type.upper()}",
            host.name,
            f"{n_prompt:,}",
            *(f"{a.answer(host, n_prompt, rate):.1f}" for rate in (None, host.mapped, host.pinned)),
        ]
        for a in every_away(n_past)
        for host in HOSTS
        for n_prompt in PROMPTS
    ]
    columns = ["device, file", "host", "prompt, tokens", "computed, s", "prompt copied, mapped, s"]
    out["answers"] = markdown_table([*columns, "prompt copied, pinned, s"], rows)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The floors of a denoise step of the released model.")
    parser.add_argument("--n-past", type=int, default=1024, metavar="N", help="cached positions (default: 1024)")
    parser.add_argument("--json", action="store_true", help="print one object")
    args = parser.parse_args(argv)
    if args.n_past < 1:
        parser.error(f"--n-past: {args.n_past}, expected at least 1")
    if args.json:
        every = [floors(type, device, args.n_past) for device in DEVICES for type in ("q4_k_m", "q8_0")]
        step = {type: [asdict(p) for p in step_parts(type, args.n_past)] for type in ("q4_k_m", "q8_0")}
        print(json.dumps({"parts": step, "launches": n_launches(), "floors": [asdict(f) for f in every]}, indent=1))
        return 0
    for name, table in tables(args.n_past).items():
        print(f"<!-- {name} -->\n{table}\n<!-- end -->\n")
    print(f"{n_launches():,} launches a step, {ms(n_launches() * LAUNCH)} ms at {LAUNCH * 1e6:.1f} us each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
