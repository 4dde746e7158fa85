"""Fill-in-the-middle markers inside a prompt, as editors write them for models that know no other way.

Each family's markers are text that its model was trained on. They are cut apart here, and become the two sides of a
gap; to the tokenizer they stay text in every case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["END_OF_TEXT", "Gap", "is_marker", "split"]

#: What Continue's provider for Mercury writes where there is no suffix.
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Gap:
    """The sides of a gap; `extra`: (name, text) of other files."""

    prefix: str
    suffix: str
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Family:
    """`prefix` may be missing in a prompt where `bare`; `middle` "" for a family whose prefix comes last."""

    prefix: str
    suffix: str
    middle: str
    bare: bool = False


FAMILIES = (
    _Family("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", bare=True),  # qwen, codegemma, granite; mercury
    _Family("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # starcoder, stable-code
    _Family("<PRE> ", " <SUF>", " <MID>"),  # codellama
    _Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - deepseek
    _Family("[PREFIX]", "[SUFFIX]", ""),  # codestral
    _Family("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # glm, codegeex
    _Family("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),  # seed-coder
)
_MARKERS = {
    text.strip() for family in FAMILIES for text in (family.prefix, family.suffix, family.middle) if text.strip()
} | {END_OF_TEXT, "<|file_sep|>", "<file_sep>", "<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<|cursor|>", "<EOT>"}
_FILES = re.compile(r"<\|file_sep\|>|<file_sep>|^\+\+\+\+\+ |^###PATH:", re.MULTILINE)
_REPOSITORY = re.compile(r"^<\|?repo_name\|?>[^\n]*\n?", re.MULTILINE)


def is_marker(text: str) -> bool:
    """Whether a stop string is a marker: it would never occur, or cut a text that only quotes it."""
    return text.strip() in _MARKERS


def split(prompt: str) -> Gap | None:
    """The gap that a prompt with a complete set of one family's markers asks for; None for ordinary text."""
    for family in FAMILIES:
        gap = _split(prompt, family)
        if gap is not None:
            return gap
    return None


def _split(prompt: str, family: _Family) -> Gap | None:
    prefix_at, suffix_at = prompt.find(family.prefix), prompt.find(family.suffix)
    if suffix_at < 0 or (family.middle and family.middle not in prompt):
        return None
    if prefix_at < 0 and not family.bare:
        return None
    suffix_first = prefix_at > suffix_at
    if not suffix_first and prefix_at >= 0:
        # The first suffix marker behind the prefix's.
        suffix_at = prompt.find(family.suffix, prefix_at + len(family.prefix))
        if suffix_at < 0:
            return None
    if suffix_first:
        before = prompt[:suffix_at]
        suffix = prompt[suffix_at + len(family.suffix) : prefix_at]
        rest = prompt[prefix_at + len(family.prefix) :]
        head, middle, tail = rest.rpartition(family.middle) if family.middle else (rest, "", "")
        if family.middle and not middle:
            return None
        prefix = head + tail
    else:
        before = prompt[: max(prefix_at, 0)]
        prefix = prompt[prefix_at + len(family.prefix) if prefix_at >= 0 else 0 : suffix_at]
        rest = prompt[suffix_at + len(family.suffix) :]
        suffix, middle, tail = rest.rpartition(family.middle) if family.middle else (rest, "", "")
        if family.middle and not middle:
            return None
        prefix += tail
    if suffix == END_OF_TEXT:
        suffix = ""
    return Gap(prefix, suffix, _other_files(before))


def _other_files(text: str) -> tuple[tuple[str, str], ...]:
    """The files before the first marker: a marker, a name to the line's end, the text."""
    text = _REPOSITORY.sub("", text)
    marks = list(_FILES.finditer(text))
    if not marks:
        return (("context", text),) if text.strip() else ()
    files = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        body = text[mark.end() : following.start() if following else None]
        name, _, content = body.partition("\n")
        if content.strip():
            files.append((name.strip() or "file", content))
    return tuple(files)
