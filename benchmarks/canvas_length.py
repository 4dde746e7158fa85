"""What a shorter canvas costs and saves: the demo model's tasks, and a step of a larger net.

    python benchmarks/canvas_length.py                     # tasks of the demo model: score, steps, rows x steps
    python benchmarks/canvas_length.py --model MODEL.gguf  # a step's time at each length, in turns

Canvases below the file's length are outside of how the model was trained: it has learned that an answer of a few tokens
is followed by an end token and padding to the canvas's end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pydiffgguf import DenoiseStep, DiffusionModel, demo_model_path

TASKS = Path(__file__).resolve().parent.parent / "tests" / "data" / "demo_tasks.jsonl"
KINDS = ("sudoku_chat", "question")


def tasks_of(kind: str) -> list[dict[str, str]]:
    """The demo model's held-out tasks of a kind, those with a prompt and an answer."""
    lines = TASKS.read_text(encoding="utf-8").splitlines()
    return [task for task in map(json.loads, lines) if task["kind"] == kind and "prompt" in task]


def score(model: DiffusionModel, kind: str, n_rows: int, count: int, narrow: bool = False) -> dict[str, float]:
    """Right answers, and means over the answers: steps, rows x steps, canvases."""
    right, steps, rows, canvases = 0, [], [], []
    tasks = tasks_of(kind)[:count]
    for i, task in enumerate(tasks):
        stream = model.stream(task["prompt"], seed=i, canvas_length=n_rows, max_tokens=64, narrow=narrow)
        rows.append(sum(len(event.tokens) for event in stream if isinstance(event, DenoiseStep)))
        result = stream.result
        assert result is not None
        right += result.text.strip() == task["answer"].strip()
        steps.append(sum(result.stats.steps))
        canvases.append(len(result.stats.steps))
    return {
        "right": right,
        "of": len(tasks),
        "steps": statistics.mean(steps),
        "row_steps": statistics.mean(rows),
        "canvases": statistics.mean(canvases),
    }


def step_times(path: Path, lengths: Sequence[int], repeat: int) -> dict[int, float]:
    """Median seconds of a denoise step with self-conditioning, each length in turns with the others."""
    times: dict[int, list[float]] = {n: [] for n in lengths}
    with DiffusionModel(path) as model, model.session() as session:
        rng = np.random.default_rng(0)
        n_vocab = model.config.n_vocab
        session.encode(rng.integers(0, n_vocab, 256))
        signal = {n: session.denoise(rng.integers(0, n_vocab, n), n_rows=n) for n in lengths}
        for _ in range(repeat):
            for n in lengths:
                canvas = rng.integers(0, n_vocab, n)
                session.denoise(canvas, signal[n], n_rows=n)
                began = time.perf_counter()
                session.denoise(canvas, signal[n], n_rows=n)
                times[n].append(time.perf_counter() - began)
    return {n: statistics.median(seconds) for n, seconds in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Shorter canvases: scores of the demo model, times of any.")
    parser.add_argument("--model", type=Path, metavar="FILE", help="time a step of this file instead")
    parser.add_argument("--count", type=int, default=60, metavar="N", help="tasks of each kind (60)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="a time is the median of N (5)")
    parser.add_argument("--lengths", metavar="N,N", help="canvas lengths (the file's, and fractions of it)")
    args = parser.parse_args(argv)
    path = args.model or demo_model_path()
    with DiffusionModel(path) as model:
        full = model.config.canvas_length
        lengths = (
            [int(n) for n in args.lengths.split(",")] if args.lengths else [full, full // 2, full * 3 // 8, full // 4]
        )
        if args.model is None:
            print(
                "| task | rows | right | steps | rows x steps | canvases |\n| --- | ---: | ---: | ---: | ---: | ---: |"
            )
            for kind in KINDS:
                for n, narrow in [(full, True), *((n, False) for n in lengths)]:
                    s = score(model, kind, n, args.count, narrow)
                    rows = f"{n}, narrow" if narrow else f"{n}"
                    print(
                        f"| {kind} | {rows} | {s['right']} of {s['of']} | {s['steps']:.1f} | {s['row_steps']:.0f} | "
                        f"{s['canvases']:.2f} |",
                        flush=True,
                    )
            return 0
    times = step_times(path, lengths, args.repeat)
    print("| rows | s a step | of the file's canvas |\n| ---: | ---: | ---: |")
    for n in lengths:
        print(f"| {n} | {times[n]:.3f} | {times[n] / times[lengths[0]]:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
