"""A model's vocabulary as the grammar engine (llguidance) reads it, and the same for single bytes.

The engine is told each token's bytes, from the file's own vocabulary. A second table has an entry for each byte: where
a text's ending is searched, a mask over 256 entries costs a hundredth of one over a vocabulary.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pydiffgguf._binding.records import Mask
from pydiffgguf.errors import UnsupportedError
from pydiffgguf.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

__all__ = ["Symbols", "Tables", "engine"]

INSTALL = "in the source folder, pip install '.[structured]'"


def engine() -> Any:
    """The module llguidance. Raises UnsupportedError, with the line that installs it."""
    try:
        import llguidance
    except ImportError:
        raise UnsupportedError(f"constrained output needs llguidance: {INSTALL}") from None
    return llguidance


class _Wrapped:
    """What the engine asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int, encode: Any) -> None:
        self.tokens = tokens
        self.special_token_ids = list(special)
        self.eos_token_id = end
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        ids: list[int] = self._encode(text if isinstance(text, bytes) else text.encode())
        return ids


class Symbols:
    """Bytes, and behind them the markers of structure that a grammar may name, as the engine's second table.

    `markers`: ids of the vocabulary; marker i is symbol 257 + i, and symbol 256 the end.
    """

    END = 256

    def __init__(self, markers: Sequence[int]) -> None:
        module = engine()
        self.markers = list(markers)
        n = 257 + len(self.markers)
        tokens = [bytes((i,)) for i in range(256)] + [f"<{i}>".encode() for i in range(256, n)]
        wrapped = _Wrapped(tokens, range(256, n), self.END, list)
        self.table: llguidance.LLTokenizer = module.LLTokenizer(
            module.TokenizerWrapper(wrapped), n_vocab=n, eos_token=self.END, slices=[]
        )
        self.number = {id_: 257 + i for i, id_ in enumerate(self.markers)}


class Tables:
    """A vocabulary for the engine. Making it takes about 2 s and 100 MB at 262,144 tokens; one is kept a model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.n_vocab = tokenizer.n_vocab
        self.bytes_of = tokenizer.token_bytes()
        self._lock = threading.Lock()
        self._table: llguidance.LLTokenizer | None = None
        #: The ids that a text may end with; a grammar's end is one of them.
        reply = tokenizer.token_id("<|tool_response>")
        self.ends = sorted(tokenizer.end_ids - {reply}) or sorted(tokenizer.end_ids)
        self.end = tokenizer.turn_end_id if tokenizer.turn_end_id in self.ends else self.ends[0]

    @property
    def table(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._table is None:
                module = engine()
                wrapped = _Wrapped(self.bytes_of, sorted(self.tokenizer.special_ids), self.end, self.encode)
                self._table = module.LLTokenizer(
                    module.TokenizerWrapper(wrapped), n_vocab=self.n_vocab, eos_token=self.ends
                )
            return self._table

    @functools.cached_property
    def symbols(self) -> Symbols:
        """With the markers that calls are written with."""
        names = ("<|tool_call>", "<tool_call|>", '<|"|>')
        found = [self.tokenizer.token_id(name) for name in names]
        return Symbols([id_ for id_ in found if id_ is not None])

    @functools.cached_property
    def doubles(self) -> Mask:
        """A mask of all tokens except those of single bytes that an ordinary token writes as well: rarely trained."""
        ordinary = {
            self.bytes_of[id_]
            for id_ in range(self.n_vocab)
            if len(self.bytes_of[id_]) == 1
            and id_ not in self.tokenizer.byte_ids
            and id_ not in self.tokenizer.special_ids
        }
        doubled = [id_ for id_, value in self.tokenizer.byte_ids.items() if bytes((value,)) in ordinary]
        return self.everything & ~self._bits(doubled)

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Tokens that text never has: all that mark structure, except the markers that grammars may name."""
        return self.tokenizer.special_ids - self.symbols.number.keys()

    @functools.cached_property
    def everything(self) -> Mask:
        """A mask of all tokens."""
        return self._bits(range(self.n_vocab))

    @functools.cached_property
    def ends_mask(self) -> Mask:
        """A mask of the tokens that end a text."""
        return self._bits(self.ends)

    def _bits(self, ids: Sequence[int]) -> Mask:
        bits = np.zeros(-(-self.n_vocab // 32) * 32, dtype=np.bool_)
        bits[list(ids)] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def encode(self, data: bytes) -> list[int]:
        """Ids that write these bytes; parts of characters by the tokens of bytes."""
        ids: list[int] = []
        while data:
            try:
                return ids + self.tokenizer.encode(data.decode(), special=False)
            except UnicodeDecodeError as error:
                good, bad = data[: error.start], data[error.start : error.end]
                ids += self.tokenizer.encode(good.decode(), special=False)
                ids += [self._byte_id(value) for value in bad]
                data = data[error.end :]
        return ids

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        return {value: id_ for id_, value in self.tokenizer.byte_ids.items()}

    def _byte_id(self, value: int) -> int:
        if value not in self._byte_ids:
            raise UnsupportedError(f"this vocabulary cannot write the byte {value:#04x}")
        return self._byte_ids[value]
