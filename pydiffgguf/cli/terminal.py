"""Generations on a terminal: the canvas as it is denoised, and plain text where there is no terminal.

Model output is a stranger's text: what could move the cursor, change colours or turn the reading direction is shown
escaped on a terminal (`escape`), and written as it is to a pipe or file.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.style import Style
from rich.table import Column
from rich.text import Text

from pydiffgguf._text import escape

if TYPE_CHECKING:
    from pydiffgguf.convert import CollectProgress, ConvertProgress
    from pydiffgguf.generate import Block, DenoiseStep, Generation, Prefill
    from pydiffgguf.infill import Infill
    from pydiffgguf.text.tokenizer import Tokenizer

__all__ = [
    "LiveCanvas",
    "Output",
    "PlainOutput",
    "SilentOutput",
    "chunk_progress",
    "conversion_progress",
    "infill_summary",
    "is_live_terminal",
    "summary",
]

ACCEPTED = Style()
UNCERTAIN = Style(dim=True)
PINNED = Style(bold=True, color="cyan")
ASIDE = Style(dim=True, italic=True)

#: How much of the text on either side of a gap is shown.
CONTEXT_LINES = 3
CONTEXT_CHARACTERS = 240

#: Least time between two drawings: steps of a small model come faster than an eye or a terminal follows.
FRAME_S = 0.04

_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")


def is_live_terminal(stream: TextIO) -> bool:
    """Whether a live canvas can be drawn there: a terminal that can move its cursor. rich alone would take a pipe for
    one when FORCE_COLOR is set."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


@contextlib.contextmanager
def conversion_progress(stream: TextIO) -> Iterator[Callable[[ConvertProgress], None] | None]:
    """A progress bar with the rate, as a callback for convert(); None where there is no terminal to draw it on."""
    if not is_live_terminal(stream):
        yield None
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(width=28, no_wrap=True)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("reading")

        def show(progress: ConvertProgress) -> None:
            name = Text(progress.tensor or "finishing").markup
            bar.update(task, description=name, completed=progress.bytes_done, total=progress.bytes_total)

        yield show


@contextlib.contextmanager
def chunk_progress(stream: TextIO) -> Iterator[Callable[[CollectProgress], None] | None]:
    """A progress bar over chunks of text, as a callback for collect(); None where there is no terminal."""
    if not is_live_terminal(stream):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("chunks", total=None)
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.count)


def summary(generation: Generation) -> str:
    """One line about a generation: tokens, steps by canvas, speed, and why it ended."""
    stats = generation.stats
    steps = "+".join(map(str, stats.steps)) or "0"
    if len(stats.steps) > 8:
        steps = f"{sum(stats.steps)}"
    canvases = f"{len(stats.steps)} canvas{'es' if len(stats.steps) != 1 else ''}"
    seconds = stats.prefill_s + stats.denoise_s
    return (
        f"{len(generation.tokens)} tokens, {steps} steps in {canvases}, {seconds:.1f} s, "
        f"{len(generation.tokens) / seconds if seconds else 0:.1f} tokens/s, {generation.finish_reason}"
    )


def infill_summary(gaps: Sequence[Infill]) -> str:
    """One line about filled gaps: tokens, what was tried, steps, time, and why it ended."""
    costs = [gap.stats for gap in gaps]
    seconds = sum(cost.prefill_s + cost.denoise_s + cost.score_s for cost in costs)
    return (
        f"{sum(gap.gap_tokens for gap in gaps)} tokens, {sum(cost.candidates for cost in costs)} candidates, "
        f"{sum(cost.forwards for cost in costs)} steps, {seconds:.1f} s, "
        f"{next((gap.finish_reason for gap in gaps if gap.finish_reason != 'stop'), 'stop')}"
    )


class Output(Protocol):
    """Where the events of one generation go; a context manager around them."""

    def __enter__(self) -> Output: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def prefill(self, event: Prefill) -> None: ...

    def step(self, event: DenoiseStep) -> None: ...

    def block(self, event: Block) -> None: ...


