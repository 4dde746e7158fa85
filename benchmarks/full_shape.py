"""The released model's exact shape on this machine: memory as predicted and as measured, prefill, and denoise steps.

    python benchmarks/full_shape.py full.gguf                     # writes the file first if it is not there: 16.8 GB
    python benchmarks/full_shape.py other.gguf --type q8_0 --ctx 8192

The weights are random blocks with sane scales (benchmarks/shapes.py): nothing about time or memory depends on what they
say. The file is mapped; 512 tokens are encoded, and one canvas is denoised for two steps, the second of which has a
self-conditioning signal. Anonymous memory (RssAnon: cache, buffers, copies of weights) is what the process needs;
file-backed pages (RssFile) are the mapped weights, which the system may take back. The floor is the arithmetic of the
matrix products alone at the rate of numpy's float32 product, both as `pydiffgguf bench` has them. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import shapes
from rich.console import Console
from rich.progress import Progress

SHAPE = "26b-a4b"
PROMPT = 512
CONTEXTS = (8_192, 32_768)


def resident() -> dict[str, int]:
    """RssAnon and RssFile of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status, re.MULTILINE)}


class Peak(threading.Thread):
    """Watches the memory of this process until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.values: dict[str, int] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            for name, value in resident().items():
                self.values[name] = max(self.values.get(name, 0), value)

    def stop(self) -> dict[str, int]:
        self.ended.set()
        self.join()
        return self.values


def measure(path: Path, n_ctx: int, threads: int | None) -> dict[str, Any]:
    """Everything about one context size; in a process of its own, so that peaks are its own."""
    from pydiffgguf import DiffusionModel
    from pydiffgguf.cli.bench import ceiling, product_flop

    rate = ceiling()
    before = resident()
    peak = Peak()
    peak.start()
    began = time.perf_counter()
    model = DiffusionModel(path, n_ctx=n_ctx, n_threads=threads)
    opened = time.perf_counter() - began
    predicted = model.memory(n_ctx=n_ctx)
    prompt = np.random.default_rng(1).integers(0, model.config.n_vocab, PROMPT)
    with model.session() as session:
        began = time.perf_counter()
        session.encode(prompt)
        prefill = time.perf_counter() - began
        ends: list[float] = []
        began = time.perf_counter()
        session.run_canvas(seed=1, max_steps=2, on_step=lambda _: ends.append(time.perf_counter()))
        n_threads = session.n_threads
    values = peak.stop()
    own = sum(dataclasses.astuple(predicted)) - 2 * predicted.weights_mapped
    return {
        "n_ctx": n_ctx,
        "threads": n_threads,
        "open_s": opened,
        "prefill_s": prefill,
        "first_step_s": ends[0] - began,
        "second_step_s": ends[1] - ends[0],
        "floor_s": product_flop(model) / rate,
        "predicted": dataclasses.asdict(predicted),
        "predicted_anonymous": own,
        "peak_anonymous": values["RssAnon"] - before["RssAnon"],
        "peak_mapped": values["RssFile"] - before["RssFile"],
        "file": path.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the released model's shape with random weights.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", default=SHAPE, choices=shapes.SHAPES)
    parser.add_argument("--type", default="q4_k_m", help="of the file, where it is written (q4_k_m)")
    parser.add_argument("--threads", type=int, help="all if not given")
    parser.add_argument("--ctx", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.path, args.child, args.threads)))
        return
    if not args.path.exists():
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(args.path.name, total=None)
            shapes.write(
                args.path,
                args.shape,
                type=args.type,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    for n_ctx in args.ctx:
        command = [sys.executable, __file__, str(args.path), "--shape", args.shape, "--child", str(n_ctx)]
        command += ["--threads", str(args.threads)] if args.threads else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        if done.returncode:
            raise SystemExit(done.stderr)
        print(json.dumps(json.loads(done.stdout), indent=1))


if __name__ == "__main__":
    main()
