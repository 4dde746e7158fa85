"""examples/editor on a virtual display: keys are typed, gaps denoise in place, and the window is never kept waiting."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from virtual_display import virtual_display

from pydiffgguf import DenoiseStep, DiffusionModel, demo_model_path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "editor"
PREFIX = "On Sunday Emma found a white cup in the school. Emma gave the white cup to Mia. Mia took the"
SUFFIX = (
    " corn. They went to the park to buy corn, but the park had only soup. "
    "So Sam cooked the soup and Anna ate it without corn.\n"
)
MIDDLE = " cup home that Sunday and never went back to the school.\n\nLast night Sam and Anna wanted"


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    with virtual_display() as name:
        yield name


class Driver:
    """An editor's window, and someone who types."""

    def __init__(self, display: str, model: Path) -> None:
        import tkinter

        import editor
        from filler import Filler

        self.root = tkinter.Tk(display)
        self.editor = editor.Editor(self.root, Filler(model))
        self.text = self.editor.text
        self.text.focus_force()
        self.until(lambda: self.root.focus_get() is self.text)

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Lets the window live until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"still not so; the status line says: {self.status}"
            self.root.update()
            time.sleep(0.002)

    @property
    def status(self) -> str:
        return self.editor.status.get()

    @property
    def shown(self) -> str:
        return self.text.get("1.0", "end-1c")

    def type(self, text: str) -> None:
        for character in text:
            keysym = {" ": "space", "\n": "Return", ".": "period", ",": "comma"}.get(character, character)
            self.text.event_generate(f"<KeyPress-{keysym}>")
            self.text.event_generate(f"<KeyRelease-{keysym}>")
        self.root.update()

    def press(self, key: str) -> None:
        self.text.event_generate(f"<{key}>")
        self.root.update()

    def ready(self) -> None:
        self.until(lambda: "Ctrl+Space" in self.status)

    def drafting(self) -> None:
        """Until a draft stands in the text, part of which is not settled."""
        self.until(lambda: bool(self.text.tag_ranges("live")))

    def filled(self) -> None:
        self.until(lambda: self.editor.job is None)


@contextmanager
def driven(display: str, model: Path) -> Iterator[Driver]:
    import tkinter

    driver = Driver(display, model)
    try:
        yield driver
    finally:
        driver.editor.filler.close()
        with contextlib.suppress(tkinter.TclError):  # the test may have closed the window
            driver.root.destroy()
        driver.__dict__.clear()
        gc.collect()  # here, and not on the next filler's thread: Tcl objects must go on the thread that made them


@pytest.fixture
def driver(display: str) -> Iterator[Driver]:
    with driven(display, demo_model_path()) as driver:
        yield driver


def test_a_gap_denoises_in_place_at_the_cursor(driver: Driver) -> None:
    """What is typed is the prefix, what stands behind the cursor the suffix; drafts appear between them, and the end is
    what `infill` returns. One undo takes it out."""
    driver.type(PREFIX + SUFFIX)
    driver.ready()
    driver.text.mark_set("insert", f"1.{len(PREFIX)}")
    driver.press("Control-space")
    drafts = set()
    while driver.editor.job is not None:
        assert driver.editor.contents() == PREFIX + SUFFIX
        driver.root.update()
        drafts.add(driver.shown)
    assert len(drafts) > 3
    assert driver.shown == PREFIX + MIDDLE + SUFFIX
    assert driver.text.get(*driver.text.tag_ranges("filled")) == MIDDLE
    assert "20 tokens" in driver.status
    driver.press("<Undo>")
    assert driver.shown == PREFIX + SUFFIX
    driver.press("<Redo>")
    assert driver.shown == PREFIX + MIDDLE + SUFFIX


@pytest.mark.parametrize("drafts", range(4))
def test_escape_takes_the_draft_out(driver: Driver, drafts: int) -> None:
    """At once, whatever the model is doing; the text and its saved state are as before, and the next gap is filled."""
    driver.editor.open(EXAMPLE / "sample.txt")
    driver.text.mark_set("insert", f"1.{len(PREFIX)}")
    driver.ready()
    driver.press("Control-space")
    for _ in range(drafts):
        before = driver.shown
        driver.until(lambda before=before: driver.shown != before)
    driver.press("Escape")
    assert driver.editor.job is None
    assert driver.shown == PREFIX + SUFFIX
    assert not driver.text.edit_modified()
    assert "cancelled" in driver.status
    driver.press("Control-space")
    driver.filled()
    assert driver.shown == PREFIX + MIDDLE + SUFFIX


def test_typing_ends_the_filling_and_is_not_lost(driver: Driver) -> None:
    """A key that changes the text takes the draft out and is typed; one that moves the cursor disturbs nothing."""
    driver.editor.open(EXAMPLE / "sample.txt")
    driver.text.mark_set("insert", f"1.{len(PREFIX)}")
    driver.press("Control-space")
    driver.drafting()
    driver.press("Up")
    assert driver.editor.job is not None
    driver.text.mark_set("insert", "1.2")
    driver.type("xy")
    assert driver.editor.job is None
    assert driver.shown == "Onxy" + PREFIX[2:] + SUFFIX


