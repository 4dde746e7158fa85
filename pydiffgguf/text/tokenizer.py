"""Text to token ids and back, from the vocabulary and merges that a GGUF holds.

The scheme is Gemma's: byte-pair merges over the whole text with spaces written as U+2581, no split into words before,
and single bytes (``<0xE2>``) for characters that the vocabulary lacks. The package ``tokenizers`` does the merging; it
is configured as transformers 5.23 configures it for Gemma (models/gemma/tokenization_gemma.py). transformers also sets
a pre-tokenizer that splits at spaces, but its normalizer has replaced every space before that, so there is none here.
"""

from __future__ import annotations

import bisect
import codecs
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pydiffgguf.errors import ModelFormatError, UnsupportedError

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.models import Model

__all__ = ["END_TEXTS", "Tokenizer", "read_tokenizer"]

SPACE = "\u2581"

#: tokenizer.ggml.model of files that can be read: DiffusionGemma's own, Gemma 4's; "llama", of Gemma 3 and others, has
#: scores in the place of merges.
MODELS = ("gemma4", "llama")

# GGUF's tokenizer.ggml.token_type
TYPE_UNKNOWN = 2
TYPE_CONTROL = 3
TYPE_USER_DEFINED = 4

#: Texts that end a generation, whatever id and type the file gives them. ``</s>`` is no end token: it is an HTML tag.
TURN_END = "<turn|>"
END_TEXTS = ("<eos>", TURN_END, "<|tool_response>")

#: Markup that is special by its text: files differ in whether its type says CONTROL or USER_DEFINED.
MARKUP = frozenset({'<|"|>', "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"})


