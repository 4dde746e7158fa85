"""Strings that end an answer."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Strings that end a text before the first of them.

    Raises:
        TypeError: not a string or a sequence of strings.
        ValueError: an empty string among them.
    """

    def __init__(self, stop: str | Sequence[str] = ()) -> None:
        stops: Sequence[object] = (stop,) if isinstance(stop, str) else stop
        if isinstance(stops, bytes) or not isinstance(stops, Sequence):
            raise TypeError(f"stop must be a str or a list of them, not {type(stop).__name__}")
        self.stops: tuple[str, ...] = ()
        for text in stops:
            if not isinstance(text, str):
                raise TypeError(f"stop must hold strings, not {type(text).__name__}")
            if not text:
                raise ValueError("stop: an empty string would end every text before it begins")
            self.stops += (text,)

    def find(self, text: str, start: int = 0) -> int | None:
        """Where the earliest stop string at or after `start` begins, or None. To search a text that grows, go back by
        `overlap` characters: a stop string may straddle the seam."""
        found = [at for at in (text.find(stop, start) for stop in self.stops) if at >= 0]
        return min(found) if found else None

    @property
    def overlap(self) -> int:
        """Length of the longest stop string, less one."""
        return max((len(stop) for stop in self.stops), default=1) - 1
