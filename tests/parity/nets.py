"""Random nets of awkward shapes, each as a transformers model and as GGUF files converted from its checkpoint.

Every shape that a kernel could round up or a loop could assume is wrong somewhere here: vocabularies and rows that are
no multiple of 32 or 256, full layers in odd places and two in a row, one KV head, top-k 1 to 3, windows smaller than
the prompt, canvases from 24 to 256. Weights are drawn by tests/tiny_checkpoint.py: norms away from 1, the two modes'
layer scalars far apart, query and key norms near 0.35.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from reference import Ids, Model, load_reference
from tiny_checkpoint import make_checkpoint

from pydiffgguf.convert import convert

Report = Callable[[str], None]
"""The type of the fixture `report`: takes a line with a measured figure."""

S, F = "sliding_attention", "full_attention"

# keyword arguments of make_checkpoint
SHAPES: dict[str, dict[str, Any]] = {
    # no row is a multiple of 32; two full layers in a row; one KV head on every layer; one expert a token
    "one_kv_head": dict(
        vocab_size=301,
        hidden_size=100,
        intermediate_size=72,
        layer_types=[S, F, F, S, F],
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        global_head_dim=40,
        num_global_key_value_heads=1,
        num_experts=5,
        top_k_experts=1,
        moe_intermediate_size=36,
        sliding_window=8,
        canvas_length=24,
    ),
    # begins and ends with full layers; three experts a token; full layers keep two KV heads
    "full_first": dict(
        vocab_size=1000,
        hidden_size=160,
        intermediate_size=200,
        layer_types=[F, S, S, F, S, F],
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        global_head_dim=48,
        num_global_key_value_heads=2,
        num_experts=7,
        top_k_experts=3,
        moe_intermediate_size=56,
        sliding_window=33,
        canvas_length=100,
    ),
    # the longest canvas, far longer than the window; more KV heads than the full layers have
    "long_canvas": dict(
        vocab_size=777,
        hidden_size=96,
        intermediate_size=144,
        layer_types=[F, F, S, S, S, F],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=20,
        global_head_dim=36,
        num_global_key_value_heads=1,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=48,
        sliding_window=5,
        canvas_length=256,
    ),
    # rows that divide by 32 but not by 256; sixteen experts, three of them used; a vocabulary one past a power of two
    "many_experts": dict(
        vocab_size=2049,
        hidden_size=64,
        intermediate_size=96,
        layer_types=[S, S, S, S, S, F, F],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=2,
        num_experts=16,
        top_k_experts=3,
        moe_intermediate_size=32,
        sliding_window=16,
        canvas_length=64,
    ),
    # alternating layers; a vocabulary below 256; a window that only just covers a short prompt
    "alternating": dict(
        vocab_size=131,
        hidden_size=72,
        intermediate_size=104,
        layer_types=[S, F, S, F, S, F],
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=28,
        global_head_dim=52,
        num_global_key_value_heads=1,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=40,
        sliding_window=21,
        canvas_length=40,
    ),
    # the released head sizes, where the rotary angles of far positions show every rounding
    "released_heads": dict(
        vocab_size=515,
        hidden_size=128,
        intermediate_size=96,
        layer_types=[S, S, F, S, F],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=1,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=64,
        sliding_window=300,
        canvas_length=32,
    ),
}


@dataclass(frozen=True)
class Net:
    """One random net: the transformers model (float32), its checkpoint folder, and its figures."""

    name: str
    model: Model
    checkpoint: Path

    @property
    def canvas_length(self) -> int:
        return int(self.model.config.canvas_length)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.text_config.vocab_size)

    @property
    def window(self) -> int:
        return int(self.model.config.text_config.sliding_window)

    def gguf(self, kind: str = "f32") -> Path:
        """The checkpoint converted to a GGUF file of that type, made on first use."""
        path = self.checkpoint.with_suffix(f".{kind}.gguf")
        if not path.exists():
            convert(self.checkpoint, path, type=kind, allow_missing_tokenizer=True)
        return path

    def ids(self, seed: int, n: int) -> Ids:
        """n token ids, uniform over the vocabulary: a prompt or a canvas."""
        return np.random.default_rng([seed, n]).integers(self.vocab_size, size=n, dtype=np.int32)


def make_net(name: str, folder: Path, *, sc_scale: float = 1.0, seed: int = 0, sharpen: float = 1.0) -> Net:
    """Builds the net SHAPES[name] in `folder`.

    sc_scale scales self_conditioning.down_proj: at 0.3 a random net stops doubling its rounding errors at every
    denoise step. `sharpen` scales the embedding, and with it the logits: a net of factor 1 has an entropy near 4 nats
    on every row and never accepts more than one.
    """
    checkpoint = folder / name
    shape = SHAPES[name]
    make_checkpoint(
        checkpoint,
        seed=seed,
        sc_scale=sc_scale,
        sharpen=sharpen,
        num_hidden_layers=len(shape["layer_types"]),
        **shape,
    )
    model = load_reference(checkpoint)
    return Net(name, model, checkpoint)


def relative_error(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """norm(a - b) / norm(b), summed in float64."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(b.astype(np.float64)))