class Tokenizer:
    """A vocabulary with its merges; immutable, and safe to use from several threads.

    Attributes:
        n_vocab: number of tokens; ids are ``0 .. n_vocab - 1``.
        bos_id, eos_id, unk_id, pad_id: ids, or None where the file names none.
        add_bos: whether a plain prompt begins with ``bos_id`` (the file's ``add_bos_token``).
        end_ids: ids that end a generation.
        special_ids: ids of tokens that mark structure, not text: the named ids above, those of type CONTROL or
            UNKNOWN, and the markup of `MARKUP`.
    """

    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    end_ids: frozenset[int]
    special_ids: frozenset[int]
    _tokens: list[str]
    _vocab: dict[str, int]
    _byte_values: dict[int, int]
    _with_special: tokenizers.Tokenizer
    _plain: tokenizers.Tokenizer
    _sorted: tuple[list[str], npt.NDArray[np.int32]] | None

    def __init__(self) -> None:
        raise TypeError("a Tokenizer is made by Tokenizer.from_gguf()")

    @classmethod
    def from_gguf(
        cls,
        tokens: Sequence[str],
        token_types: Sequence[int] | None,
        merges: Sequence[str],
        *,
        scores: Sequence[float] | None = None,
        bos_id: int | None,
        eos_id: int | None,
        unk_id: int | None,
        pad_id: int | None,
        add_bos: bool,
        extra_end_ids: Iterable[int] = (),
    ) -> Tokenizer:
        """Builds a tokenizer from the arrays of a GGUF.

        262,144 tokens and 514,906 merges take 0.9 s of one core (2 GHz class), of which 0.6 s are ``tokenizers``'
        own. It reads the same as JSON in 1.1 s, but writing that JSON takes longer still: the arrays go in directly,
        and nothing is kept on the disk.

        Args:
            tokens: ``tokenizer.ggml.tokens``; the index is the id.
            token_types: ``tokenizer.ggml.token_type``, as long as `tokens`; None where the file has none.
            merges: ``tokenizer.ggml.merges``, best first, each "left right" with one space between. None at all is a
                tokenizer of single characters, unless the scores differ.
            scores: ``tokenizer.ggml.scores``, which stand in for merges (`merges_of_scores`); None where absent.
            bos_id, eos_id, unk_id, pad_id: the ``*_token_id`` keys; None where absent.
            add_bos: ``tokenizer.ggml.add_bos_token``.
            extra_end_ids: ``diffusion.eos_token_ids``.

        Raises:
            ModelFormatError: duplicate tokens, lengths that differ, merges of or to tokens that do not exist, ids out
                of range, or a vocabulary that cannot write every text.
        """
        from tokenizers import models

        vocab = dict(zip(tokens, range(len(tokens)), strict=True))
        types = _check_tokens(tokens, token_types, vocab)
        named = {"bos": bos_id, "eos": eos_id, "unknown": unk_id, "padding": pad_id}
        for name, id_ in named.items():
            if id_ is not None and not 0 <= id_ < len(tokens):
                raise ModelFormatError(f"tokenizer.ggml.{name}_token_id: {id_} is not below {len(tokens)}")
        extra_end_ids = tuple(extra_end_ids)
        for id_ in extra_end_ids:
            if not 0 <= id_ < len(tokens):
                raise ModelFormatError(f"diffusion.eos_token_ids: {id_} is not below {len(tokens)}")
        byte_values = _byte_values(vocab)
        if unk_id is None and len(byte_values) < 256:
            raise ModelFormatError(
                f"tokenizer.ggml.tokens: no unknown token, and only {len(byte_values)} of 256 byte tokens"
            )
        if scores is not None and len(scores) != len(tokens):
            raise ModelFormatError(f"tokenizer.ggml.scores: {len(scores)} entries, expected {len(tokens)}")
        if not merges and scores is not None and len(set(scores)) > 1:
            pairs = merges_of_scores(vocab, types, scores)
        else:
            pairs = _split_merges(merges)
        if merges and _longest(merges) - 1 > _longest(tokens):  # tokenizers 0.23.3 panics, on stderr
            raise ModelFormatError(_merge_error(pairs, vocab) or "tokenizer.ggml.merges: a result is no token")
        try:
            model = models.BPE(
                vocab,
                pairs,
                unk_token=None if unk_id is None else tokens[unk_id],
                fuse_unk=True,
                byte_fallback=True,
                # The cache is by whole texts here, which seldom come again; and tokenizers 0.23.3 loses it with every
                # tokenizer that was used, about 1 KB.
                cache_capacity=0,
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelFormatError(_merge_error(pairs, vocab) or f"tokenizer.ggml.merges: {error}") from None

        self = object.__new__(cls)
        self.n_vocab = len(tokens)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = bos_id, eos_id, unk_id, pad_id
        self.add_bos = add_bos
        ends = {vocab[text] for text in END_TEXTS if text in vocab} | set(extra_end_ids)
        self.end_ids = frozenset(ends if eos_id is None else ends | {eos_id})
        self.special_ids = frozenset(
            {i for i, kind in enumerate(types) if kind in (TYPE_UNKNOWN, TYPE_CONTROL)}
            | {vocab[text] for text in (*MARKUP, *END_TEXTS) if text in vocab}
            | {id_ for id_ in named.values() if id_ is not None}
        )
        user_defined = [tokens[i] for i, kind in enumerate(types) if kind == TYPE_USER_DEFINED]
        user_defined = [text for text in user_defined if vocab[text] not in self.special_ids]
        self._vocab = vocab
        self._tokens = list(tokens)
        self._byte_values = byte_values
        self._sorted = None
        # Both share the one model; which tokens are cut out of the text before it is a setting of the wrapper.
        self._with_special = _wrap(model, user_defined, [tokens[i] for i in sorted(self.special_ids)])
        self._plain = _wrap(model, user_defined, [])
        return self

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.n_vocab} tokens>"

    def encode(self, text: str, add_bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text. With ``special=False`` the texts of special tokens are ordinary text: what a stranger wrote
        cannot end a turn. Tokens that the file calls user-defined are always matched whole.

        Raises:
            ValueError: a lone surrogate, which UTF-8 cannot write; or `add_bos` in a vocabulary without bos.
            TypeError: `text` is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at character {error.start}") from None
        ids: list[int] = (self._with_special if special else self._plain).encode(text, add_special_tokens=False).ids
        if add_bos:
            if self.bos_id is None:
                raise ValueError("add_bos: this vocabulary has no bos token")
            ids.insert(0, self.bos_id)
        return ids

    def token_bytes(self) -> list[bytes]:
        """What each token writes, by id."""
        return [
            bytes((self._byte_values[id_],)) if id_ in self._byte_values else token.replace(SPACE, " ").encode()
            for id_, token in enumerate(self._tokens)
        ]

    @property
    def byte_ids(self) -> Mapping[int, int]:
        """The tokens of single bytes: id -> byte."""
        return self._byte_values

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of a text in pieces (text, whether texts of special tokens are tokens there). Between special tokens the
        pieces are one text, so that ordinary pieces have the ids of the whole.

        Raises:
            ValueError: a lone surrogate.
        """
        ids: list[int] = []
        plain = ""
        for text, special in parts:
            at = 0
            if special:
                found = self._with_special.encode(text, add_special_tokens=False)
                for id_, (start, end) in zip(found.ids, found.offsets, strict=True):
                    if id_ in self.special_ids and id_ != self.unk_id:
                        ids += self.encode(plain + text[at:start], special=False)
                        ids.append(id_)
                        plain, at = "", end
            plain += text[at:]
        return ids + self.encode(plain, special=False)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids. Bytes that form no character become U+FFFD as ``bytes.decode(errors="replace")`` has it; a
        character that is still incomplete at the end is left out, so the text of a longer list always begins with
        the text of a shorter one.

        Raises:
            ValueError: an id out of range.
        """
        return codecs.getincrementaldecoder("utf-8")("replace").decode(self._bytes(ids, skip_special))

    def piece(self, id_: int) -> str:
        """What one token looks like on its own: its text, or ``<0xE2>`` for a byte that is no character by itself.

        Raises:
            ValueError: the id is out of range.
        """
        raw = self._bytes((id_,), False)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return self._tokens[id_]

    def extending(self, text: str) -> list[int]:
        """Ids of the ordinary tokens whose text begins with `text` and is longer, ascending: what may stand where a
        word was broken off. The first call sorts the vocabulary (0.5 s for 262,144 tokens), later ones take
        microseconds, or 7 ms where half of the vocabulary begins so, as with a space."""
        if self._sorted is None:
            hidden = self.special_ids | self._byte_values.keys()
            pieces = ((token.replace(SPACE, " "), id_) for id_, token in enumerate(self._tokens) if id_ not in hidden)
            in_order = sorted(pieces)
            self._sorted = [piece for piece, _ in in_order], np.array([id_ for _, id_ in in_order], dtype=np.int32)
        texts, ids = self._sorted
        first = bisect.bisect_right(texts, text)
        last = bisect.bisect_left(texts, text + chr(sys.maxunicode), first)
        found: list[int] = np.sort(ids[first:last]).tolist()
        return found

    @property
    def turn_end_id(self) -> int | None:
        """What ends a turn of a conversation: ``<turn|>``, or the end of the text where the vocabulary has none."""
        return self._vocab.get(TURN_END, self.eos_id)

    def token_id(self, text: str) -> int | None:
        """Id of the token whose text in the vocabulary is exactly `text`, or None."""
        return self._vocab.get(text)

    def _bytes(self, ids: Iterable[int], skip_special: bool) -> bytes:
        parts: list[bytes] = []
        for id_ in ids:
            if not 0 <= id_ < self.n_vocab:
                raise ValueError(f"token id {id_} is not in [0, {self.n_vocab})")
            if skip_special and id_ in self.special_ids:
                continue
            value = self._byte_values.get(id_)
            parts.append(self._tokens[id_].replace(SPACE, " ").encode("utf-8") if value is None else bytes((value,)))
        return b"".join(parts)


def _check_tokens(tokens: Sequence[str], types: Sequence[int] | None, vocab: dict[str, int]) -> Sequence[int]:
    """Refuses a vocabulary that is empty, doubled or not UTF-8; returns the types, empty where there are none."""
    if not tokens:
        raise ModelFormatError("tokenizer.ggml.tokens is empty")
    if len(vocab) != len(tokens):
        twice = next(i for i, text in enumerate(tokens) if vocab[text] != i)
        raise ModelFormatError(f"tokenizer.ggml.tokens: {twice} and {vocab[tokens[twice]]} are both {tokens[twice]!r}")
    try:
        "".join(tokens).encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFormatError("tokenizer.ggml.tokens holds a token that is not UTF-8") from None
    if types is not None and len(types) != len(tokens):
        raise ModelFormatError(f"tokenizer.ggml.token_type: {len(types)} entries, expected {len(tokens)}")
    return () if types is None else types


def _byte_values(vocab: dict[str, int]) -> dict[int, int]:
    """Id -> byte for the tokens named ``<0x00>`` to ``<0xFF>``."""
    names = {f"<0x{value:02X}>": value for value in range(256)}
    return {vocab[name]: value for name, value in names.items() if name in vocab}


def _split_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    """["a b", ...] -> [("a", "b"), ...]: one join and one split, 0.2 s for 514,906 merges, half of what a loop takes.
    Only U+0020 separates; merges of newlines and of other white space exist."""
    for rank, merge in enumerate(merges):
        if merge.count(" ") != 1:
            raise ModelFormatError(f"tokenizer.ggml.merges: entry {rank} is {merge!r}, expected two parts")
    parts = iter(" ".join(merges).split(" ") if merges else ())
    return list(zip(parts, parts, strict=True))


def merges_of_scores(vocab: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that has scores in their place, as SentencePiece writes it: every way to make a token
    of two others, best score first; of one score, longer left parts first. User-defined tokens, whose score is none,
    come before all others. The order is that of transformers 5.23 (convert_slow_tokenizer.py, generate_merges)."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for text, id_ in vocab.items():
        score = 0.0 if types and types[id_] == TYPE_USER_DEFINED else scores[id_]
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, -cut, cut - len(text), left, right))
    ranked.sort(key=lambda entry: entry[:3])  # stable: in the vocabulary's order where all three are equal
    return [(left, right) for *_, left, right in ranked]


