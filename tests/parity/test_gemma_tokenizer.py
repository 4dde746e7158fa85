"""The tokenizer against transformers' own Gemma tokenizer, built from the same vocabulary and merges."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabulary import CONTROL, HOSTILE, IDS, MARKUP, USER_DEFINED, small_vocabulary
from tokenizers import AddedToken
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

from pydiffgguf.text.tokenizer import Tokenizer

pytestmark = pytest.mark.parity


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(*small_vocabulary(), **IDS)


@pytest.fixture(scope="session")
def reference() -> Any:
    """transformers' GemmaTokenizer over the same vocabulary."""
    tokens, _, merges = small_vocabulary()
    reference = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        additional_special_tokens=[*CONTROL[5:], *MARKUP],
    )
    reference.add_tokens([AddedToken(text, normalized=False) for text in USER_DEFINED])
    return reference


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_ids_equal_the_reference(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """Specials in the text are matched as in transformers, and everything else merges to the same ids."""
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_bos=True) == [2, *tokenizer.encode(text)]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_ids_without_specials_equal_the_reference(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """special=False is transformers' split_special_tokens: no id of a special token can come out."""
    ids = tokenizer.encode(text, special=False)
    assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not tokenizer.special_ids.intersection(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_gives_the_reference_ids(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    """Also for texts that nobody thought of."""
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
