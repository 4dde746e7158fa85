"""Runs a Python program that a model wrote, in a child process with limits.

The limits keep an accident from taking the machine along: endless loops, memory, huge files, floods of output. They are
no wall. The program runs as this user, can read what this user reads, and no promise is made about the network; what
must not happen belongs into a container or a virtual machine around the whole benchmark.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Limits", "Outcome", "check_available", "execute"]

# The child. It takes its orders from stdin, lowers its own limits, and runs the program; only when the program came to
# its end does it hand back the word it was given: an exit code of 0 is also what sys.exit() in the middle gives.
CHILD = """
import json, os, resource, sys
order = json.loads(sys.stdin.buffer.read())
answer = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
os.dup2(nothing, 0)
os.dup2(nothing, 1)
for name, (soft, hard) in order["limits"].items():
    limit = getattr(resource, name)
    there = resource.getrlimit(limit)[1]
    if there != resource.RLIM_INFINITY:
        soft, hard = min(soft, there), min(hard, there)
    try:
        resource.setrlimit(limit, (soft, hard))
    except (OSError, ValueError):  # macOS refuses some
        pass
exec(compile(order["program"], "program.py", "exec"), {"__name__": "__main__"})
os.write(answer, order["word"].encode())
"""

#: How much of what the program complained of is kept.
MESSAGE = 200


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds by the clock, seconds of processor time (rounded up), bytes of address space, and bytes
    of the largest file. Address space is not held to on macOS."""

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory: int = 1 << 30
    file_size: int = 16 << 20

    def by_name(self) -> dict[str, tuple[int, int]]:
        """(soft, hard) by the names of `resource`. Beyond the soft limit of processor time comes SIGXCPU, which tells
        what happened; a program that ignores it is killed a second later."""
        seconds = math.ceil(self.cpu_seconds)
        return {
            "RLIMIT_CPU": (seconds, seconds + 1),
            "RLIMIT_AS": (self.memory, self.memory),
            "RLIMIT_FSIZE": (self.file_size, self.file_size),
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_NOFILE": (64, 64),
        }


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program ran to its end. `reason`: why not, on one line; empty when it passed."""

    passed: bool
    reason: str = ""


def check_available() -> None:
    """Raises OSError where this system has no limits to set."""
    try:
        import resource  # noqa: F401
    except ImportError:
        raise OSError("programs are run with POSIX resource limits, which this system lacks") from None


def execute(program: str, limits: Limits | None = None) -> Outcome:
    """Runs the program in a fresh interpreter, in an empty temporary folder, with hardly any environment.

    It and whatever processes it started are killed when the time is over, or when it ends.
    """
    check_available()
    limits = limits or Limits()
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "limits": limits.by_name(), "word": word}).encode()
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        work = Path(folder) / "work"
        work.mkdir()
        with errors.open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=work,
                env={"PATH": os.defpath, "HOME": str(work), "TMPDIR": str(work), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                answer, _ = child.communicate(order, timeout=limits.seconds)
                timed_out = False
            except subprocess.TimeoutExpired:
                answer, timed_out = b"", True
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.kill()
                child.wait()
                for pipe in (child.stdin, child.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
        if timed_out:
            return Outcome(False, f"no end after {limits.seconds:g} s")
        if answer.decode(errors="replace") == word:
            return Outcome(True)
        return Outcome(False, why(child.returncode, errors))


def why(code: int, errors: Path) -> str:
    """What a program that did not come to its end died of."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return "too much processor time" if name == "SIGXCPU" else f"killed by {name}"
    with errors.open("rb") as file:
        file.seek(max(0, errors.stat().st_size - 8192))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else "it ended itself before the tests did"
    return last if len(last) <= MESSAGE else last[: MESSAGE - 3] + "..."