def _longest(texts: Sequence[str]) -> int:
    """Bytes of the longest text."""
    return max(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _merge_error(pairs: list[tuple[str, str]], vocab: dict[str, int]) -> str | None:
    for rank, (left, right) in enumerate(pairs):
        for text in (left, right, left + right):
            if text not in vocab:
                return f"tokenizer.ggml.merges: entry {rank} ({left!r}, {right!r}): {text!r} is not in the vocabulary"
    return None


def _wrap(model: Model, user_defined: list[str], special: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Tokenizer, normalizers

    wrapper = Tokenizer(model)
    wrapper.normalizer = normalizers.Replace(" ", SPACE)
    wrapper.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    wrapper.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return wrapper


def _with_marks(tokens: list[str]) -> list[str]:
    """Some writers put spaces for U+2581 into the tokens that are runs of them."""
    known = set(tokens)
    return [mark if " " in t and (mark := t.replace(" ", SPACE)) not in known else t for t in tokens]


def read_tokenizer(metadata: Mapping[str, Any], n_vocab: int) -> Tokenizer | None:
    """The tokenizer that a file with these keys holds; None where it holds none.

    Raises ModelFormatError for keys of the wrong type, and for a vocabulary of another size than `n_vocab`;
    UnsupportedError for a tokenizer of another kind.
    """
    prefix = "tokenizer.ggml."
    if f"{prefix}tokens" not in metadata:
        return None

    def typed(key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ModelFormatError(f"key {key} has the wrong type: {type(value).__name__}")
        return value

    model = typed(f"{prefix}model", str, "gemma4")
    if model not in MODELS:
        raise UnsupportedError(f"key {prefix}model is {model!r:.60}: {' and '.join(MODELS)} are read")
    tokens = typed(f"{prefix}tokens", list, [])
    if model == "llama":
        if typed(f"{prefix}add_space_prefix", bool, True):
            raise UnsupportedError(f"key {prefix}add_space_prefix is not false: only texts as they are can be read")
        tokens = _with_marks(tokens)
    if len(tokens) != n_vocab:
        raise ModelFormatError(
            f"key {prefix}tokens has {len(tokens)} entries, expected one a row of token_embd, {n_vocab}"
        )
    return Tokenizer.from_gguf(
        tokens,
        typed(f"{prefix}token_type", list, None),
        typed(f"{prefix}merges", list, []),
        scores=typed(f"{prefix}scores", list, None),
        bos_id=typed(f"{prefix}bos_token_id", int, None),
        eos_id=typed(f"{prefix}eos_token_id", int, None),
        unk_id=typed(f"{prefix}unknown_token_id", int, None),
        pad_id=typed(f"{prefix}padding_token_id", int, None),
        add_bos=typed(f"{prefix}add_bos_token", bool, True),
        extra_end_ids=typed("diffusion.eos_token_ids", list, []),
    )
