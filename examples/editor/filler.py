"""The model behind the editor: a thread of its own that opens it and fills gaps, and a queue of what happened.

Nothing here knows of windows. A window calls `fill`, `cancel` and `close`, which return at once, and looks into
`messages` now and then.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydiffgguf import DenoiseStep, DiffusionModel

__all__ = ["Draft", "Failed", "Filled", "Filler", "Message", "Opened", "Piece"]

#: Behind the last character nothing says how long the text is to be: this many tokens at most are written there.
TOKENS_AT_THE_END = 64


@dataclass(frozen=True)
class Opened:
    """The model can be used."""

    name: str


@dataclass(frozen=True)
class Piece:
    """A part of a draft; `live`: the model has not settled on it."""

    text: str
    live: bool


@dataclass(frozen=True)
class Draft:
    """What a gap looks like after a denoise step. `job`: the number that `fill` returned."""

    job: int
    pieces: list[Piece]
    step: int
    total_steps: int


@dataclass(frozen=True)
class Filled:
    """A gap's text, or what there was of it when it was `cancelled`."""

    job: int
    text: str
    cancelled: bool
    summary: str


@dataclass(frozen=True)
class Failed:
    """The model could not be opened (`job` is None), or a gap could not be filled."""

    job: int | None
    reason: str


Message = Opened | Draft | Filled | Failed


@dataclass(frozen=True)
class _Job:
    number: int
    prefix: str
    suffix: str
    cancelled: threading.Event


class Filler:
    """Fills one gap after the other.

    Args:
        path: the GGUF file.
        options: those of DiffusionModel.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._last: _Job | None = None
        self._count = 0
        # A daemon: a window that is closed while a large file is read does not wait for it.
        self._thread = threading.Thread(target=self._work, args=(path, options), name="filler", daemon=True)
        self._thread.start()

    def fill(self, prefix: str, suffix: str) -> int:
        """Asks for the text between two texts. Returns the job's number."""
        self._count += 1
        self._last = _Job(self._count, prefix, suffix, threading.Event())
        self._jobs.put(self._last)
        return self._last.number

    def cancel(self) -> None:
        """Ends what was asked for last: within one operator of the graph, or before it begins."""
        if self._last is not None:
            self._last.cancelled.set()

    def close(self) -> None:
        """Ends the thread; waits at most a second for it."""
        self.cancel()
        self._jobs.put(None)
        self._thread.join(timeout=1.0)

    # ------------------------------------------------------------------------------------------ on the filler's thread

    def _work(self, path: Path, options: dict[str, Any]) -> None:
        try:
            model = DiffusionModel(path, **options)
        except Exception as error:
            self.messages.put(Failed(None, str(error) or repr(error)))
            return
        with model:
            self.messages.put(Opened(path.name))
            while (job := self._jobs.get()) is not None:
                if job.cancelled.is_set():
                    continue
                try:
                    self._fill(model, job)
                except Exception as error:  # a worker always answers: one that dies leaves the window waiting for ever
                    self.messages.put(Failed(job.number, str(error) or repr(error)))

    def _fill(self, model: DiffusionModel, job: _Job) -> None:
        began = time.monotonic()
        longest = 128 if job.suffix else TOKENS_AT_THE_END
        stream = model.stream_infill(job.prefix, job.suffix, max_gap=longest, cancel=job.cancelled)
        for event in stream:
            if isinstance(event, DenoiseStep):
                pieces = _pieces(model, event)
                self.messages.put(Draft(job.number, pieces, event.step, event.total_steps))
        result = stream.result
        seconds = time.monotonic() - began
        summary = f"{result.gap_tokens} tokens, {result.stats.candidates} candidates, {seconds:.1f} s"
        self.messages.put(Filled(job.number, result.text, result.finish_reason == "cancelled", summary))


def _pieces(model: DiffusionModel, event: DenoiseStep) -> list[Piece]:
    """The draft of an event, cut where a row that the sampler accepted meets one that it did not."""
    free = slice(None) if event.pinned is None else ~event.pinned
    tokens = event.tokens[free].tolist()
    live = (~event.accepted[free]).tolist()
    # Characters up to each token. Some tokens are parts of one character, so they are not decoded one by one.
    ends = [len(model.tokenizer.decode(tokens[:i], skip_special=True)) for i in range(len(tokens) + 1)]
    # The draft begins before these rows where earlier canvases belong to the gap, and within the first one where the
    # model goes on with a word that the prefix ends with.
    shift = len(event.text) - ends[-1]
    pieces = [Piece(event.text[: max(0, shift)], False)]
    for (start, end), is_live in zip(pairwise(ends), live, strict=True):
        pieces.append(Piece(event.text[max(0, start + shift) : max(0, end + shift)], is_live))
    return [piece for piece in pieces if piece.text]
