"""Where the text around a gap goes: what into the cache, what onto the canvas.

    cache    [bos] [extra files] [far suffix] [prefix without its last word]       the raw form
             [user's turn: the file, its hole marked] [opening of the answer, the prefix's tail]   the chat form
    canvas   [last word] [gap, free rows] [near suffix, pinned rows]

Prefix and suffix are made into ids apart, so the text is cut where the caller cut it; markup that somebody typed stays
text. Nothing is ever taken from the text: what this file leaves out is context that the model does not see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydiffgguf.engine.options import Gap
from pydiffgguf.errors import ContextOverflowError, ModelFormatError
from pydiffgguf.gap.search import Hole, suffix_rows
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = ["Layout", "chat_message", "check_extra", "fence_around", "lay_out", "resolve_mode"]

#: A word longer than this many tokens is not healed, nor one that takes more than a quarter of the canvas.
MOST_HEAD = 4
#: Tokens of the prefix that open the answer in the chat form.
CHAT_TAIL = 64
SEPARATOR = "\n\n"
#: How much of a long text is looked at first: more characters than n_ctx tokens have in most texts, and no less than
#: what takes little time (32,000 characters without a space: 0.1 s).
CHARACTERS_PER_ID, CHARACTERS = 6, 2**15

#: A trailing space belongs to the token of the word behind it: left in the cache, it keeps that token from being used.
_LAST_WORD = re.compile(r"(?:\w+|[ \t]+)\Z")


@dataclass(frozen=True)
class Layout:
    """`prompt`: ids for the cache. `hole`: what is on the canvas. `head_text`: the text of `hole.head`, with which
    every filling begins. `dropped`: tokens of context that n_ctx had no room for."""

    prompt: list[int]
    hole: Hole
    head_text: str
    dropped: int


def resolve_mode(mode: str, file_mode: object, has_template: bool) -> Literal["raw", "chat"]:
    """The form that is used: the caller's, else the one that the file's key ``diffusion.infill_mode`` names, else chat
    where the file has a chat template. Raises ValueError for an unknown mode, and for "chat" without a template."""
    if mode not in ("auto", "raw", "chat"):
        raise ValueError(f"mode is {mode!r}: it must be 'auto', 'raw' or 'chat'")
    if file_mode not in (None, "raw", "chat"):
        raise ModelFormatError(f"key diffusion.infill_mode is {file_mode!r:.60}: it must be 'raw' or 'chat'")
    if mode == "auto":
        mode = str(file_mode) if file_mode else "chat" if has_template else "raw"
    if mode == "chat" and not has_template:
        raise ValueError("mode is 'chat', but this file has no chat template; use mode='raw'")
    return "chat" if mode == "chat" else "raw"


def check_extra(extra: object) -> list[tuple[str, str]]:
    """The pairs of strings (name, text), also of a dict. Raises TypeError for anything else."""
    if isinstance(extra, Mapping):
        extra = list(extra.items())
    if not isinstance(extra, Sequence) or isinstance(extra, str):
        raise TypeError(f"extra must be a list of pairs (name, text), not {type(extra).__name__}")
    pairs = []
    for i, pair in enumerate(extra):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"extra[{i}] must be a pair of strings (name, text), but is {pair!r}")
        pairs.append((pair[0], pair[1]))
    return pairs


def split_head(
    tokenizer: Tokenizer, prefix: str, ids: Sequence[int], most: int
) -> tuple[list[int], list[int], list[int], str]:
    """(ids before the last word, ids of the last word, ids that may replace it, its text).

    A word, or the spaces at the end, that the tokenizer could go on with is left to the canvas: either as it stands, or
    as the beginning of one longer token. Without such a word of at most `most` tokens, the last three are empty.
    """
    nothing: tuple[list[int], list[int], list[int], str] = (list(ids), [], [], "")
    most = min(most, len(ids))
    # One character more than this many tokens can hold means that the word is longer. The whole prefix is not searched:
    # a long run of letters without a space (base64, say) takes the square of its length, 6 s for 16,000.
    word = _LAST_WORD.search(prefix[-1 - len(tokenizer.decode(ids[len(ids) - most :])) :])
    if word is None:
        return nothing
    for n in range(1, most + 1):
        text = tokenizer.decode(ids[-n:])
        if len(text) >= len(word[0]):
            longer = tokenizer.extending(text) if prefix.endswith(text) else []
            return (list(ids[:-n]), list(ids[-n:]), longer, text) if longer else nothing
    return nothing


def _near(tokenizer: Tokenizer, text: str, n_ctx: int, at_end: bool) -> tuple[str, list[int], int]:
    """(the end or the beginning of a text, its ids, about how many ids the rest has): all of it, or else more than
    n_ctx ids. Ids of two megabytes without a line end would take half a minute, and n_ctx has no room for them."""
    size = max(CHARACTERS_PER_ID * n_ctx, CHARACTERS)
    while True:
        step = size // 4
        part = text
        if len(text) > size + step:
            # A beginning that moves in large steps: the next keystrokes find the same one in the cache.
            first = (len(text) - size) // step * step if at_end else 0
            line = text.find("\n", first, first + step) + 1 if at_end else 0
            part = text[line or first :] if at_end else text[:size]
        ids = tokenizer.encode(part, special=False)
        if len(part) == len(text) or len(ids) > n_ctx:
            return part, ids, round(len(ids) / max(1, len(part)) * (len(text) - len(part)))
        size *= 2


def fence_around(texts: Sequence[str]) -> str:
    """More backquotes than any of the texts has in a row, so that none of them ends its block."""
    runs = re.findall("`{3,}", "\n".join(texts))
    return "`" * (max(map(len, runs), default=2) + 1)


def chat_message(prefix: str, suffix: str, extra: Sequence[tuple[str, str]]) -> str:
    """The user's turn of the chat form."""
    marker = "[MISSING]"
    while any(marker in text for text in (prefix, suffix, *(text for _, text in extra))):
        marker = f"[{marker}]"
    fence = fence_around([prefix, suffix, *(text for _, text in extra)])
    parts = [f"{name}:\n{fence}\n{text}\n{fence}" for name, text in extra]
    parts.append(
        f"A part of this file is missing, at the place marked {marker}. Write the file again from shortly before the "
        "mark, with the missing part in its place; change nothing else, explain nothing.\n"
        f"{fence}\n{prefix}{marker}{suffix}\n{fence}"
    )
    return SEPARATOR.join(parts)


