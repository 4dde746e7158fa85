"""The live canvas, read back from a small terminal emulator, and the plain output."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from pydiffgguf._text import escape
from pydiffgguf.cli.terminal import LiveCanvas, PlainOutput, is_live_terminal, summary
from pydiffgguf.generate import Block, DenoiseStep, Generation, Stats
from pydiffgguf.text.tokenizer import Tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
WORDS = [
    "\u2581the",
    "\u2581dog",
    "\u2581sleeps",
    "\n",
    "thought",
    "\u2581日本",
    "a" * 30,
    "\x1b",
    "[2J",
    "\u202e",
    "\t",
]
TOKENS = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256)), *WORDS, "t", "h", "th"]
TYPES = [3] * len(SPECIAL) + [6] * 256 + [1] * (len(WORDS) + 3)


class Screen:
    """As much of a terminal as rich's live display uses: text, wrapping, cursor up, erase, hide and show the cursor.

    `rows` is everything ever shown, scrollback included; the cursor cannot go above the last `height` rows.
    """

    def __init__(self, width: int, height: int = 24) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.wrapped: list[bool] = [False]  # whether a row goes on from the one above
        self.row = self.column = 0
        self.cursor_visible = True
        self.styles: set[str] = set()

    def feed(self, data: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\s\S]", data):
            if part.startswith("\x1b["):
                self._control(part[2:-1], part[-1])
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            else:
                assert part.isprintable(), f"{part!r} reached the terminal"
                self._put(part)

    def _control(self, arguments: str, letter: str) -> None:
        if letter == "A":
            self.row = max(self.row - int(arguments or 1), len(self.rows) - self.height, 0)
        elif letter == "K":
            assert arguments == "2"
            self.rows[self.row], self.wrapped[self.row] = [], False
        elif letter in "hl":
            assert arguments == "?25"
            self.cursor_visible = letter == "h"
        elif letter == "m":
            self.styles.update(arguments.split(";"))
        else:
            raise AssertionError(f"unknown control {arguments}{letter}")

    def resize(self, width: int) -> None:
        """Wraps every line anew, as most terminals do; the cursor stays at the end."""
        lines: list[list[str]] = []
        for row, wrapped in zip(self.rows, self.wrapped, strict=True):
            if wrapped:
                lines[-1].extend(row)
            else:
                lines.append(list(row))
        self.width, self.rows, self.wrapped, self.row = width, [[]], [False], 0
        for i, line in enumerate(lines):
            if i:
                self._down()
            self.column = 0
            for character in line:
                if character:
                    self._put(character)

    def _down(self, wrapped: bool = False) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])
            self.wrapped.append(wrapped)

    def _put(self, character: str) -> None:
        cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + cells > self.width:
            self._down(wrapped=True)
        row = self.rows[self.row]
        row.extend([" "] * (self.column + cells - len(row)))
        row[self.column : self.column + cells] = [character, *[""] * (cells - 1)]
        self.column += cells

    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n")


class Terminal(io.StringIO):
    """A file that hands everything on to a screen."""

    def __init__(self, width: int, height: int = 24) -> None:
        super().__init__()
        self.screen = Screen(width, height)

    def write(self, data: str) -> int:
        self.screen.feed(data)
        return super().write(data)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(TOKENS, TYPES, ["t h"], bos_id=2, eos_id=1, unk_id=3, pad_id=0, add_bos=True)


def console_of(width: int, height: int = 24) -> tuple[Console, Screen]:
    terminal = Terminal(width, height)
    console = Console(
        file=terminal, force_terminal=True, width=width, height=height, color_system="standard", legacy_windows=False
    )
    return console, terminal.screen


def ids(*texts: str) -> list[int]:
    return [TOKENS.index(text) for text in texts]


def byte_ids(text: str) -> list[int]:
    return ids(*(f"<0x{value:02X}>" for value in text.encode()))


def step(
    tokens: Iterable[int],
    accepted: Iterable[int] | None = None,
    *,
    n: int = 0,
    canvas: int = 0,
    pinned: Iterable[int] | None = None,
) -> DenoiseStep:
    """A step of 16 rows; the indices of accepted and pinned rows are given, and the rest of the canvas is <eos>."""
    rows = np.full(16, 1, np.int32)
    listed = list(tokens)
    rows[: len(listed)] = listed
    marks = np.zeros((2, 16), bool)
    for mark, chosen in zip(marks, (accepted, pinned), strict=True):
        mark[list(chosen or ())] = True
    fixed = None if pinned is None else marks[1]
    return DenoiseStep(canvas, n, 48, rows, marks[0], np.zeros(16), "", 0.5, fixed)


@pytest.mark.parametrize("width", [20, 80])
def test_the_canvas_shows_tokens_status_and_no_end(tokenizer: Tokenizer, width: int) -> None:
    """What stands before the first end token, then one line with the step, counted from one, and the speed."""
    console, screen = console_of(width)
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        live.step(
            step([*ids("<bos>", "\u2581the", "\u2581dog"), *byte_ids("é"), 1, *ids("\u2581sleeps")], [1, 2, 8], n=6)
        )
        shown = screen.text()
        assert not screen.cursor_visible
    lines = shown.splitlines()
    assert lines[0] == " the dogé"
    assert len(lines) == 2
    full = "step 7/48, 3 of 16 accepted, 4.0 tokens/s"
    assert lines[1] == (full if width == 80 else full[:19] + "…")
    assert screen.text() == ""
    assert screen.cursor_visible


def test_styles_tell_accepted_uncertain_and_pinned_apart(tokenizer: Tokenizer) -> None:
    """Plain, dim, and bold cyan."""
    console, _ = console_of(80)
    live = LiveCanvas(console, tokenizer)
    event = step(ids("\u2581the", "\u2581dog", "\u2581sleeps"), [0], pinned=[2])
    styles = {piece: style for piece, style in live._pieces(event)}
    assert (styles[" the"].dim, styles[" dog"].dim) == (None, True)
    assert (styles[" sleeps"].bold, styles[" sleeps"].color.name) == (True, "cyan")  # type: ignore[union-attr]
    assert live.canvas_text(event).plain == " the dog sleeps"


def test_a_character_of_several_tokens_is_uncertain_until_all_are_accepted(tokenizer: Tokenizer) -> None:
    """And shows as the character, not as its bytes; an incomplete one is not shown."""
    console, _ = console_of(80)
    live = LiveCanvas(console, tokenizer)
    emoji = byte_ids("😀")
    for accepted, dim in (([0, 1, 2], True), ([0, 1, 2, 3], None)):
        ((piece, style),) = live._pieces(step(emoji, accepted))
        assert (piece, style.dim) == ("😀", dim)
    assert live.canvas_text(step(emoji[:3])).plain == ""


def test_finished_lines_stay_and_the_drawing_goes(tokenizer: Tokenizer) -> None:
    """Whole lines go to the scrollback as they are finished, and the rest follows; nothing is doubled or lost."""
    console, screen = console_of(80)
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        live.step(step(ids("\u2581the", "\n", "\u2581dog")))
        live.block(Block(" the\n dog", ids("\u2581the", "\n", "\u2581dog")))
        live.step(step(ids("\u2581sleeps"), canvas=1))
        assert screen.text().splitlines()[:2] == [" the", " dog sleeps"]
        assert screen.text().endswith("canvas 2")
        live.block(Block(" sleeps", ids("\u2581sleeps")))
    assert screen.text() == " the\n dog sleeps"
    assert screen.cursor_visible


@pytest.mark.parametrize("width", [1, 4, 20])
def test_narrow_terminals_lose_nothing(tokenizer: Tokenizer, width: int) -> None:
    """Words longer than the line, wide characters, more rows than the screen has: the finished text is all there."""
    text = "a" * 30 + " 日本 the dog\n\n dog"
    console, screen = console_of(width, 5)
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        for n in range(5):
            live.step(step(ids("a" * 30, "\u2581日本", "\u2581the", "\u2581dog", "\n", "\n", "\u2581dog"), [n], n=n))
        live.block(Block(text, []))
    shown = "".join("".join(row) for row in screen.rows)
    expected = text.replace("\n", "")
    if width == 1:  # a wide character has no room at all
        shown, expected = shown.replace("日", "").replace("本", ""), expected.replace("日", "").replace("本", "")
    assert shown.replace(" ", "") == expected.replace(" ", "")
    assert screen.cursor_visible


def test_a_drawing_higher_than_the_screen_shows_its_end(tokenizer: Tokenizer) -> None:
    """And is erased whole: no row of it is left behind."""
    console, screen = console_of(20, 6)
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        for n in range(3):
            live.step(step(ids(*["\u2581the", "\n"] * 6, "\u2581dog"), n=n))
        assert len(screen.text().splitlines()) <= 6
        assert " dog" in screen.text()
        live.block(Block(" the\n" * 6 + " dog", []))
    assert screen.text() == " the\n" * 6 + " dog"


def test_a_resize_loses_nothing(tokenizer: Tokenizer) -> None:
    """What stood on the screen before stays, what follows is drawn in the new width, and the text is whole."""
    console, screen = console_of(80)
    console.print("before")
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        live.step(step(ids("\u2581the", "\u2581dog")))
        for width in (10, 3, 60):
            screen.resize(width)
            console.width = width
            live.step(step(ids("\u2581the", "\u2581dog", "\u2581sleeps")))
        assert screen.text().splitlines()[-2] == " the dog sleeps"
        live.block(Block(" the dog sleeps\n", []))
    assert screen.text().startswith("before\n")
    assert screen.text().endswith("\n the dog sleeps")
    assert screen.cursor_visible


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_restores_the_terminal(tokenizer: Tokenizer, error: type[BaseException]) -> None:
    """Ctrl-C in the middle of a step: the cursor is back, the draft gone, finished text stays."""
    console, screen = console_of(40)
    with pytest.raises(error), LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        live.block(Block("one\ntwo", []))
        live.step(step(ids("\u2581the"), canvas=1))
        raise error
    assert screen.text() == "one\ntwo"
    assert screen.cursor_visible


def test_thoughts_are_shown_aside(tokenizer: Tokenizer) -> None:
    """Before the answer, in another style, also when they run over several canvases; their markers are not shown."""
    console, screen = console_of(60)
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        live.step(step(ids("<|channel>", "thought", "\n", "\u2581the")))
        assert screen.text().splitlines()[0] == "thought"
        live.block(Block("", ids("<|channel>", "thought", "\n", "\u2581the"), "the"))
        tokens = ids("\u2581dog", "\n", "\u2581sleeps", "<channel|>", "\u2581dog")
        live.block(Block(" dog", tokens, " dog\n sleeps"))
    assert screen.text() == "the dog\n sleeps\n dog"
    assert {"2", "3"} <= screen.styles


def test_control_characters_are_shown_not_obeyed(tokenizer: Tokenizer) -> None:
    """A model that writes ESC [ 2 J clears nothing; the screen would refuse anything that is not printable."""
    console, screen = console_of(60)
    with LiveCanvas(console, tokenizer, pace_s=1e-9) as live:
        live.step(step(ids("\x1b", "[2J", "\u202e", "\u2581dog")))
        assert screen.text().splitlines()[0] == r"\x1b[2J\u202e dog"
        live.block(Block("\x1b[2J\x07\x9b1m\u202e dog[bold]", []))
    assert screen.text() == r"\x1b[2J\x07\x9b1m\u202e dog[bold]"


def test_escape_keeps_ordinary_text() -> None:
    """Newlines, tabs, combining marks, joined emoji and right-to-left letters stay as they are."""
    text = "a\n\tb e\u0301 👩\u200d👧 שלום \u00a0\ufeff"
    assert escape(text) == text
    assert escape("\r\x00\u2028") == r"\r\x00\u2028"


def test_fast_steps_are_not_all_drawn(tokenizer: Tokenizer) -> None:
    """Drawing costs milliseconds: a thousand steps of a tiny model do not wait for the terminal."""
    console, _ = console_of(80)
    drawn = 0

    class Counting(LiveCanvas):
        def canvas_text(self, event: DenoiseStep) -> object:  # type: ignore[override]
            nonlocal drawn
            drawn += 1
            return super().canvas_text(event)

    with Counting(console, tokenizer) as live:
        for n in range(200):
            live.step(step(ids("\u2581the"), n=n))
    assert 1 <= drawn < 100


def test_the_last_canvas_can_stay(tokenizer: Tokenizer) -> None:
    """For a canvas that no block follows."""
    console, screen = console_of(80)
    with LiveCanvas(console, tokenizer, keep_last=True) as live:
        live.step(step(ids("\u2581the", "\u2581dog"), pinned=[0]))
    assert screen.text() == " the dog"


def test_a_gap_stands_between_its_texts(tokenizer: Tokenizer) -> None:
    """The prefix's last lines, the free rows without the word that they go on with, the suffix; a drafted end token
    ends nothing. At the end the filling alone stays."""
    console, screen = console_of(80)
    rows = [*ids("\u2581the", "\u2581dog"), 1, *ids("\u2581sleeps", "\n", "\u2581the", "\n"), *ids("\n") * 9]
    event = replace(step(rows, [1], pinned=[0, *range(3, 16)]), text=" dog")
    prefix = "1\n2\n3\nin the"
    with LiveCanvas(console, tokenizer, pace_s=1e-9, prefix=prefix) as live:
        live.step(event)
        assert live.canvas_text(event).plain == "2\n3\nin the dog sleeps\n the\n\n"
        assert "step 1/48, 1 of 2 accepted" in screen.text()
        live.block(Block(" dog", []))
    assert screen.text() == " dog"
    assert {"36"} <= {part for style in screen.styles for part in style.split(";")}


def test_a_gap_of_no_tokens_shows_both_texts_once(tokenizer: Tokenizer) -> None:
    """The canvas's first rows are the prefix's last word then, too."""
    console, _ = console_of(80)
    live = LiveCanvas(console, tokenizer, prefix="in the")
    event = step(ids("\u2581the", "\u2581dog", "\n") + ids("\n") * 13, pinned=range(16))
    assert live.canvas_text(event).plain == "in the dog\n\n\n"


def test_plain_output_without_a_newline() -> None:
    """For a text that goes on."""
    file = io.StringIO()
    with PlainOutput(file, newline=False) as output:
        output.block(Block("a", []))
    assert file.getvalue() == "a"


def test_plain_output_writes_text_once() -> None:
    """Block by block, exactly as it is, with one newline at the end."""
    for blocks, expected in ((["a\n", "b"], "a\nb\n"), (["a\n"], "a\n"), ([""], "\n"), (["\x1b[2J"], "\x1b[2J\n")):
        file = io.StringIO()
        with PlainOutput(file) as output:
            output.step(step(ids("\u2581the")))
            for text in blocks:
                output.block(Block(text, []))
        assert file.getvalue() == expected


def test_plain_output_on_a_terminal_is_escaped() -> None:
    """--no-live does not mean raw."""
    file = io.StringIO()
    with PlainOutput(file, escaped=True) as output:
        output.block(Block("\x1b[2J", []))
    assert file.getvalue() == "\\x1b[2J\n"


def test_an_error_before_the_first_text_writes_nothing() -> None:
    """The output file of a failed command is empty."""
    file = io.StringIO()
    with pytest.raises(ValueError, match="before"), PlainOutput(file):
        raise ValueError("before")
    assert file.getvalue() == ""


def test_a_pipe_is_no_live_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with FORCE_COLOR, which makes rich believe that everything is a terminal; nor is a dumb terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not is_live_terminal(io.StringIO())

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert is_live_terminal(Tty())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live_terminal(Tty())


def test_the_summary_counts() -> None:
    """Steps by canvas, or their sum when there are many."""
    stats = Stats(seed=7, prompt_tokens=3, steps=[12, 5], prefill_s=0.5, denoise_s=1.5)
    result = Generation("x", [1] * 40, "length", stats)
    assert summary(result) == "40 tokens, 12+5 steps in 2 canvases, 2.0 s, 20.0 tokens/s, length"
    stats = Stats(seed=7, prompt_tokens=3, steps=[2] * 9)
    assert summary(Generation("", [], "stop", stats)) == "0 tokens, 18 steps in 9 canvases, 0.0 s, 0.0 tokens/s, stop"
