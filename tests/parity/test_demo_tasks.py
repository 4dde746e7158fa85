"""The demo model's own held-out tasks: it solves them, and transformers with the same draws gives the same answers.

Chat tasks run to their first canvas, which holds the whole answer; grids run with their givens pinned, gaps with the
suffix pinned. The CPU takes all tasks, every other place ten of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from demo_tasks import Demo, tasks
from nets import Report
from once import once
from places import Place
from reference import HandedNoise, Ids, Model, ReferencePrefix, Sampling, attention, pinned_loop

pytestmark = pytest.mark.parity

ELSEWHERE = 10

Setting = Callable[[dict[str, Any]], tuple[list[int], Ids | None]]
"""The prompt and the pinned rows of a task."""


@once
def _reference(
    model: Model, prompt: tuple[int, ...], pinned: tuple[int, ...] | None, seed: int, sampling: Sampling, attn: str
) -> Ids:
    noise = HandedNoise(seed, model.config.canvas_length, model.config.text_config.vocab_size)
    with attention(model, attn):
        prefix = ReferencePrefix(model)
        prefix.encode(prompt)
        return pinned_loop(prefix, noise, None if pinned is None else np.array(pinned, np.int32), sampling).tokens


def reference_canvas(demo: Demo, prompt: list[int], pinned: Ids | None, seed: int, attn: str) -> Ids:
    """What transformers makes of a task, once for all places."""
    pins = None if pinned is None else tuple(pinned.tolist())
    return _reference(demo.reference, tuple(prompt), pins, seed, demo.sampling, attn)


def solve_all(
    demo: Demo, place: Place, kind: str, setting: Setting, report: Report
) -> list[tuple[dict[str, Any], Ids]]:
    """The tasks of a kind, each with its finished canvas, which is checked against transformers on the same draws.

    A canvas may differ only where transformers' own eager and sdpa runs do; at most one task in a hundred.
    """
    canvases, undecided = [], 0
    with demo.opened.session() as session:
        for task in place.some(tasks(kind), ELSEWHERE):
            prompt, pinned = setting(task)
            seed = task["id"]
            session.reset()
            session.encode(prompt)
            canvas = session.run_canvas(noise=demo.noise(seed), pinned=pinned).tokens
            canvases.append((task, canvas))
            expected = reference_canvas(demo, prompt, pinned, seed, "sdpa")
            if not np.array_equal(canvas, expected):
                eager = reference_canvas(demo, prompt, pinned, seed, "eager")
                assert not np.array_equal(eager, expected), f"{kind} {seed}: another canvas than transformers gives"
                undecided += 1
    report(f"{kind}: {len(canvases) - undecided} of {len(canvases)} canvases equal to transformers', same draws")
    assert undecided <= len(canvases) // 100
    return canvases


@pytest.mark.parametrize("kind", ["sudoku_chat", "question"])
def test_chat_tasks_are_solved_as_transformers_solves_them(demo: Demo, place: Place, kind: str, report: Report) -> None:
    """At least 95 of 100 answers are exactly right; the prompt is one user turn."""
    canvases = solve_all(demo, place, kind, lambda task: (demo.chat_prompt(task["prompt"]), None), report)
    right = sum(demo.answer(canvas) == task["answer"] for task, canvas in canvases)
    report(f"{kind}: {right} of {len(canvases)} right")
    assert right >= 0.95 * len(canvases)


def test_pinned_sudokus_are_solved_as_transformers_solves_them(demo: Demo, place: Place, report: Report) -> None:
    """At least 97 of 100 grids are exactly right, the givens pinned on the canvas."""

    def setting(task: dict[str, Any]) -> tuple[list[int], Ids]:
        prompt = [demo.opened.tokenizer.bos_id, *demo.opened.tokenize(task["prefix"])]
        return prompt, demo.pinned_grid(task["grid"], task["answer"])[0]

    canvases = solve_all(demo, place, "sudoku_pinned", setting, report)
    right = sum(np.array_equal(canvas, demo.pinned_grid(task["grid"], task["answer"])[1]) for task, canvas in canvases)
    report(f"sudoku_pinned: {right} of {len(canvases)} right")
    assert right >= 0.97 * len(canvases)


def test_gaps_are_filled_as_transformers_fills_them(demo: Demo, place: Place, report: Report) -> None:
    """At least 95 of 100 gaps of known length are filled exactly, prefix encoded, suffix pinned behind the gap."""
    canvases = solve_all(demo, place, "infill", lambda task: demo.gap(task)[:2], report)
    right = sum(np.array_equal(canvas, demo.gap(task)[2]) for task, canvas in canvases)
    report(f"infill: {right} of {len(canvases)} right")
    assert right >= 0.95 * len(canvases)