class SilentOutput:
    """Shows nothing: what is wanted is the result."""

    def __enter__(self) -> SilentOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def prefill(self, event: Prefill) -> None:
        """Not shown."""

    def step(self, event: DenoiseStep) -> None:
        """Not shown."""

    def block(self, event: Block) -> None:
        """Not shown."""


class PlainOutput:
    """Writes each block's text when the block is finished, and a newline at the end.

    Args:
        file: where to.
        escaped: escape control characters, for a terminal.
        newline: False leaves out the newline at the end.
    """

    def __init__(self, file: TextIO, *, escaped: bool = False, newline: bool = True) -> None:
        self._file = file
        self._escaped = escaped
        self._newline = newline
        self._last = ""

    def __enter__(self) -> PlainOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._newline and (kind is None or self._last):
            self._write("" if self._last.endswith("\n") else "\n")

    def prefill(self, event: Prefill) -> None:
        """Not shown."""

    def step(self, event: DenoiseStep) -> None:
        """Drafts are not shown."""

    def block(self, event: Block) -> None:
        self._write(escape(event.text) if self._escaped else event.text)

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
        self._last = text or self._last


class LiveCanvas:
    """Draws the canvas in place while it is denoised: accepted tokens plain, uncertain ones dim, pinned ones coloured,
    steps and speed beneath. Whole lines of finished canvases move up into the scrollback; when the context ends,
    however it ends, the drawing goes, the finished text stays, and the cursor is back.

    Args:
        console: the terminal.
        tokenizer: to show tokens by.
        pace_s: least time a step stays on screen; the demo's model is too fast to watch.
        prefix: the text before the canvas, of which the end is shown with the pinned rows.
        keep_last: leave the last step's canvas on screen at the end, for a canvas that no block follows.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Tokenizer,
        *,
        pace_s: float = 0.0,
        prefix: str = "",
        keep_last: bool = False,
    ) -> None:
        self._console = console
        self._tokenizer = tokenizer
        self._pace_s = pace_s
        self._prefix = prefix
        self._keep_last = keep_last
        self._prefill: Prefill | None = None
        self._step: DenoiseStep | None = None
        self._line = Text()  # the last, unfinished line of the finished text
        self._tokens: list[int] = []
        self._drawn = 0.0
        # A terminal that is made narrower wraps the drawing anew, into more rows than rich then erases: a piece of the
        # old drawing stays above. Nothing else is lost; erasing by guess would erase what was there before.
        self._live = Live(
            self,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> LiveCanvas:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        self._end_line()
        if self._keep_last and self._step is not None:
            self._print(self.canvas_text(self._step))

    def prefill(self, event: Prefill) -> None:
        """Says how much of the prompt is read."""
        self._prefill = event
        self._live.refresh()

    def step(self, event: DenoiseStep) -> None:
        """Draws a step, unless the last drawing is too fresh."""
        self._step = event
        now = time.monotonic()
        if self._pace_s:
            time.sleep(max(0.0, self._drawn + self._pace_s - now))
        elif now - self._drawn < FRAME_S:
            return
        self._drawn = time.monotonic()
        self._live.refresh()

    def block(self, event: Block) -> None:
        """Takes over a finished canvas: its whole lines are printed for good."""
        self._step = None
        self._tokens += event.tokens
        self._append(event.reasoning, ASIDE)
        self._append(event.text, ACCEPTED)
        self._live.refresh()

    def _append(self, text: str, style: Style) -> None:
        if not text:
            return
        if style != self._line.style:
            self._end_line()
        whole, newline, rest = (self._line.plain + escape(text)).rpartition("\n")
        if newline:
            self._print(Text(whole, style))
        self._line = Text(rest, style)

    def _end_line(self) -> None:
        if self._line:
            self._print(self._line)
            self._line = Text()

    def canvas_text(self, event: DenoiseStep) -> Text:
        """The canvas as styled text, up to its end; tokens of structure are left out. With a prefix, only the next
        lines on both sides of the free rows."""
        text = Text(overflow="fold", tab_size=4)
        filled = 0  # characters up to the end of the last free row
        for piece, style in self._pieces(event):
            text.append(escape(piece), style)
            if style is not PINNED:
                filled = len(text)
        if not self._prefix:
            return text
        tail = "".join(self._prefix.splitlines(keepends=True)[-CONTEXT_LINES:])[-CONTEXT_CHARACTERS:]
        known = self._known(text.plain, filled, event.text)
        behind = "".join(text.plain[max(filled, known) :].splitlines(keepends=True)[:CONTEXT_LINES])
        shown = max(filled, known) + len(behind[:CONTEXT_CHARACTERS])
        context = Text(overflow="fold", tab_size=4).append(escape(tail), PINNED)
        return context.append_text(text[known:shown])

    def _known(self, canvas: str, filled: int, draft: str) -> int:
        """Characters at the canvas's beginning that the prefix ends with: its last word, which the gap may go on with.
        What the draft leaves of the rows up to the gap's end; without a gap, the longest that fits."""
        length = min(len(canvas), CONTEXT_CHARACTERS)
        if filled:
            length = max(0, filled - len(escape(draft)))
            return length if self._prefix.endswith(canvas[:length]) else 0
        return next(n for n in range(length, -1, -1) if self._prefix.endswith(canvas[:n]))

    def _pieces(self, event: DenoiseStep) -> Iterator[tuple[str, Style]]:
        """(text, style) by token; the bytes of one character are taken together."""
        tokens = [int(token) for token in event.tokens]
        end = self._end(event)
        at = 0
        while at < end:
            piece = self._tokenizer.piece(tokens[at])
            n = 1
            if _BYTE_NAME.fullmatch(piece):
                while at + n < end and _BYTE_NAME.fullmatch(self._tokenizer.piece(tokens[at + n])):
                    n += 1
                piece = self._tokenizer.decode(tokens[at : at + n])
            elif tokens[at] in self._tokenizer.special_ids:
                piece = ""
            yield piece, _style(event, at, at + n)
            at += n

    def _end(self, event: DenoiseStep) -> int:
        """Where the canvas's first end token stands; where rows are pinned, one of them is meant, and not a draft."""
        ends = (
            i
            for i, token in enumerate(event.tokens)
            if int(token) in self._tokenizer.end_ids and (event.pinned is None or event.pinned[i])
        )
        return next(ends, len(event.tokens))

    def _status(self) -> str:
        event = self._step
        if event is None:
            if self._tokens:
                return "reading the finished canvas"
            prefill = self._prefill
            return "reading" if prefill is None else f"reading {prefill.done:,} of {prefill.total:,}"
        settled = int(event.accepted.sum())
        free = len(event.tokens) - (0 if event.pinned is None else int(event.pinned.sum()))
        text = len(self._tokens) + int(event.accepted[: self._end(event)].sum())  # rows behind the end are not text
        speed = text / event.elapsed_s if event.elapsed_s > 0 else 0.0
        return (
            f"step {event.step + 1}/{event.total_steps}, {settled} of {free} accepted, {speed:.1f} tokens/s"
            f"{f', canvas {event.canvas + 1}' if event.canvas else ''}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The unfinished line, the canvas and the status; of a text higher than the screen, the end."""
        text = Text(overflow="fold", tab_size=4).append_text(self._line)
        if self._step is not None:
            text.append_text(self.canvas_text(self._step))
        room = max(1, console.height - 2)
        lines = text.wrap(console, options.max_width, overflow="fold")
        yield from lines[-room:]
        status = Text(self._status(), UNCERTAIN, no_wrap=True, overflow="ellipsis")
        status.truncate(options.max_width, overflow="ellipsis")
        yield status

    def _print(self, text: Text) -> None:
        # Soft: the terminal wraps, so that copying gives whole lines.
        self._console.print(text, soft_wrap=True)


def _style(event: DenoiseStep, begin: int, end: int) -> Style:
    if event.pinned is not None and event.pinned[begin:end].all():
        return PINNED
    return ACCEPTED if event.accepted[begin:end].all() else UNCERTAIN
