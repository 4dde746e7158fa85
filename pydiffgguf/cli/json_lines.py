"""Events as JSON, one object a line, for programs that start the command and read what it prints."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pydiffgguf.generate import Block, DenoiseStep, Prefill

__all__ = ["JsonLines", "LineWriter"]


class LineWriter:
    """Writes objects to a stream, each whole on its own line and at once, from any thread."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, value: Mapping[str, Any]) -> None:
        """One line. ASCII alone: no reader has to know an encoding."""
        line = json.dumps(value, allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


class JsonLines:
    """An output (see `terminal.Output`) that writes every event as a line.

    ``{"event": "prefill", "done", "total"}``, ``{"event": "step", "canvas", "step", "total_steps", "text", "accepted",
    "free", "elapsed_s"}`` (step counts from 1; of `free` rows this many are accepted), ``{"event": "block", "text"}``.

    Args:
        writer: where to.
        head: what every line begins with, such as the number of the request.
    """

    def __init__(self, writer: LineWriter, head: Mapping[str, Any] | None = None) -> None:
        self._writer = writer
        self._head = dict(head or {})

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to end: the result, or the error, is the caller's line."""

    def prefill(self, event: Prefill) -> None:
        self.write("prefill", done=event.done, total=event.total)

    def step(self, event: DenoiseStep) -> None:
        pinned = 0 if event.pinned is None else int(event.pinned.sum())
        self.write(
            "step",
            canvas=event.canvas,
            step=event.step + 1,
            total_steps=event.total_steps,
            text=event.text,
            accepted=int(event.accepted.sum()),
            free=len(event.tokens) - pinned,
            elapsed_s=event.elapsed_s,
        )

    def block(self, event: Block) -> None:
        self.write("block", text=event.text)

    def write(self, event: str, **fields: Any) -> None:
        """A line for an event of that name."""
        self._writer.write({**self._head, "event": event, **fields})
