"""Drafts of a canvas as stream chunks that ordinary clients ignore."""

from __future__ import annotations

import time
from typing import Any

from pydiffgguf import DenoiseStep, DiffusionModel, Prefill
from pydiffgguf.completions import frame

__all__ = ["Frames", "wanted"]

#: At most this many drafts a second; the last of a block always goes out.
PER_SECOND = 20


def wanted(item: Any, frames: bool) -> bool | None:
    """For a Job: which events of a generation reach the stream. True: as a draft, which may be dropped."""
    _, event = item
    if isinstance(event, DenoiseStep):
        return True if frames else None
    return None if isinstance(event, Prefill) else False


class Frames:
    """Chooses the drafts that go out.

    Args:
        kind: None for no drafts, "text", or "tokens" for the canvas itself too.
    """

    def __init__(self, model: DiffusionModel, kind: str | None) -> None:
        self._model = model
        self._kind = kind
        self._last = 0.0
        self._held: DenoiseStep | None = None

    def take(self, step: DenoiseStep) -> dict[str, Any] | None:
        """What goes out for a step; None where one went out just now."""
        now = time.monotonic()
        if self._kind is None:
            return None
        if now - self._last < 1 / PER_SECOND:
            self._held = step
            return None
        self._last, self._held = now, None
        return self._words(step)

    def flush(self) -> dict[str, Any] | None:
        """The block is finished: its last draft, where it has not gone out."""
        held, self._held = self._held, None
        return None if held is None else self._words(held)

    def _words(self, step: DenoiseStep) -> dict[str, Any]:
        return frame(step, self._model.tokenizer.piece if self._kind == "tokens" else None)
