"""Merges that follow from scores, as transformers' converter derives them."""

from __future__ import annotations

import random

import pytest
from transformers.convert_slow_tokenizer import generate_merges

from pydiffgguf.text.tokenizer import merges_of_scores

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("tied", [False, True])
def test_scores_give_the_merges_of_transformers(tied: bool) -> None:
    """In the same order; also where several tokens have one score."""
    rng = random.Random(3)
    texts = {"".join(rng.choices("ab▁", k=rng.randint(1, 5))) for _ in range(300)}
    vocab = {text: i for i, text in enumerate(rng.sample(sorted(texts), len(texts)))}
    scores = [float(-(i // 7) if tied else -i) for i in range(len(vocab))]
    rng.shuffle(scores)
    expected = generate_merges(vocab, {text: scores[i] for text, i in vocab.items()})
    assert len(expected) > 200
    assert merges_of_scores(vocab, [], scores) == expected
