"""The demo model's own held-out tasks: it solves them, and transformers with the same draws gives the same answers.

Chat tasks run to their first canvas, which holds the whole answer; grids run with their givens pinned, gaps with the
suffix pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from demo_tasks import Demo, tasks
from nets import Report
from reference import Ids, ReferencePrefix, attention, pinned_loop

pytestmark = pytest.mark.parity


def reference_canvas(demo: Demo, prompt: list[int], pinned: Ids | None, seed: int, attn: str) -> Ids:
    with attention(demo.reference, attn):
        prefix = ReferencePrefix(demo.reference)
        prefix.encode(prompt)
        return pinned_loop(prefix, demo.noise(seed), pinned, demo.sampling).tokens


def solve_all(
    demo: Demo, kind: str, setting: Callable[[dict[str, Any]], tuple[list[int], Ids | None]], report: Report
) -> dict[int, Ids]:
    """Finished canvas of every task of a kind, by its id; each is checked against transformers on the same draws.

    A canvas may differ only where transformers' own eager and sdpa runs do; at most one task in a hundred.
    """
    canvases, undecided = {}, 0
    with demo.opened.session() as session:
        for task in tasks(kind):
            prompt, pinned = setting(task)
            seed = task["id"]
            session.reset()
            session.encode(prompt)
            canvases[seed] = session.run_canvas(noise=demo.noise(seed), pinned=pinned).tokens
            expected = reference_canvas(demo, prompt, pinned, seed, "sdpa")
            if not np.array_equal(canvases[seed], expected):
                eager = reference_canvas(demo, prompt, pinned, seed, "eager")
                assert not np.array_equal(eager, expected), f"{kind} {seed}: another canvas than transformers gives"
                undecided += 1
    report(f"{kind}: {len(canvases) - undecided} of {len(canvases)} canvases equal to transformers', same draws")
    assert undecided <= len(canvases) // 100
    return canvases


@pytest.mark.parametrize("kind", ["sudoku_chat", "question"])
def test_chat_tasks_are_solved_as_transformers_solves_them(demo: Demo, kind: str, report: Report) -> None:
    """At least 95 of 100 answers are exactly right; the prompt is one user turn."""
    canvases = solve_all(demo, kind, lambda task: (demo.chat_prompt(task["prompt"]), None), report)
    right = sum(demo.answer(canvases[task["id"]]) == task["answer"] for task in tasks(kind))
    report(f"{kind}: {right} of {len(canvases)} right")
    assert right >= 0.95 * len(canvases)


def test_pinned_sudokus_are_solved_as_transformers_solves_them(demo: Demo, report: Report) -> None:
    """At least 95 of 100 grids are exactly right, the givens pinned on the canvas."""

    def setting(task: dict[str, Any]) -> tuple[list[int], Ids]:
        prompt = [demo.opened.tokenizer.bos_id, *demo.opened.tokenize(task["prefix"])]
        return prompt, demo.pinned_grid(task["grid"], task["answer"])[0]

    canvases = solve_all(demo, "sudoku_pinned", setting, report)
    right = sum(
        np.array_equal(canvases[task["id"]], demo.pinned_grid(task["grid"], task["answer"])[1])
        for task in tasks("sudoku_pinned")
    )
    report(f"sudoku_pinned: {right} of {len(canvases)} right")
    assert right >= 0.95 * len(canvases)


def test_gaps_are_filled_as_transformers_fills_them(demo: Demo, report: Report) -> None:
    """At least 95 of 100 gaps of known length are filled exactly, prefix encoded, suffix pinned behind the gap."""
    canvases = solve_all(demo, "infill", lambda task: demo.gap(task)[:2], report)
    right = sum(np.array_equal(canvases[task["id"]], demo.gap(task)[2]) for task in tasks("infill"))
    report(f"infill: {right} of {len(canvases)} right")
    assert right >= 0.95 * len(canvases)
