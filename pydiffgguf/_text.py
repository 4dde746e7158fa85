"""Text for people: what strangers wrote made safe to show, foreign errors on one line, sizes."""

from __future__ import annotations

import re

# Controls but newline and tab; line and paragraph separators; marks that turn the reading direction.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def human(n: float) -> str:
    """Bytes in decimal units, as disks and download pages count: 26858000000 -> "26.9 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 99.5 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def one_line(text: object, limit: int = 200) -> str:
    """A text, or a foreign exception's message, on one line and of bounded length; a message that is empty is the
    exception's name."""
    flat = " ".join(str(text).split()) or type(text).__name__
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def printable(text: str, limit: int = 100) -> str:
    """A stranger's text for a terminal: one line without control characters, which could move the cursor."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def escape(text: str) -> str:
    """The text with what a terminal would obey written out: ESC becomes ``\\x1b``. Newlines and tabs stay."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)
