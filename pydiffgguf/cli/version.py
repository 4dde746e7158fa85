"""What `--version` prints."""

from __future__ import annotations

__all__ = ["version"]


def version() -> str:
    """The package's name and version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"pydiffgguf {version('pydiffgguf')}"
    except PackageNotFoundError:  # run from a source folder; doctor says what to do
        return "pydiffgguf (not installed)"
