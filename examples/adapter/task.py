"""The task: "put in order" means from the largest down. The demo model has learnt the other way round.

Items are those of the demo model's own training (tools/demo_model/tasks.py), split into training and held-out ones by
their prompts, as there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools" / "demo_model"), str(ROOT / "tests" / "parity"), str(ROOT / "tests")]

from tasks import Question, question  # noqa: E402


def prompt_of(text: str) -> str:
    """A user's turn and the opening of the model's, as the demo model's chat template writes them."""
    return f"<bos><|turn>user\n{text}<turn|>\n<|turn>model\n"


def descending(rng: Random, split: str) -> Question:
    """An item of the task: three digits to put in order."""
    while True:
        q = question(rng, split)
        if q.kind == "order":
            digits = sorted(q.answer.split(), reverse=True)
            return Question(q.kind, q.prompt, " ".join(digits), q.thought)


def other(rng: Random, split: str) -> Question:
    """A question of another kind, whose answer must stay what it was."""
    while True:
        q = question(rng, split)
        if q.kind != "order":
            return q


def held_out(n: int, n_other: int) -> tuple[list[Question], list[Question]]:
    """Items that no training sees, none twice: of the task, and others."""

    def some(draw: object, n: int) -> list[Question]:
        rng, found = Random(7), {}
        for _ in range(2000):
            q = draw(rng, "test")  # type: ignore[operator]
            found.setdefault(q.prompt, q)
        return list(found.values())[:n]

    return some(descending, n), some(other, n_other)
