"""A display that nobody sees, for tests of windows: Xvfb on a number that it finds itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

__all__ = ["virtual_display"]


@contextmanager
def virtual_display(size: str = "900x600") -> Iterator[str]:
    """The display's name, such as ":5". Skips the test, with the reason, where there is no Xvfb or no tkinter."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter (Debian: python3-tk)")
    program = shutil.which("Xvfb")
    if program is None:
        pytest.skip("needs a virtual display: Xvfb (Debian: apt-get install xvfb)")
    read, write = os.pipe()
    server = subprocess.Popen(
        [program, "-displayfd", str(write), "-screen", "0", f"{size}x24", "-nolisten", "tcp"],
        pass_fds=[write],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    try:
        with os.fdopen(read) as number:
            yield f":{number.readline().strip()}"
    finally:
        server.terminate()
        server.wait(timeout=20)
