"""The tokenizer: what it decodes, what it takes for special, what it refuses.

tests/parity/test_gemma_tokenizer.py compares its ids with those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabulary import BYTES, HOSTILE, IDS, MARKUP, small_vocabulary

from pydiffgguf.errors import ModelFormatError, UnsupportedError
from pydiffgguf.text.tokenizer import Tokenizer, read_tokenizer


@pytest.fixture(scope="session")
def parts() -> tuple[list[str], list[int], list[str]]:
    return small_vocabulary()


@pytest.fixture(scope="session")
def tokenizer(parts: tuple[list[str], list[int], list[str]]) -> Tokenizer:
    return Tokenizer.from_gguf(*parts, **IDS)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    """Nothing is lost but the difference between a space and U+2581, which the scheme cannot keep."""
    expected = text.replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), data=st.data())
def test_a_cut_text_is_a_prefix(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """However few of the tokens are there, their text is the beginning of the whole and holds no garbage."""
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    part = tokenizer.decode(ids[:cut])
    assert tokenizer.decode(ids).startswith(part)
    assert part.count("\ufffd") <= text.count("\ufffd")


@settings(max_examples=300, deadline=None)
@given(values=st.binary(max_size=12), tail=st.text(alphabet="a ", max_size=2), data=st.data())
def test_bytes_decode_as_python_decodes_them(
    tokenizer: Tokenizer, values: bytes, tail: str, data: st.DataObject
) -> None:
    """Any run of byte tokens, then ordinary tokens: invalid bytes are replaced exactly as errors="replace" does, and a
    longer list never changes what was shown before."""
    ids = [tokenizer.token_id(BYTES[value]) for value in values] + tokenizer.encode(tail)
    ids = [id_ for id_ in ids if id_ is not None]
    if tail:
        assert tokenizer.decode(ids) == values.decode("utf-8", errors="replace") + tail
    cut = data.draw(st.integers(0, len(ids)))
    assert tokenizer.decode(ids).startswith(tokenizer.decode(ids[:cut]))


def test_an_unfinished_character_is_withheld(tokenizer: Tokenizer) -> None:
    """The first three bytes of an emoji show nothing; followed by a letter they show one U+FFFD."""
    emoji = [tokenizer.token_id(BYTES[value]) for value in "😀".encode()]
    ids = [id_ for id_ in emoji if id_ is not None]
    assert tokenizer.decode(ids[:3]) == ""
    assert tokenizer.decode([*ids[:3], *tokenizer.encode("the")]) == "\ufffdthe"
    assert tokenizer.decode(ids) == "😀"


def test_pieces_show_bytes_by_name(tokenizer: Tokenizer) -> None:
    """A byte that is no character keeps its name; spaces show as spaces."""
    for text, shown in (("<0xE2>", "<0xE2>"), ("<0x41>", "A"), ("\u2581", " "), ("<turn|>", "<turn|>")):
        id_ = tokenizer.token_id(text)
        assert id_ is not None
        assert tokenizer.piece(id_) == shown
    assert tokenizer.token_id("no such token") is None


def test_skip_special_drops_markup_of_either_type(tokenizer: Tokenizer) -> None:
    """Markup that the file calls user-defined is as special as a control token; other user-defined text stays."""
    ids = tokenizer.encode("<bos>the<|channel><table><turn|>")
    assert tokenizer.decode(ids, skip_special=True) == "the<table>"
    assert tokenizer.decode(ids) == "<bos>the<|channel><table><turn|>"


def test_markup_is_special_whatever_its_type(parts: tuple[list[str], list[int], list[str]]) -> None:
    """Two files that differ only in the type of their markup, and one without types, encode alike."""
    tokens, types, merges = parts
    other = [3 if token in MARKUP else kind for token, kind in zip(tokens, types, strict=True)]
    text = '<|channel>the<channel|><|"|>'
    expected = Tokenizer.from_gguf(tokens, types, merges, **IDS).encode(text)
    assert Tokenizer.from_gguf(tokens, other, merges, **IDS).encode(text) == expected
    assert Tokenizer.from_gguf(tokens, None, merges, **IDS).encode(text) == expected


def test_end_ids_go_by_text(parts: tuple[list[str], list[int], list[str]], tokenizer: Tokenizer) -> None:
    """<eos>, <turn|> and <|tool_response>, the eos key and the extra ids end a generation; </s> does not."""
    named = {text: tokenizer.token_id(text) for text in ("<eos>", "<turn|>", "<|tool_response>", "</s>", "<mask>")}
    assert tokenizer.end_ids == {named["<eos>"], named["<turn|>"], named["<|tool_response>"]}
    ids = dict(IDS, eos_id=named["</s>"])
    widened = Tokenizer.from_gguf(*parts, **ids, extra_end_ids=[named["<mask>"]])
    assert widened.end_ids == {*tokenizer.end_ids, named["</s>"], named["<mask>"]}


def test_merges_cross_newlines(parts: tuple[list[str], list[int], list[str]], tokenizer: Tokenizer) -> None:
    """The text is not split at newlines: a token that spans one is found."""
    spanning = [token for token in parts[0] if "\n" in token.strip("\n") and token not in BYTES]
    assert spanning, "the corpus was chosen so that such a token is learnt"
    assert any(tokenizer.encode(token.replace("\u2581", " ")) == [tokenizer.token_id(token)] for token in spanning)


def test_long_texts_are_not_quadratic(tokenizer: Tokenizer) -> None:
    """200,000 characters without a split take a second at most; quadratic merging would take minutes."""
    import time

    begin = time.process_time()
    assert len(tokenizer.encode("the dog " * 25_000)) > 25_000
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: ([], p[1], p[2]), "tokenizer.ggml.tokens is empty"),
        (lambda p: ([*p[0][:-1], p[0][5]], p[1], p[2]), r"tokenizer.ggml.tokens: 5 and \d+ are both '<\|turn>'"),
        (lambda p: ([*p[0][:-1], "\ud800"], p[1], p[2]), "not UTF-8"),
        (lambda p: (p[0], p[1][:-1], p[2]), r"token_type: \d+ entries, expected \d+"),
        (lambda p: (p[0], p[1], ["nothing"]), "entry 0 is 'nothing', expected two parts"),
        (lambda p: (p[0], p[1], ["t h", "a  b"]), "entry 1 is 'a  b', expected two parts"),
        (lambda p: (p[0], p[1], ["t h", "Q Z"]), r"entry 1 \('Q', 'Z'\): 'Q' is not in the vocabulary"),
        (lambda p: (p[0], p[1], ["x x"]), r"entry 0 \('x', 'x'\): 'xx' is not in the vocabulary"),
        # longer than every token: tokenizers panics where it looks it up
        (lambda p: (p[0], p[1], [f"{max(p[0], key=len)} x"]), r"entry 0 .* is not in the vocabulary"),
    ],
    ids=[
        "empty",
        "duplicate",
        "surrogate",
        "types",
        "one-part",
        "three-parts",
        "unknown-part",
        "unknown-result",
        "long",
    ],
)
def test_broken_vocabularies_are_refused(parts: Any, change: Any, message: str) -> None:
    """Each with one line that names the key."""
    with pytest.raises(ModelFormatError, match=message) as info:
        Tokenizer.from_gguf(*change(parts), **IDS)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("key", ["bos_id", "eos_id", "unk_id", "pad_id", "extra_end_ids"])
@pytest.mark.parametrize("value", [-1, 10_000])
def test_ids_out_of_range_are_refused(parts: Any, key: str, value: int) -> None:
    """Also in the list of further end tokens."""
    with pytest.raises(ModelFormatError, match=rf"_token_ids?: {value} is not"):
        Tokenizer.from_gguf(*parts, **{**IDS, key: [value] if key == "extra_end_ids" else value})


def test_a_vocabulary_that_cannot_write_every_text_is_refused(parts: Any) -> None:
    """Without an unknown token all 256 byte tokens must be there, or text would vanish in silence."""
    tokens, types, merges = parts
    whole = Tokenizer.from_gguf(tokens, types, merges, **{**IDS, "unk_id": None})
    assert whole.decode(whole.encode("😀")) == "😀"
    lacking = [f"gone {token}" if token == "<0xF0>" else token for token in tokens]
    with pytest.raises(ModelFormatError, match="only 255 of 256 byte tokens"):
        Tokenizer.from_gguf(lacking, types, merges, **{**IDS, "unk_id": None})


def test_without_merges_characters_are_tokens(parts: Any) -> None:
    """As in the package tokenizers; scores that are all alike say nothing."""
    tokens, types, _ = parts
    for scores in (None, [-1000.0] * len(tokens)):
        plain = Tokenizer.from_gguf(tokens, types, [], scores=scores, **IDS)
        ids = plain.encode("the cat")
        assert plain.decode(ids) == "the cat"
        assert len(ids) == 7


def test_scores_stand_in_for_merges(parts: Any, tokenizer: Tokenizer) -> None:
    """A file of the kind "llama", as Gemma 3's are: spaces written as themselves in tokens that are runs of them."""
    tokens, types, merges = parts
    rank = {left + right: -float(i) for i, (left, right) in reversed(list(enumerate(m.split(" ") for m in merges)))}
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [t.replace("\u2581", " ") if t.strip("\u2581") == "" else t for t in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [rank.get(token, -1e6) for token in tokens],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.unknown_token_id": IDS["unk_id"],
    }
    scored = read_tokenizer(keys, len(tokens))
    assert scored is not None
    for text in ("Why is the sky blue?", "def add(a, b):\n    return a + b\n", "Größe \t x", ""):
        assert scored.encode(text) == tokenizer.encode(text)
    with pytest.raises(UnsupportedError, match="add_space_prefix is not false"):
        read_tokenizer({**keys, "tokenizer.ggml.add_space_prefix": True}, len(tokens))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.model is 'bert'"):
        read_tokenizer({**keys, "tokenizer.ggml.model": "bert"}, len(tokens))
    with pytest.raises(ModelFormatError, match="scores: 2 entries, expected"):
        read_tokenizer({**keys, "tokenizer.ggml.scores": [0.0, 1.0]}, len(tokens))


def test_callers_mistakes(parts: Any, tokenizer: Tokenizer) -> None:
    """ValueError or TypeError that name the value; nothing is replaced in silence."""
    with pytest.raises(ValueError, match="lone surrogate at character 3"):
        tokenizer.encode("the\udcff")
    with pytest.raises(TypeError, match="text must be a str, not bytes"):
        tokenizer.encode(b"the")  # type: ignore[arg-type]
    for id_ in (-1, tokenizer.n_vocab):
        with pytest.raises(ValueError, match=f"token id {id_} is not in"):
            tokenizer.decode([id_])
        with pytest.raises(ValueError, match=f"token id {id_} is not in"):
            tokenizer.piece(id_)
    without = Tokenizer.from_gguf(*parts, **{**IDS, "bos_id": None})
    with pytest.raises(ValueError, match="no bos token"):
        without.encode("the", add_bos=True)
    with pytest.raises(TypeError, match="from_gguf"):
        Tokenizer()
