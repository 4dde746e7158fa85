"""Write the held-out infill tasks in the format of HumanEval-Infilling, for benchmarks/infill.py.

    python infill_set.py --tasks ../../tests/data/demo_tasks.jsonl --out ../../benchmarks/data/infill_demo.jsonl

A line has `task_id` (form and id of the task), `language` (`python` or `english`), `prompt`, `suffix`,
`canonical_solution`, and for Python that runs `test` and `entry_point`: the document's own `assert` is its test, so
`check` only asks for the function. The tasks are shuffled (seed 4) and dealt out by length and language in turns, so
that a few lines from the file's beginning hold every length.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

TEST = "def check(candidate):\n    assert callable(candidate)\n"


def runs(text: str) -> bool:
    """Whether a document, which is one of our own, runs: some templates call a function with names that nothing
    defines."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(text, {})
    except NameError:
        return False
    return True


def convert(task: dict[str, Any]) -> dict[str, Any]:
    """One infill task as a line of the benchmark."""
    line = {
        "task_id": f"{task['form']}/{task['id']}",
        "language": task["language"],
        "prompt": task["prefix"],
        "suffix": task["suffix"],
        "canonical_solution": task["gap"],
    }
    text = task["prefix"] + task["gap"] + task["suffix"]
    defined = re.search(r"^def (\w+)\(", text, re.MULTILINE)
    if task["language"] == "python" and defined and runs(text):
        line |= {"test": TEST, "entry_point": defined[1]}
    return line


def spread(tasks: list[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The tasks, shuffled, dealt out in turns of gap length (powers of two) and language."""
    Random(seed).shuffle(tasks)
    piles: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for task in tasks:
        length = max(1, task["gap_tokens"] - 1).bit_length()
        piles.setdefault((length, task["language"]), []).append(task)
    order = sorted(piles)
    while any(piles.values()):
        for key in order:
            if piles[key]:
                yield piles[key].pop(0)


def main() -> None:
    """Write the file."""
    ap = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ap.add_argument("--tasks", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seed", type=int, default=4)
    args = ap.parse_args()
    lines = [json.loads(line) for line in args.tasks.read_text(encoding="utf-8").splitlines()]
    rows = [convert(task) for task in spread([t for t in lines if t["kind"] == "infill"], args.seed)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
