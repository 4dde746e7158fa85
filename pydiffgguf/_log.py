"""The logger "pydiffgguf", which is silent unless the program that uses the library has set up logging.

INFO: what was opened and closed, with what it takes. WARNING: what is odd about a file, and context that had to be left
out. DEBUG: sessions, and results with their cost. The logger "pydiffgguf.ggml" has ggml's own lines, at its levels but
never above WARNING: what ggml calls an error comes back as an exception.
"""

from __future__ import annotations

import logging

__all__ = ["from_ggml", "logger"]

logger = logging.getLogger("pydiffgguf")
logger.addHandler(logging.NullHandler())  # without a handler, Python prints warnings on stderr

_GGML = logger.getChild("ggml")
#: ggml's numbers; a line that goes on has 5.
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.WARNING}


def from_ggml(level: int, text: str) -> None:
    """A line of ggml's, or a part of one."""
    line = text.rstrip()
    if line.strip("."):  # it shows progress by dots
        _GGML.log(_LEVELS.get(level, logging.DEBUG), "%s", line)
