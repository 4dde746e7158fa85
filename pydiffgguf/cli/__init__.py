"""The command line. `main` is the entry point of the command `pydiffgguf`; nothing else in the package imports it."""

from __future__ import annotations

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line on `argv` (None: sys.argv) and returns the exit code."""
    from pydiffgguf.cli.arguments import main as run

    return run(argv)
