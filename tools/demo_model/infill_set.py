"""Write the held-out infill tasks in the format of HumanEval-Infilling, for benchmarks/infill.py.

    python infill_set.py --tasks ../../tests/data/demo_tasks.jsonl --out ../../benchmarks/data/infill_demo.jsonl

A line has `task_id` (form and id of the task), `language` (`python` or `text`), `prompt`, `suffix`,
`canonical_solution`, and for Python functions `test` and `entry_point`: the document's own `assert` is its test, so
`check` only asks for the function. The tasks are shuffled (seed 4) and dealt out by length and language in turns, so
that a few lines from the file's beginning hold every length.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tasks import PYTHON

PYTHON_FORMS = {template.name for template in PYTHON}
TEST = "def check(candidate):\n    assert callable(candidate)\n"


def convert(task: dict[str, Any]) -> dict[str, Any]:
    """One infill task as a line of the benchmark."""
    is_python = task.get("language", "python" if task["form"] in PYTHON_FORMS else "text") == "python"
    line = {
        "task_id": f"{task['form']}/{task['id']}",
        "language": "python" if is_python else "text",
        "prompt": task["prefix"],
        "suffix": task["suffix"],
        "canonical_solution": task["gap"],
    }
    defined = re.search(r"^def (\w+)\(", task["prefix"] + task["gap"] + task["suffix"], re.MULTILINE)
    if is_python and defined:
        line |= {"test": TEST, "entry_point": defined[1]}
    return line


def spread(tasks: list[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The tasks, shuffled, dealt out in turns of gap length (powers of two) and language."""
    Random(seed).shuffle(tasks)
    piles: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for task in tasks:
        length = max(1, task["gap_tokens"] - 1).bit_length()
        piles.setdefault((length, task["form"] in PYTHON_FORMS), []).append(task)
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
