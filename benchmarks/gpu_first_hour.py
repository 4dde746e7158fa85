"""The first three things to measure when a GPU is at hand, as one script that does them and prints the table.

    python benchmarks/gpu_first_hour.py MODEL.gguf
    python benchmarks/gpu_first_hour.py MODEL.gguf --bandwidth 936 --json first_hour.json

1. The kernels of csrc/cuda at the released shape: the same argmax, draws and entropies as the C++ sampler, on the
   device itself, and the time of each against its floor. Compiled here with nvcc.
2. A denoise step of MODEL with all its layers on the GPU, with each sampler (kernels, operators, host), against the
   floors of performance_model.py; tokens per second at 12, 16 and 24 steps a canvas. Run it again with
   GGML_CUDA_DISABLE_GRAPHS=1: the difference is what the launches cost.
3. How many tokens make up a row's softmax, step by step: what the gathered self-conditioning signal reads, and how
   often a row has more of them than it has room for. It needs a trained model, and no GPU: --candidates-only.

Refuses to run without an NVIDIA GPU: nothing here falls back to the CPU and calls it a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import performance_model as paper

from pydiffgguf import DiffGGUFError, DiffusionModel, UnsupportedError
from pydiffgguf._binding import functions
from pydiffgguf._binding.functions import sample
from pydiffgguf._binding.records import Sampling
from pydiffgguf.cli.bench import PROMPT, measure

ROOT = Path(__file__).resolve().parent.parent
CAPACITY = 8192  # csrc/cuda/step.h
SAMPLERS = ("kernels", "operators", "host")
Q6_K = 6  # RowType in csrc/cuda/dequantize.h

Floats = npt.NDArray[np.float32]


class Gpu(NamedTuple):
    """The first NVIDIA GPU; `capability` such as "89"."""

    name: str
    capability: str


def find_gpu() -> Gpu:
    """Raises SystemExit with what is missing where there is no GPU, or no nvcc to compile the kernels with."""
    smi, nvcc = shutil.which("nvidia-smi"), shutil.which("nvcc")
    if smi is None:
        raise SystemExit("gpu_first_hour: no NVIDIA GPU here (no nvidia-smi on PATH): nothing was measured")
    query = [smi, "--query-gpu=name,compute_cap", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    name, _, capability = done.stdout.strip().rpartition(", ")
    if done.returncode != 0 or not name:
        reason = (done.stdout + done.stderr).strip() or "it lists none"
        raise SystemExit(f"gpu_first_hour: no NVIDIA GPU here (nvidia-smi: {reason}): nothing was measured")
    if nvcc is None:
        raise SystemExit(f"gpu_first_hour: {name} is here, but no nvcc on PATH to compile the kernels with")
    return Gpu(name, capability.replace(".", ""))


def find_device(gpu: Gpu, bandwidth: float | None) -> paper.Device:
    """The GPU's peaks; `bandwidth` in GB/s stands in for a card that performance_model.py does not know."""
    for device in paper.DEVICES:
        if device.name.removesuffix(" (12 GB)").removesuffix(" SXM") in gpu.name:
            return device
    if bandwidth is None:
        raise SystemExit(f"gpu_first_hour: {gpu.name} is not in performance_model.py: give --bandwidth GB/S")
    return paper.Device(gpu.name, bandwidth * 1e9, math.inf, math.inf)