def test_the_window_answers_while_the_model_works(driver: Driver) -> None:
    """A timer of 10 ms goes on through a whole filling. 250 ms: a busy machine may take the processor away for so long;
    a window that waited for the model would answer after a second."""
    driver.editor.open(EXAMPLE / "sample.txt")
    driver.text.mark_set("insert", f"1.{len(PREFIX)}")
    driver.ready()
    ticks = [time.monotonic()]

    def tick() -> None:
        ticks.append(time.monotonic())
        if driver.editor.job is not None:
            driver.root.after(10, tick)

    driver.press("Control-space")
    tick()
    driver.filled()
    waits = [after - before for before, after in itertools.pairwise(ticks)]
    assert len(waits) > 10
    assert max(waits) < 0.25


def test_saving_leaves_the_draft_out(driver: Driver, tmp_path: Path) -> None:
    """The file gets the document; its line ends and permissions stay."""
    path = tmp_path / "text.txt"
    path.write_bytes((PREFIX + SUFFIX).replace("\n", "\r\n").encode())
    path.chmod(0o640)
    driver.editor.open(path)
    driver.ready()
    driver.type("A ")
    driver.text.mark_set("insert", f"1.{len('A ' + PREFIX)}")
    driver.press("Control-space")
    driver.drafting()
    driver.press("Control-s")
    assert path.read_bytes() == ("A " + PREFIX + SUFFIX).replace("\n", "\r\n").encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]
    driver.press("Escape")
    assert not driver.text.edit_modified()
    driver.press("Control-space")
    driver.filled()
    assert driver.text.edit_modified()


def test_saving_keeps_mixed_line_ends(driver: Driver, tmp_path: Path) -> None:
    """Each line has the end that it had."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\nthree\n")
    driver.editor.open(path)
    driver.ready()
    driver.type("A ")
    driver.press("Control-s")
    assert path.read_bytes() == b"A one\r\ntwo\nthree\n"


def test_a_file_that_cannot_be_opened_changes_nothing(driver: Driver, tmp_path: Path) -> None:
    """The status line says why."""
    driver.type("kept")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path, reason in ((tmp_path / "missing", "No such file"), (tmp_path / "binary", "UTF-8")):
        driver.editor.open(path)
        assert reason in driver.status
        assert driver.shown == "kept"


def test_at_the_end_of_the_text_the_model_goes_on_with_it(driver: Driver) -> None:
    """Without anything behind the cursor the length is the model's."""
    driver.ready()
    text = "Last night Sam and Anna wanted corn. They went to the park to buy corn, but"
    driver.type(text)
    driver.press("Control-space")
    driver.filled()
    assert driver.shown.startswith(text + " the park")


def test_quitting_does_not_wait_for_the_model(display: str) -> None:
    """The window is gone within a second of the key, in the middle of a filling."""
    with driven(display, demo_model_path()) as driver:
        driver.editor.open(EXAMPLE / "sample.txt")
        driver.press("Control-space")
        driver.drafting()
        began = time.monotonic()
        driver.text.event_generate("<Control-q>")
        assert time.monotonic() - began < 1.0
        assert not driver.editor.filler._thread.is_alive()


def test_a_model_that_cannot_be_opened_is_said_in_the_window(display: str, tmp_path: Path) -> None:
    """The editor is an editor without it."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, not really")
    with driven(display, tmp_path / "broken.gguf") as driver:
        driver.until(lambda: driver.status.startswith("no model: "))
        driver.type("text")
        assert driver.shown == "text"


def test_the_editor_starts_as_a_program(display: str) -> None:
    """With the sample, and prints nothing."""
    environment = {**os.environ, "DISPLAY": display}
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE / "editor.py")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.terminate()
    assert process.communicate(timeout=20) == (b"", b"")


def test_the_worker_answers_whatever_the_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw is a message, and the next gap is filled."""
    from filler import Failed, Filled, Filler

    whole = DiffusionModel.stream_infill
    errors = [OSError("the file was changed"), ZeroDivisionError()]

    def stream(*arguments: object, **options: object) -> object:
        if errors:
            raise errors.pop(0)
        return whole(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionModel, "stream_infill", stream)
    filler = Filler(demo_model_path())
    for reason in ("the file was changed", "ZeroDivisionError()", None):
        job = filler.fill("On Sunday Emma found a", " in the school.")
        while not isinstance(message := filler.messages.get(timeout=30), (Failed, Filled)):
            pass
        assert message.job == job
        assert message.reason == reason if isinstance(message, Failed) else reason is None
    filler.close()


@pytest.mark.parametrize(
    ("prefix", "suffix", "options"),
    [
        (PREFIX, SUFFIX, {}),
        ("On Sunday Emma fou", "nd a white cup in the school.", {}),
        ("On Sunday Emma found a", " in the school.", {"gap": 100}),
    ],
    ids=["words", "healed", "several canvases"],
)
def test_pieces_are_the_draft(prefix: str, suffix: str, options: dict[str, int]) -> None:
    """Cut into settled and unsettled pieces, a draft is the event's text, all of it and nothing else."""
    from filler import _pieces

    with DiffusionModel(demo_model_path()) as model:
        kinds = set()
        for event in model.stream_infill(prefix, suffix, **options):
            if not isinstance(event, DenoiseStep):
                continue
            pieces = _pieces(model, event)
            assert "".join(piece.text for piece in pieces) == event.text
            kinds |= {piece.live for piece in pieces}
        assert kinds == {True, False}
