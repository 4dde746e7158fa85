"""The command on a terminal of its own, for tests of what only a terminal sees."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

# Makes the terminal on stdin the controlling one, so that Ctrl-C becomes a signal. Not pty.fork(): newer Pythons warn
# of a fork beside threads.
ON_TERMINAL = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.executable, sys.argv[1:])"


class Pty:
    """A child on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.terminal, inside = pty.openpty()
        command = [sys.executable, "-c", ON_TERMINAL, sys.executable, "-m", "pydiffgguf", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(inside)
        self.shown = ""
        self._seen = 0

    def resize(self, columns: int, rows: int = 24) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, text: str, timeout: float = 60) -> None:
        """Reads on until `text` has been shown, after what was waited for before."""
        end = time.monotonic() + timeout
        while text not in self.shown[self._seen :]:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.shown[-500:]!r}"
            self._read()
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def _read(self) -> bool:
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # Linux says so when the child has gone
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def wait(self) -> int:
        """Reads to the end; the exit code."""
        while self._read():
            pass
        os.close(self.terminal)
        return self.process.wait(60)