def compile_kernels(gpu: Gpu, folder: Path) -> ctypes.CDLL:
    """csrc/cuda and gpu_kernels.cu as a library."""
    library = folder / "gpu_kernels.so"
    sources = [
        ROOT / "benchmarks/gpu_kernels.cu",
        ROOT / "csrc/cuda/cuda_device.cu",
        ROOT / "csrc/base/gpu_failure.cpp",
    ]
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    target = f"-gencode=arch=compute_{gpu.capability},code=sm_{gpu.capability}"
    subprocess.run(["nvcc", *options, target, *includes, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def random_embedding(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The released embedding's bytes in Q6_K with random quants: uint8 [vocab, bytes of a row]."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K]
    rows = rng.integers(0, 256, (paper.CONFIG.vocab_size, paper.CONFIG.hidden_size // block, size), np.uint8)
    rows[:, :, -2:] = np.array([0.001], dtype="<f2").view(np.uint8)  # the block's scale: random bytes may be NaN
    return rows.reshape(paper.CONFIG.vocab_size, -1)


def measure_kernels(kernels: ctypes.CDLL, device: paper.Device, repeat: int) -> list[dict[str, Any]]:
    """Time and floor of each kernel in ms. Raises SystemExit when the device's results are not the C++ sampler's."""
    rng = np.random.default_rng(1)
    n, vocab, hidden, t = paper.CANVAS, paper.CONFIG.vocab_size, paper.CONFIG.hidden_size, 0.6
    z = (rng.standard_normal((n, vocab)) * 3).astype(np.float32)
    z[np.arange(n), rng.integers(0, vocab, n)] = 30.0  # rows as they are when a canvas settles
    uniform, renoise = rng.random(n), rng.integers(0, vocab, n).astype(np.int32)
    embedding = random_embedding(rng)
    argmax, ids, counts = (np.empty(n, dtype=np.int32) for _ in range(3))
    entropy, soft, ms = np.empty(n), np.empty((n, hidden), dtype=np.float32), np.empty(4)
    message = ctypes.create_string_buffer(256)

    def at(values: npt.NDArray[Any]) -> ctypes.c_void_p:
        return ctypes.c_void_p(values.ctypes.data)

    number = ctypes.c_double
    sizes = (Q6_K, hidden, CAPACITY, repeat)
    failed = kernels.gpu_step(
        *(at(z), n, vocab, number(t), number(0.1), at(uniform), at(renoise), at(embedding), *sizes),
        *(at(argmax), at(ids), at(entropy), at(counts), at(soft), at(ms), message),
    )
    if failed:
        raise SystemExit(f"gpu_first_hour: {message.value.decode()}")
    options = Sampling(1, 0, 1, t, t, 0.1, 0.005)
    expected = sample(z, options, step=0, uniform=uniform, renoise=renoise)
    for name, ours, theirs in (("argmax", argmax, expected.argmax), ("ids", ids, expected.canvas)):
        if not np.array_equal(ours, theirs):
            raise SystemExit(f"gpu_first_hour: {name} differ from the C++ sampler's on {(ours != theirs).sum()} rows")
    off = np.abs(entropy - expected.entropy) - np.maximum(1e-7, 1e-6 * expected.entropy)
    if off.max() > 0:
        raise SystemExit(f"gpu_first_hour: an entropy is {off.max():.1e} nat beyond its tolerance")
    logits = 4.0 * n * vocab
    gathered = float(np.minimum(counts, CAPACITY)[counts <= CAPACITY].sum()) * embedding.shape[1]
    floors = (2 * logits, logits, 0.0, gathered + 4 * n * hidden)
    names = ("dg_sample_rows, keeping logits", "dg_sample_rows", "dg_finish_canvases", "dg_gather_signal")
    return [
        {"kernel": name, "ms": time, "floor_ms": n_bytes / device.bandwidth * 1e3}
        for name, time, n_bytes in zip(names, ms.tolist(), floors, strict=True)
    ]


def measure_step(path: Path) -> dict[str, Any]:
    """`pydiffgguf bench` with every layer on the GPU, for each sampler, and generations capped at 12, 16 and 24 steps a
    canvas."""
    with DiffusionModel(path, n_gpu_layers=0) as model:
        n_layers = model.config.n_layer
    out: dict[str, Any] = {"step_s": {}}
    for sampler in SAMPLERS:
        with DiffusionModel(path, n_gpu_layers=n_layers, sampler=sampler) as model:
            timed = measure(model, None, prefill=512, repeat=5, options={})
            out["step_s"][sampler] = timed["denoise"]["step_s"]
    with DiffusionModel(path, n_gpu_layers=n_layers) as model:
        for steps in paper.STEPS:
            result = model.generate(PROMPT, seed=0, steps=steps, max_tokens=512)
            out[f"tokens_per_second_{steps}"] = result.stats.tokens_per_second
        return out


def count_candidates(model: DiffusionModel, prompt: str, n_canvases: int) -> list[dict[str, Any]]:
    """For each step of the first canvas of an answer, over `n_canvases` seeds: how many tokens a row's softmax needs to
    be whole but for 2^-24 (csrc/cuda/row.h)."""
    ids = model._engine.prompts.turn(prompt)
    n_vocab, canvas = model.config.n_vocab, model.config.canvas_length
    sampling = model.sampling
    by_step: dict[int, list[npt.NDArray[np.int64]]] = {}
    lowest = -(math.log(n_vocab) + 24 * math.log(2))
    with model.session() as session:
        session.encode(ids)
        for seed in range(n_canvases):
            rows = functions.noise_canvas(seed, 0, canvas, n_vocab)
            signal: Floats | None = None
            last: npt.NDArray[np.int32] | None = None
            for step in range(sampling.steps):
                z = session.denoise(rows, signal)
                t = sampling.t_min + (sampling.t_max - sampling.t_min) * (sampling.steps - step) / sampling.steps
                signal = z / np.float32(t)
                counts = (signal - signal.max(axis=1, keepdims=True) > lowest).sum(axis=1)
                by_step.setdefault(step, []).append(counts)
                uniform = functions.noise_uniform(seed, 0, step, canvas)
                renoise = functions.noise_renoise(seed, 0, step, canvas, n_vocab)
                out = sample(z, sampling, step=step, uniform=uniform, renoise=renoise)
                rows = out.canvas
                settled = out.entropy.mean() < sampling.confidence_threshold
                if settled and last is not None and np.array_equal(last, out.argmax):
                    break
                last = out.argmax
    table = []
    for step, found in by_step.items():
        counts = np.concatenate(found)
        table.append(
            {
                "step": step,
                "rows": len(counts),
                "median": float(np.median(counts)),
                "p90": float(np.quantile(counts, 0.9)),
                "most": int(counts.max()),
                "share_beyond_capacity": float((counts > CAPACITY).mean()),
            }
        )
    return table


def show(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [f"{result['gpu']}, {result['bandwidth_gb_s']:.0f} GB/s", ""]
    rows = [
        [
            k["kernel"],
            f"{k['ms']:.3f}",
            f"{k['floor_ms']:.3f}",
            f"{k['ms'] / k['floor_ms']:.2f}" if k["floor_ms"] else "",
        ]
        for k in result["kernels"]
    ]
    lines += [paper.markdown_table(["kernel", "ms", "floor, ms", "times the floor"], rows), ""]
    step = result["step"]
    if "reason" in step:
        lines.append(f"A step was not measured: {step['reason']}")
    else:
        times = ", ".join(f"{time * 1e3:.2f} ms with {sampler}" for sampler, time in step["step_s"].items())
        lines.append(f"A step: {times}; floors at the released shape: {result['floors']}")
        lines += [f"{n} steps a canvas: {step[f'tokens_per_second_{n}']:.0f} tokens/s" for n in paper.STEPS]
    lines += ["", show_candidates(result["candidates"])]
    return "\n".join(lines)


def show_candidates(candidates: list[dict[str, Any]]) -> str:
    """The counts as Markdown."""
    rows = [
        [str(c["step"]), str(c["rows"]), f"{c['median']:.0f}", f"{c['p90']:.0f}", str(c["most"]), percent(c)]
        for c in candidates
    ]
    columns = ["step", "rows", "candidates, median", "90 %", "most", f"rows beyond {CAPACITY}"]
    return paper.markdown_table(columns, rows)


def percent(counted: dict[str, Any]) -> str:
    return f"{100 * counted['share_beyond_capacity']:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The first three measurements on an NVIDIA GPU.")
    parser.add_argument("model", metavar="MODEL", type=Path, help="a GGUF file, of the released model at best")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of a card that performance_model.py lacks")
    parser.add_argument("--repeat", type=int, default=50, metavar="N", help="a kernel's time is a median of N (50)")
    parser.add_argument("--canvases", type=int, default=4, metavar="N", help="canvases to count candidates over (4)")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="what the canvases answer")
    parser.add_argument("--candidates-only", action="store_true", help="count candidates, which needs no GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there too")
    args = parser.parse_args(argv)
    for name in ("repeat", "canvases"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)}, expected at least 1")
    if args.candidates_only:
        with DiffusionModel(args.model) as model:
            print(show_candidates(count_candidates(model, args.prompt, args.canvases)))
        return 0
    gpu = find_gpu()
    device = find_device(gpu, args.bandwidth)
    with tempfile.TemporaryDirectory() as folder:
        kernels = measure_kernels(compile_kernels(gpu, Path(folder)), device, args.repeat)
    try:
        step = measure_step(args.model)
    except (UnsupportedError, MemoryError) as error:
        step = {"reason": str(error)}
    try:
        with DiffusionModel(args.model) as model:
            candidates = count_candidates(model, args.prompt, args.canvases)
    except DiffGGUFError as error:
        raise SystemExit(f"gpu_first_hour: {error}") from None
    floors = {kind: f"{paper.floors(kind, device, 512).step * 1e3:.2f} ms" for kind in ("q4_k_m", "q8_0")}
    result = {"gpu": gpu.name, "bandwidth_gb_s": device.bandwidth / 1e9, "kernels": kernels, "step": step}
    result |= {"floors": floors, "candidates": candidates}
    print(show(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
