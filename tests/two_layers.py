"""A random model of two layers, for tests of what lies where: large enough for every quantized type, quick to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import shapes


def write(path: Path, type: str = "q8_0", tensor_types: Sequence[str] = (), **figures: int) -> None:
    """A sliding and a full layer with 8 experts, rows of 256, a vocabulary of 4,096 and canvases of 64; `figures`, in
    transformers' words, go before these. The rest is as in shapes.write."""
    small: dict[str, Any] = dict(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        num_experts=8,
        moe_intermediate_size=256,
        canvas_length=64,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "two layers", shapes.SHAPES["724m"] | small | figures)
        shapes.write(path, "two layers", type=type, tensor_types=tensor_types)
