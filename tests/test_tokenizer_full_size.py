"""The tokenizer at the size of the published model: 262,144 tokens and 514,906 merges, from a GGUF, against the
checkpoint's own tokenizer.json in the package `tokenizers`, which is what transformers runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from gemma_vocabulary import N_MERGES, N_TOKENS, gemma_vocabulary, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import SPECIAL_TOKENS, make_checkpoint

from pydiffgguf import DiffusionModel
from pydiffgguf.convert import convert
from pydiffgguf.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "checkpoint"
    make_checkpoint(
        folder,
        vocab_size=N_TOKENS,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        canvas_length=32,
    )
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def full(checkpoint: Path) -> Path:
    """A GGUF with the whole vocabulary, whose weights are tiny."""
    convert(checkpoint, checkpoint.with_suffix(".gguf"), type="q8_0")
    return checkpoint.with_suffix(".gguf")


@pytest.fixture(scope="module")
def ours(full: Path) -> Tokenizer:
    with DiffusionModel(full) as model:
        return model.tokenizer


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Callable[[str, bool], list[int]]:
    """reference(text, special): the ids that the checkpoint's tokenizer.json gives."""
    wrapped = {special: tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json")) for special in (True, False)}
    wrapped[False].encode_special_tokens = True
    return lambda text, special: list(wrapped[special].encode(text, add_special_tokens=False).ids)


def test_the_vocabulary_is_the_published_one_in_size() -> None:
    """The merges that follow from the scores are as many as the published files have."""
    vocabulary = gemma_vocabulary()
    assert (len(set(vocabulary.tokens)), len(vocabulary.merges)) == (N_TOKENS, N_MERGES)
    assert len(set(vocabulary.merges)) == N_MERGES


def test_it_opens_within_two_seconds(full: Path) -> None:
    """The whole model, on one core: measured 1.1 s, of which the package `tokenizers` takes 0.6 s. The process' own
    time, since the clock on the wall depends on what else runs."""
    seconds = []
    for _ in range(2):
        began = time.process_time()
        with DiffusionModel(full) as model:
            assert model.tokenizer.n_vocab == N_TOKENS
        seconds.append(time.process_time() - began)
    assert min(seconds) < 2


HOSTILE = {
    "empty": "",
    "every character of one byte": "".join(map(chr, range(256))),
    "control characters": "x".join(map(chr, (*range(32), 0x7F, 0x85, 0x2028, 0x2029))),
    "emoji": "\U0001f600\U0001f1e9\U0001f1ea \U0001f469\u200d\U0001f467 \u2764\ufe0f\U0001f44d\U0001f3fd",
    "combining marks": "Z\u0351\u0303\u0321a\u0313\u0309 e\u0301\u00e9 \u0301\u0302 \u1112\u1161 \u0915\u094d\u0937",
    "right to left": "\u200f\u05e9\u05dc\u05d5 \u202eabc\u202c \u0645\u0631\u062d 123 \u0661\u0662 \u2066x\u2069",
    "far planes": "\ufffe\uffff\ufffd\ue000\U00020000\U0010ffff\U000e0041\ufeffx",
    "runs of spaces": "x".join(" " * n for n in range(70)),
    "runs of newlines": "x".join("\n" * n for n in range(70)),
    "runs of tabs": "x".join("\t" * n for n in range(70)),
    "white space mixed": " \n  \n\n \t\r\n \u00a0\u2003\u3000 \n \n" * 9,
    "the sign for a space": "a\u2581b \u2581\u2581 \u2581 c\u2581",
    "specials": "".join(SPECIAL_TOKENS) + " ".join(SPECIAL_TOKENS) + "x".join(SPECIAL_TOKENS),
    "nearly specials": "<|turn|turn> <|turn<turn|> <<bos>> <bos<eos>> <|turn>\n<|channel <0x41> <0x4> <unused99>",
    "markup of the vocabulary": "<table><tr><td>a</td></tr></table> <h1> </s> <s> <b>x</b> [multimodal] <img>",
    "code": "def f(a, b):\n    return {'x': a[0], \"y\": b[-1]}  # 100%\n\n\n\tif a>=b: pass\n",
    "long numbers": "1234567890" * 30 + " 3.14159 0x7fff 1e-10",
    "scripts": "\u65e5\u672c\u8a9e\u306e\u6587 \ud55c\uad6d \u0420\u0443 \u0e44\u0e17\u0e22 \U0001d54f",
}


@pytest.mark.parametrize("special", [True, False], ids=["special", "as text"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_has_the_references_ids(
    ours: Tokenizer, reference: Callable[[str, bool], list[int]], name: str, special: bool
) -> None:
    """And comes back as it was, but for the sign that stands for a space."""
    text = HOSTILE[name]
    ids = ours.encode(text, special=special)
    assert ids == reference(text, special)
    assert ours.decode(ids) == text.replace("\u2581", " ")


ATOMS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [*SPECIAL_TOKENS, "<table>", "</s>", "\u2581", "the ", " return ", "\r\n", "<", "|>", "\U0001f600"]
    ),
    st.integers(1, 80).map(lambda n: " " * n),
    st.integers(1, 80).map(lambda n: "\n" * n),
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(ATOMS, max_size=12).map("".join), special=st.booleans())
def test_any_text_has_the_references_ids(
    ours: Tokenizer, reference: Callable[[str, bool], list[int]], text: str, special: bool
) -> None:
    assert ours.encode(text, special=special) == reference(text, special)


def test_the_text_of_every_token_has_the_references_ids(
    ours: Tokenizer, reference: Callable[[str, bool], list[int]]
) -> None:
    """One in 29, and all of the first 700, where the special ones are."""
    tokens = gemma_vocabulary().tokens
    for text in [*tokens[:700], *tokens[700::29]]:
        assert ours.encode(text) == reference(text, True), text


def random_words(rng: random.Random) -> str:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "2024", "<|turn>", "return"]
    return " ".join(rng.choices(words, k=MEGABYTE // 5))


LONG_LINES: dict[str, Callable[[random.Random], str]] = {
    "words": random_words,
    "letters": lambda rng: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=MEGABYTE)),
    "one letter": lambda rng: "a" * MEGABYTE,
    "spaces": lambda rng: " " * MEGABYTE,
    "newlines": lambda rng: "\n" * MEGABYTE,
    "characters": lambda rng: "".join(chr(rng.randrange(0x20, 0xD000)) for _ in range(MEGABYTE // 3)),
    "marks": lambda rng: "a\u0301\u0300\u0327" * (MEGABYTE // 7),
    "specials": lambda rng: "<|turn>" * (MEGABYTE // 7),
    "angle brackets": lambda rng: "<" * MEGABYTE,
}


@pytest.mark.parametrize("name", LONG_LINES)
def test_a_line_of_a_megabyte_takes_bounded_time(
    ours: Tokenizer, reference: Callable[[str, bool], list[int]], name: str
) -> None:
    """Measured 0.2 s to 1.4 s of one core: the merges run over the whole text, in time near its length. Quadratic
    time would be hours."""
    text = LONG_LINES[name](random.Random(1))
    began = time.process_time()
    ids = ours.encode(text, special=False)
    assert time.process_time() - began < 6
    assert ids == reference(text, False)
    assert ours.decode(ids) == text.replace("\u2581", " ")
