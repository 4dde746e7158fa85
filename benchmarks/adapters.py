"""What adapters cost: a denoise step with and without them in turns, loading, switching, memory.

    python benchmarks/shapes.py 724m -o 724m.gguf --type q4_k_m
    python benchmarks/adapters.py 724m.gguf [--ranks 16,64] [--repeat 7] [--threads 2] [--cpu-time]

Random adapters on attention and dense FFN, a set for each mode. A step is a pass over one canvas behind a prompt of 256
tokens; times are medians, ratios those of the medians, everything in turns in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from pydiffgguf import DiffusionModel
from pydiffgguf.convert.adapter.gguf_adapter import to_gguf, write
from pydiffgguf.convert.adapter.pairs import Adapter, Pair

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
PROMPT = 256
CLOCK = time.perf_counter


def adapter(model: DiffusionModel, rank: int) -> Adapter:
    """Random pairs for every matrix of MATRICES, in both modes, independent."""
    rng = np.random.default_rng(rank)
    shapes = {t.name.removesuffix(".weight"): t.shape for t in model.tensors()}
    pairs = []
    for layer in range(model.config.n_layer):
        for name in MATRICES:
            shape = shapes.get(f"blk.{layer}.{name}")
            for region in ("decoder", "encoder"):
                if shape is not None:  # full layers have no V
                    a = rng.standard_normal((rank, shape[0]), np.float32) / np.float32(np.sqrt(shape[0]))
                    b = rng.standard_normal((shape[1], rank), np.float32) * np.float32(0.02)
                    kind = GGMLQuantizationType.F32
                    pairs.append(Pair(f"blk.{layer}.{name}", region, a, b, 1.0, kind, name))
    return Adapter(f"r{rank}", Path(f"r{rank}"), tuple(pairs))


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed(run: Callable[[], object]) -> float:
    began = CLOCK()
    run()
    return CLOCK() - began


def measure(path: Path, ranks: list[int], repeat: int, threads: int | None) -> dict[str, Any]:
    result: dict[str, Any] = {"model": path.name, "threads": threads, "ranks": {}}
    with TemporaryDirectory() as folder, DiffusionModel(path, n_threads=threads) as model:
        rng = np.random.default_rng(0)
        canvas = rng.integers(model.config.n_vocab, size=model.config.canvas_length, dtype=np.int32)
        prompt = rng.integers(model.config.n_vocab, size=PROMPT, dtype=np.int32)
        session = model.session()
        session.encode(prompt)
        session.denoise(canvas)
        for rank in ranks:
            file = Path(folder) / f"r{rank}.gguf"
            write(to_gguf(adapter(model, rank)), file)
            before = resident()
            load_s = timed(lambda file=file: model.load_lora(file))  # type: ignore[misc]
            found = model.adapters[f"r{rank}"]
            result["ranks"][rank] = {"load_s": load_s, "n_bytes": found.n_bytes, "resident": resident() - before}
        sets: dict[str, dict[str, float]] = {"bare": {}, **{f"r{rank}": {f"r{rank}": 1.0} for rank in ranks}}
        steps: dict[str, list[float]] = {name: [] for name in sets}
        prompts: dict[str, list[float]] = {name: [] for name in sets}
        switches: dict[str, list[float]] = {name: [] for name in sets}
        scales: list[float] = []
        for turn in range(repeat):
            order = list(sets)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                session.reset()
                switches[name].append(timed(lambda name=name: session.set_lora(sets[name])))  # type: ignore[misc]
                prompts[name].append(timed(lambda: session.encode(prompt)))
                session.denoise(canvas)
                steps[name].append(timed(lambda: session.denoise(canvas)))
                if sets[name]:
                    session.reset()
                    half = {key: 0.5 for key in sets[name]}
                    scales.append(timed(lambda half=half: session.set_lora(half)))  # type: ignore[misc]
        result["bare_step_s"], result["bare_prompt_s"] = median(steps["bare"]), median(prompts["bare"])
        result["scale_s"] = median(scales)
        for rank in ranks:
            name = f"r{rank}"
            result["ranks"][rank] |= {
                "step": median(steps[name]) / median(steps["bare"]),
                "prompt": median(prompts[name]) / median(prompts["bare"]),
                "switch_s": median(switches[name]),
            }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=lambda text: [int(word) for word in text.split(",")], default=[16, 64])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds, with --threads 1: for a busy machine"
    )
    args = parser.parse_args()
    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    print(json.dumps(measure(args.model, args.ranks, args.repeat, args.threads), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