def lay_out(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    gap: Gap,
    min_gap: int,
    max_gap: int,
    extra: Sequence[tuple[str, str]],
    heal: bool,
    canvas: int,
    n_ctx: int,
    chat: Callable[[str], list[int]] | None,
    later: Sequence[int] = (),
    ends: bool = True,
) -> Layout:
    """Distributes a document around its gap.

    Args:
        canvas, n_ctx: rows of a canvas and positions of the session.
        chat: for the chat form, what makes the prompt's ids of the user's turn; None for the raw form.
        later: ids behind `suffix`, -1 for free rows: further gaps and the text between them.
        ends: the document ends there, so an end token follows it.

    Raises:
        ContextOverflowError: n_ctx has no room for a prefix, however short.
        ValueError: an empty prefix, and no bos token in its place.
    """
    start = [] if tokenizer.bos_id is None or not tokenizer.add_bos else [tokenizer.bos_id]
    prefix, before, dropped = _near(tokenizer, prefix, n_ctx, at_end=True)
    suffix, behind, dropped_behind = _near(tokenizer, suffix, n_ctx, at_end=False)
    dropped += dropped_behind
    others: list[tuple[str, str]] = []
    files: list[list[int]] = []
    for name, text in extra:
        _, ids, more = _near(tokenizer, f"{name}:\n{text}{SEPARATOR}", n_ctx, at_end=False)
        if len(ids) > n_ctx:
            dropped += len(ids) + more
        else:
            others.append((name, text))
            files.append(ids)
    before, head, healed, head_text = split_head(tokenizer, prefix, before, min(MOST_HEAD, canvas // 4) if heal else 0)
    if not start and not before and not chat:
        if not head:
            raise ValueError(
                "the prefix is empty, and this vocabulary has no bos token: give at least one word of prefix"
            )
        before, head, healed, head_text = head, [], [], ""
    end = tokenizer.turn_end_id if chat is not None else tokenizer.eos_id
    closing = [end] if ends and end is not None else []
    hole = Hole([*behind, *later, *closing], head, healed, tokenizer.end_ids)
    shortest = min_gap if gap == "auto" else gap
    # A gap longer than one canvas goes through the cache.
    encoded = len(head) + shortest if shortest > hole.longest_gap(canvas) else 0
    room = n_ctx - canvas - encoded - len(start)
    if room < 1:
        gap_too = f"a gap of {shortest} tokens and " if encoded else ""
        raise ContextOverflowError(
            f"n_ctx is {n_ctx}: no room for a prefix beside {gap_too}a canvas of {canvas}; open the model with a "
            "larger n_ctx"
        )
    if chat is not None:
        return _chat_layout(tokenizer, prefix, suffix, before, hole, head_text, others, chat, room, dropped)

    # The suffix behind the shortest gap does not fit onto the canvas: what is behind the longest gap's part is quoted.
    # It is the same for every keystroke in the prefix, so the cache keeps it.
    far: list[int] = []
    if len(behind) + max(1, shortest) + MOST_HEAD > canvas:
        longest = max_gap if gap == "auto" else gap
        near = max(suffix_rows(canvas), canvas - MOST_HEAD - longest)
        far = behind[near:]
    separator = tokenizer.encode(SEPARATOR, special=False)
    quoted = [*far, *separator] if far else []
    whole = sum(map(len, files)) + len(quoted) + len(before)
    # What is farthest from the gap goes first: other files, the suffix's end, the prefix's beginning.
    while files and sum(map(len, files)) + len(quoted) + len(before) > room:
        files.pop(0)
    if len(quoted) + len(before) > room:
        share = room // 4 if len(before) > room // 2 else room // 2
        far = far[: max(0, share - len(separator))]
        quoted = [*far, *separator] if far else []
    if len(quoted) + len(before) > room:
        # In whole canvases, so that the next keystrokes find the same beginning in the cache.
        over = len(quoted) + len(before) - room
        before = before[min(len(before) - 1, -(-over // canvas) * canvas) :]
    prompt = [*(id_ for ids in files for id_ in ids), *quoted, *before]
    return Layout([*start, *prompt], hole, head_text, dropped + whole - len(prompt))


def _chat_layout(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    before: list[int],
    hole: Hole,
    head_text: str,
    extra: Sequence[tuple[str, str]],
    chat: Callable[[str], list[int]],
    room: int,
    dropped: int,
) -> Layout:
    """The file goes into the user's turn; other files are left out first, then both ends of this one."""
    tail = before[-CHAT_TAIL:]
    files, head, rear = list(extra), prefix, suffix
    while True:
        prompt = [*chat(chat_message(head, rear, files)), *tail]
        over = len(prompt) - room
        if over <= 0:
            return Layout(prompt, hole, head_text, dropped)
        if files:
            dropped += len(tokenizer.encode(files.pop(0)[1], special=False))
        elif len(head) + len(rear) <= 2 * CHAT_TAIL:
            raise ContextOverflowError(
                f"the chat form needs {len(prompt)} tokens, but n_ctx leaves room for {room}; open the model with a "
                "larger n_ctx, or use mode='raw'"
            )
        else:
            # A token is about four characters; half again, so that a second round is rare.
            cut = max(64, 6 * over)
            if len(rear) >= len(head):
                dropped += len(tokenizer.encode(rear[-cut:], special=False))
                rear = rear[:-cut]
            else:
                dropped += len(tokenizer.encode(head[:cut], special=False))
                head = head[cut:]
