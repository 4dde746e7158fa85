"""Runs canvases side by side to their ends, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from pydiffgguf._binding.records import RawStep, Sampling
from pydiffgguf.session import CanvasBatch, CanvasSpec, Noise, Session


def own_steps(
    session: Session, specs: Sequence[CanvasSpec], sampling: Sampling, noise: Noise | None = None
) -> list[list[RawStep]]:
    """Each canvas's own steps: what a batch repeats of a finished canvas, while others go on, is left out."""
    batch = CanvasBatch(session, specs, sampling, noise=noise)
    steps: list[list[RawStep]] = [[] for _ in specs]
    while not batch.finished:
        for mine, step in zip(steps, batch.step(), strict=True):
            if not mine or not mine[-1].finished:
                mine.append(step)
    return steps
