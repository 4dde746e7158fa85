"""How tokens of an answer read: up to the end token, thoughts apart, structure left out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from pydiffgguf.text.chat import CLOSE, OPEN, split_reasoning
from pydiffgguf.text.tokenizer import Tokenizer

__all__ = ["TextView", "until_end"]


class TextView:
    """How tokens read: answer and reasoning apart, structure left out. Without a tokenizer everything reads ""."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._hidden: frozenset[int] = frozenset()
        if tokenizer is not None:
            channel = {tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)}
            self._hidden = tokenizer.special_ids - channel

    def split(self, tokens: Sequence[int]) -> tuple[str, str]:
        """(reasoning, answer)"""
        if self._tokenizer is None:
            return "", ""
        return split_reasoning(self._tokenizer.decode(token for token in tokens if token not in self._hidden))

    def answer(self, tokens: Sequence[int]) -> str:
        return self.split(tokens)[1]

    def tokens_within(self, tokens: list[int], n_characters: int) -> list[int]:
        """The longest head of `tokens` whose answer has at most so many characters."""
        n = bisect.bisect_right(range(len(tokens) + 1), n_characters, key=lambda i: len(self.answer(tokens[:i])))
        return tokens[: n - 1]


def until_end(tokens: Sequence[int], end_ids: frozenset[int]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there was one."""
    for i, token in enumerate(tokens):
        if token in end_ids:
            return list(tokens[:i]), True
    return list(tokens), False
