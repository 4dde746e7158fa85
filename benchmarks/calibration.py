"""How often a probability that was read is right: reliability and expected calibration error.

    python benchmarks/calibration.py pydiffgguf/data/demo.gguf --svg benchmarks/results/calibration.svg

The demo model's Sudokus of tests/data/demo_tasks.jsonl: the givens are pinned, and the probabilities of 1 to 4 in each
free cell are read in one pass, averaged over `--draws` draws of noise. Each cell counts once, with the probability of
its most probable digit; each grid has one solution. Ten bins of equal width; the expected calibration error (ECE) is
the mean distance of probability and share of right cells, weighted by cells.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pydiffgguf import DiffusionModel, Stats
from pydiffgguf.read import log_probabilities

ROOT = Path(__file__).parents[1]
BINS = 10


def cells(
    model: DiffusionModel, draws: int, sequential: bool = False
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Of each free cell the probability of its most probable digit, and whether that is right.

    Args:
        sequential: one cell after the other, the answers before it pinned, instead of all at once.
    """
    rows = [json.loads(line) for line in (ROOT / "tests/data/demo_tasks.jsonl").read_text("utf-8").splitlines()]
    digits = [model.tokenize(digit, special=False)[0] for digit in "1234"]
    stats = Stats(seed=0, prompt_tokens=0)
    probability, right = [], []
    with model.session() as session:
        for row in rows:
            if row["kind"] != "sudoku_pinned":
                continue
            session.reset()
            session.encode(model.tokenize(row["prefix"], add_bos=True))
            grid = model.tokenize(row["grid"])
            pinned = [-1 if cell == "." else id_ for cell, id_ in zip(row["grid"], grid, strict=True)]
            pinned.append(model.tokenizer.eos_id or 0)
            free = [i for i, id_ in enumerate(pinned) if id_ < 0]
            for asked in [[cell] for cell in free] if sequential else [free]:
                tables = []
                for draw in range(draws):
                    logs = log_probabilities(session, pinned, asked, row["id"], draw, stats)[:, digits]
                    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
                    tables.append(weights / weights.sum(axis=1, keepdims=True))
                for cell, table in zip(asked, np.mean(tables, axis=0), strict=True):
                    probability.append(float(table.max()))
                    right.append("1234"[int(table.argmax())] == row["answer"][cell])
                    if sequential:
                        pinned[cell] = digits[int(table.argmax())]
    return np.array(probability), np.array(right)


def reliability(p: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> list[tuple[float, float, int]]:
    """(mean probability, share of right ones, how many) of each bin that holds any."""
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    return [
        (float(p[place == i].mean()), float(right[place == i].mean()), int((place == i).sum()))
        for i in range(BINS)
        if (place == i).any()
    ]


def svg(bins: list[tuple[float, float, int]], ece: float) -> str:
    """A reliability diagram."""
    size, edge = 320, 44
    total = sum(n for _, _, n in bins)

    def x(value: float) -> float:
        return edge + value * size

    def y(value: float) -> float:
        return 12 + (1 - value) * size

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size + edge + 16}" height="{size + edge + 16}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<rect x="{edge}" y="12" width="{size}" height="{size}" fill="none" stroke="#888"/>',
        f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" stroke="#aaa" stroke-dasharray="4"/>',
    ]
    for p, share, n in bins:
        radius = 3 + 9 * (n / total) ** 0.5
        parts.append(f'<line x1="{x(p):.1f}" y1="{y(p):.1f}" x2="{x(p):.1f}" y2="{y(share):.1f}" stroke="#c33"/>')
        parts.append(f'<circle cx="{x(p):.1f}" cy="{y(share):.1f}" r="{radius:.1f}" fill="#36c" fill-opacity="0.8"/>')
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<text x="{x(tick)}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{edge - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{x(0.5)}" y="{y(0) + 34}" text-anchor="middle">probability of the best label</text>')
    parts.append(f'<text x="14" y="{y(0.5)}" transform="rotate(-90 14 {y(0.5)})" text-anchor="middle">right</text>')
    parts.append(f'<text x="{x(0.04)}" y="{y(0.94)}">{total} cells, ECE {ece:.3f}</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--sequential", action="store_true", help="one cell after the other")
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    with DiffusionModel(args.model) as model:
        began = time.perf_counter()
        p, right = cells(model, args.draws, args.sequential)
        spent = time.perf_counter() - began
    bins = reliability(p, right)
    ece = sum(n * abs(mean - share) for mean, share, n in bins) / len(p)
    for mean, share, n in bins:
        print(f"{mean:.3f} {share:.3f} {n}")
    print(f"cells {len(p)}, right {right.mean():.3f}, mean probability {p.mean():.3f}, ECE {ece:.4f}, {spent:.1f} s")
    if args.svg:
        args.svg.write_text(svg(bins, ece), encoding="utf-8")


if __name__ == "__main__":
    main()
