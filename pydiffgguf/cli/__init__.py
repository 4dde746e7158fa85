"""The command line. `main` is the entry point of the command `pydiffgguf`; nothing else in the package imports it."""

from __future__ import annotations

import sys

from pydiffgguf.cli.version import version

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line on `argv` (None: sys.argv) and returns the exit code."""
    if (sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(version())  # editors ask at every start: they need not wait for a parser
        return 0
    from pydiffgguf.cli.arguments import main as run

    return run(argv)
