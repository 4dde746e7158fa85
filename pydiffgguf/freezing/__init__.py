"""Where PyInstaller finds what it must know of this package; the entry point `pyinstaller40` names it."""

from __future__ import annotations

import os

__all__ = ["hook_dirs"]


def hook_dirs() -> list[str]:
    """The folders with hooks: this one."""
    return [os.path.dirname(__file__)]
