"""Gaps between two sides of a text: how they are asked for, and where their text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydiffgguf import Generation, Infill
from pydiffgguf.completions import as_generation
from pydiffgguf.server.endpoints import fim
from pydiffgguf.server.endpoints.generations import Diffusion, How
from pydiffgguf.server.errors import ApiError
from pydiffgguf.server.settings import Settings

if TYPE_CHECKING:
    from pydiffgguf import DiffusionModel

__all__ = ["CUT_SUFFIX", "DEFAULT_GAP", "Asked", "Trimmed", "trim"]

#: Editors send the rest of the line, at most this many lines and a newline: a suffix with more newlines was cut.
CUT_SUFFIX = 65
DEFAULT_GAP = 128
#: Where a text that nothing follows ends, unless the request says: an editor shows a block, not the rest of a file.
UNTIL = "block"


@dataclass(frozen=True)
class Asked:
    """One gap that a request asks for. `n`: candidates wanted. `n_indent`: from the second line on, the gap ends at a
    line with less indentation."""

    gap: fim.Gap
    max_gap: int
    n: int
    seed: int
    stop: Sequence[str]
    n_indent: int
    ends: bool
    diffusion: Diffusion
    lora: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, gap: fim.Gap, how: How, settings: Settings) -> Asked:
        """The gap of a completion. Stop strings that are markers are dropped: a text that quotes one goes on."""
        if how.diffusion.extra:
            raise ApiError(
                400, "diffusion.settle: a gap's text comes at its end, as one piece", param="diffusion.settle"
            )
        diffusion = replace(how.diffusion, time_limit=min(how.diffusion.time_limit, settings.infill_time_limit))
        stop = [text for text in how.stop if not fim.is_marker(text)]
        return cls(gap, min(how.max_tokens, settings.infill_max), 1, how.seed, stop, 0, True, diffusion, how.lora)

    def stream(self, model: DiffusionModel, left: float) -> Any:
        """The events of the filling, at most `left` seconds of them."""
        options = dict(self.diffusion.sampling)
        extra = self.diffusion.extra
        if not self.gap.suffix.strip():  # the end of a text: editors send the rest of the line, a newline
            options["until"] = extra.get("until", UNTIL)
        return model.stream_infill(
            self.gap.prefix,
            self.gap.suffix,
            max_gap=self.max_gap,
            min_gap=min(extra.get("min_gap", 0), self.max_gap),
            n=self.n,
            extra=list(self.gap.extra),
            seed=self.seed,
            mode=extra.get("mode", "auto"),
            heal=extra.get("heal", True),
            ends=self.ends,
            time_limit_s=left,
            **self.lora,
            **options,
        )

    def trim(self, text: str) -> Trimmed:
        return trim(text, self.stop, self.n_indent)

    def generation(self, result: Infill) -> Generation:
        """The answer that a filling is."""
        return as_generation(result, self.trim(result.text).text)


@dataclass(frozen=True)
class Trimmed:
    """A text up to where it had to end. `kind`: "eos", or "word" where a stop string or an indentation cut it."""

    text: str
    kind: str
    word: str = ""


def trim(text: str, stop: Sequence[str], n_indent: int) -> Trimmed:
    """Cuts a text at its first stop string, and from the second line on before the first line that is not blank and
    has less than `n_indent` characters of indentation."""
    found = [(at, word) for word in stop if (at := text.find(word)) >= 0]
    at, word = min(found, default=(len(text), ""))
    cut = text[:at]
    lines = cut.splitlines(keepends=True)
    for i, line in enumerate(lines[1:], 1):
        if line.strip() and len(line) - len(line.lstrip(" \t")) < n_indent:
            return Trimmed("".join(lines[:i]).rstrip("\r\n"), "word")
    return Trimmed(cut, "word" if found else "eos", word)
