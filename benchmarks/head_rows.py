"""Rows that get logits: how many a call's passes have, and what the others save.

    python benchmarks/head_rows.py                      # infill, fill, choose, edit of the demo model
    python benchmarks/head_rows.py --rpc 127.0.0.1:50052 # the same on an RPC server, with the operators' sampler
    python benchmarks/head_rows.py --model MODEL.gguf   # a pass with the logits of some rows, in turns with all

A pinned row's logits are known, so the head leaves it out; `read` and `choose` leave out what they do not look at.
`graphs` are those that ggml's scheduler was given: what a GPU captures, and what a server is sent.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf import DiffusionModel, Session, demo_model_path
from pydiffgguf.session import CanvasBatch

#: Rows get logits in blocks of 16 (csrc/pass/pass.h), on devices of a quarter of the pass at least.
BLOCK = 16
#: Rows of a pass, at most, and canvases (csrc/model/figures.cpp, csrc/session/session.h).
PASS_ROWS, SEGMENTS = 256, 16

ITEMS = Path(__file__).resolve().parent / "data" / "infill_demo.jsonl"


def calls() -> dict[str, Callable[[DiffusionModel, dict[str, str]], object]]:
    """What is made of a held-out gap of the demo model, by name."""

    def fill(model: DiffusionModel, item: dict[str, str]) -> object:
        head, _, tail = item["suffix"].rpartition("\n\n\n")
        return model.fill(f"{item['prompt']}<gap len=3/>{head}\n\n\n<gap len=3/>{tail[12:]}", seed=1)

    def edit(model: DiffusionModel, item: dict[str, str]) -> object:
        before = len(item["prompt"])
        whole = item["prompt"] + item["canonical_solution"] + item["suffix"]
        return model.edit(whole, [(before, before + len(item["canonical_solution"]))], seed=1)

    def choose(model: DiffusionModel, item: dict[str, str]) -> object:
        options = [item["canonical_solution"], " nothing"]
        return model.choose(f"{item['prompt']}<it/>{item['suffix']}", {"it": options}, seed=1)

    return {
        "infill, length unknown": lambda m, t: m.infill(t["prompt"], t["suffix"], max_gap=32, seed=1),
        "infill, length known": lambda m, t: m.infill(t["prompt"], t["suffix"], gap=4, seed=1),
        "fill, two gaps": fill,
        "edit, one span": edit,
        "choose, two options": choose,
    }


def passes(canvases: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Canvases of (rows, rows that are wanted) as the passes of a step: the same of each pass."""
    rows = wanted = n = 0
    for size, free in canvases:
        if n == SEGMENTS or (n > 0 and rows + size > PASS_ROWS):
            yield rows, wanted
            rows = wanted = n = 0
        rows, wanted, n = rows + size, wanted + free, n + 1
    yield rows, wanted


class Graphs(logging.Handler):
    """How many graphs ggml's scheduler was given, by its own log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.n = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.n += "SPLIT #0" in record.getMessage()


@contextmanager
def counted(on_device: bool = False) -> Iterator[dict[str, int]]:
    """Adds up steps, rows x passes, those of them that get logits, and graphs, of what is called inside."""
    found = {"steps": 0, "rows": 0, "logits": 0, "graphs": 0}
    step, denoise = CanvasBatch.step, Session.denoise

    def add(canvases: Sequence[tuple[int, int]]) -> None:
        found["steps"] += 1
        for rows, wanted in passes(canvases):
            block = -(-rows // 4 // BLOCK) * BLOCK if on_device else BLOCK
            found["rows"] += rows
            found["logits"] += min(rows, -(-max(wanted, 1) // block) * block)

    def counting_step(self: CanvasBatch) -> Any:
        going = [spec for spec, live in zip(self._specs, self._live, strict=True) if live]
        rows = [spec.rows(self._canvas_length) for spec in going]
        pinned = [0 if spec.pinned is None else int((np.asarray(spec.pinned) >= 0).sum()) for spec in going]
        add([(n, n - fixed) for n, fixed in zip(rows, pinned, strict=True)])
        return step(self)

    def counting_denoise(self: Session, canvas: Any, *args: Any, **options: Any) -> Any:
        rows = options.get("rows")
        add([(len(canvas), len(canvas) if rows is None else len(rows))])
        return denoise(self, canvas, *args, **options)

    logger, graphs = logging.getLogger("pydiffgguf.ggml"), Graphs()
    level = logger.level
    logger.addHandler(graphs)
    logger.setLevel(logging.DEBUG)
    CanvasBatch.step, Session.denoise = counting_step, counting_denoise  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CanvasBatch.step, Session.denoise = step, denoise  # type: ignore[method-assign]
        logger.removeHandler(graphs)
        logger.setLevel(level)
        found["graphs"] = graphs.n


def times(path: Path, lengths: Sequence[int], repeat: int) -> list[tuple[int, float, float]]:
    """(rows with logits, seconds of a pass, of its head): one thread's processor time, the least of `repeat`."""
    best = {n: (float("inf"), float("inf")) for n in lengths}
    with DiffusionModel(path, n_threads=1) as model, model.session() as session:
        c = model.config
        rng = np.random.default_rng(0)
        session.encode(rng.integers(0, c.n_vocab, 256))
        canvas = rng.integers(0, c.n_vocab, c.canvas_length)
        for _ in range(repeat):
            for n in lengths:
                rows = np.sort(rng.permutation(c.canvas_length)[:n])
                session.profile()
                began = time.process_time()
                session.denoise(canvas, rows=rows)
                seconds = time.process_time() - began
                best[n] = min(best[n][0], seconds), min(best[n][1], session.timings.head)
    return [(n, *best[n]) for n in lengths]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rows that get logits, and what the others save.")
    parser.add_argument("--model", type=Path, metavar="FILE", help="time passes of this file instead")
    parser.add_argument("--rpc", action="append", metavar="HOST:PORT", help="count on this server instead of the CPU")
    parser.add_argument("--sampler", metavar="NAME", help="count with this sampler: host, operators or kernels")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="texts (20)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="a time is the least of N (5)")
    args = parser.parse_args(argv)
    if args.model:
        print("| rows with logits | a pass, s | its head, s | of all rows' pass |\n| ---: | ---: | ---: | ---: |")
        found = times(args.model, (256, 192, 128, 64, 16), args.repeat)
        for n, whole, head in found:
            print(f"| {n} | {whole:.3f} | {head:.3f} | {whole / found[0][1]:.2f} |")
        return 0
    os.environ["GGML_SCHED_DEBUG"] = "1"
    logging.getLogger("pydiffgguf").addHandler(logging.NullHandler())
    print("| call | steps | rows x passes | with logits | share | graphs |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    items = [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]
    items = [item for item in items if item["language"] == "python" and "\n\n\n" in item["suffix"]][: args.count]
    place: dict[str, Any] = {"rpc": args.rpc} if args.rpc else {"n_gpu_layers": 0}
    with DiffusionModel(demo_model_path(), sampler=args.sampler or "auto", **place) as model:
        for name, call in calls().items():
            with counted(on_device=bool(args.rpc)) as found:
                for item in items:
                    call(model, item)
            share = found["logits"] / found["rows"]
            numbers = f"{found['steps']} | {found['rows']} | {found['logits']} | {share:.0%} | {found['graphs']}"
            print(f"| {name} | {numbers} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
