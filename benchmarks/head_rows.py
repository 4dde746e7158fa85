"""Rows that get logits: how many a call's passes have, and what the others save.

    python benchmarks/head_rows.py                     # infill, fill, choose, edit of the demo model
    python benchmarks/head_rows.py --model MODEL.gguf  # a pass with the logits of some rows, in turns with all

A pinned row's logits are known, so the head leaves it out; `read` and `choose` leave out what they do not look at.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pydiffgguf import DiffusionModel, Session, demo_model_path
from pydiffgguf.session import CanvasBatch

#: Rows get logits in blocks of so many (csrc/pass/pass.cpp).
BLOCK = 16

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


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Adds up rows x passes, and those of them that get logits, of what is called inside."""
    found = {"passes": 0, "rows": 0, "logits": 0}
    step, denoise = CanvasBatch.step, Session.denoise

    def add(rows: int, logits: int) -> None:
        found["passes"] += 1
        found["rows"] += rows
        found["logits"] += min(rows, -(-max(logits, 1) // BLOCK) * BLOCK)

    def counting_step(self: CanvasBatch) -> Any:
        going = [spec for spec, live in zip(self._specs, self._live, strict=True) if live]
        rows = [spec.rows(self._canvas_length) for spec in going]
        pinned = [0 if spec.pinned is None else int((np.asarray(spec.pinned) >= 0).sum()) for spec in going]
        add(sum(rows), sum(rows) - sum(pinned))
        return step(self)

    def counting_denoise(self: Session, canvas: Any, *args: Any, **options: Any) -> Any:
        rows = options.get("rows")
        add(len(canvas), len(canvas) if rows is None else len(rows))
        return denoise(self, canvas, *args, **options)

    CanvasBatch.step, Session.denoise = counting_step, counting_denoise  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CanvasBatch.step, Session.denoise = step, denoise  # type: ignore[method-assign]


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
    parser.add_argument("--count", type=int, default=20, metavar="N", help="texts (20)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="a time is the least of N (5)")
    args = parser.parse_args(argv)
    if args.model:
        print("| rows with logits | a pass, s | its head, s | of all rows' pass |\n| ---: | ---: | ---: | ---: |")
        found = times(args.model, (256, 192, 128, 64, 16), args.repeat)
        for n, whole, head in found:
            print(f"| {n} | {whole:.3f} | {head:.3f} | {whole / found[0][1]:.2f} |")
        return 0
    print("| call | passes | rows x passes | with logits | share |\n| --- | ---: | ---: | ---: | ---: |")
    items = [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]
    items = [item for item in items if item["language"] == "python" and "\n\n\n" in item["suffix"]][: args.count]
    with DiffusionModel(demo_model_path()) as model:
        for name, call in calls().items():
            with counted() as found:
                for item in items:
                    call(model, item)
            share = found["logits"] / found["rows"]
            print(f"| {name} | {found['passes']} | {found['rows']} | {found['logits']} | {share:.0%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
