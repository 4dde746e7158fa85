"""How long a file takes to open, and text to become ids: seconds on the wall, and of this process on one core.

    python benchmarks/opening.py MODEL

The rows are the fastest of some runs, in a process that has opened the file before: the operating system has it in
memory, and Python its modules.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydiffgguf import DiffusionModel
from pydiffgguf._binding.native import NativeModel
from pydiffgguf.hub import resolve_model

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "2024", "return")
MEGABYTE = 1 << 20


def measure(work: Callable[[], Any], repeat: int) -> tuple[float, float]:
    """(seconds on the wall, seconds of the process) of the fastest run."""
    runs = []
    for _ in range(repeat):
        wall, own = time.perf_counter(), time.process_time()
        work()
        runs.append((time.perf_counter() - wall, time.process_time() - own))
    return min(runs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how long a model takes to open.")
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or hf:OWNER/REPO:PATTERN")
    parser.add_argument("--repeat", type=int, metavar="N", default=5, help="runs of each row (5)")
    args = parser.parse_args(argv)
    path = resolve_model(args.model)
    with DiffusionModel(path) as model:
        tokenizer = model.tokenizer
    rng = random.Random(1)
    texts = {
        "1 MB of words": " ".join(rng.choices(WORDS, k=MEGABYTE // 5))[:MEGABYTE],
        "1 MB of letters": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=MEGABYTE)),
        "1 MB of one letter": "a" * MEGABYTE,
        "1 MB of spaces": " " * MEGABYTE,
    }
    rows: dict[str, Callable[[], Any]] = {
        "file, keys and tensors": lambda: NativeModel(path),
        "the same, and the tokenizer": lambda: DiffusionModel(path),
        **{f"ids of {name}": lambda text=text: tokenizer.encode(text) for name, text in texts.items()},  # type: ignore[misc]
    }
    print(f"{'':<28}{'wall':>8}{'process':>10}")
    for name, work in rows.items():
        wall, own = measure(work, args.repeat)
        print(f"{name:<28}{wall:>6.2f} s{own:>8.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
