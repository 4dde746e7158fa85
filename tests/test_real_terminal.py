"""The commands on a real terminal: what is drawn, and Ctrl-C and Ctrl-D from its keyboard."""

from __future__ import annotations

from pathlib import Path

from pseudo_terminal import Pty


def test_a_real_terminal_sees_the_canvas(tiny_gguf: Path) -> None:
    """Drawn live, on a narrow terminal too; the cursor is back at the end, and the summary is there."""
    child = Pty("generate", str(tiny_gguf), "-p", "hello", "--seed", "7", "-n", "64")
    child.resize(20, 6)
    assert child.wait() == 0
    assert "step " in child.shown
    assert child.shown.rfind("\x1b[?25h") > child.shown.rfind("\x1b[?25l") >= 0
    assert " steps in " in child.shown


def test_ctrl_c_on_a_real_terminal(tiny_gguf: Path) -> None:
    """While the canvas is drawn: exit code 130, the cursor is back, no traceback."""
    child = Pty(
        "generate",
        str(tiny_gguf),
        "-p",
        "hello",
        "-n",
        "100000",
        "--ctx",
        "2000",
        "--steps",
        "5000",
        "--stability-threshold",
        "4000",
    )
    child.until("step ")
    child.type("\x03")
    assert child.wait() == 130
    assert child.shown.rfind("\x1b[?25h") > child.shown.rfind("\x1b[?25l") >= 0
    assert "Traceback" not in child.shown


def test_chat_on_a_real_terminal(tiny_gguf: Path) -> None:
    """Two turns with a Ctrl-C in the first; the second is answered, Ctrl-D leaves with 0."""
    child = Pty("chat", str(tiny_gguf), "--steps", "3000", "--stability-threshold", "2000", "--time-limit", "20")
    child.until("> ")
    child.type("hello\r")
    child.until("step ")
    child.type("\x03")
    child.until("stopped")
    child.until("> ")
    child.type("/clear\r")
    child.until("forgotten")
    child.until("> ")
    child.type("\x04")
    assert child.wait() == 0
    assert "Traceback" not in child.shown
