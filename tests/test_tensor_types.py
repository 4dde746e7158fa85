"""Every type that ggml can dequantize, in every tensor that it fits: what a file of it computes is what the same
numbers in float32 compute.

The blocks are random (benchmarks/shapes.py), so that every bit of a type's layout plays a part. All experts are used:
otherwise a rounded router's choice would decide the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf_rewrite import Raw, rewrite
from shapes import BLOCKS, ODD_SCALES, set_scales, unit_blocks, unit_deviation
from tiny_checkpoint import make_checkpoint

from pydiffgguf import DiffusionModel, UnsupportedError
from pydiffgguf.convert import convert

Values = npt.NDArray[np.float32]

CANVAS = 32

# Types that gguf-py does not dequantize: number, values a block, how many values a byte, what the lowest quant stands
# for and the step, in units of the float16 scale that a block begins with.
SMALL = {"Q1_0": (41, 128, 8, -1, 2), "Q2_0": (42, 64, 4, -1, 1)}

# Types of which ggml has no numbers that a matrix could be multiplied with.
UNREADABLE = [T.I8, T.I16, T.I32, T.I64, T.F64, T.Q8_1, T.Q8_K]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 model with rows of 256 in nearly every tensor."""
    folder = tmp_path_factory.mktemp("wide")
    make_checkpoint(
        folder / "checkpoint",
        seed=5,
        sc_scale=0.3,
        vocab_size=320,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        global_head_dim=256,
        num_global_key_value_heads=1,
        num_experts=4,
        top_k_experts=4,
        moe_intermediate_size=256,
        sliding_window=24,
        canvas_length=CANVAS,
    )
    convert(folder / "checkpoint", folder / "wide.gguf", type="f32", allow_missing_tokenizer=True)
    return folder / "wide.gguf"


def logits(path: Path) -> Values:
    """After a prompt of 40 tokens, with self-conditioning."""
    rng = np.random.default_rng(1)
    with DiffusionModel(path, type_kv="f32", n_ctx=128, n_threads=1) as model:
        session = model.session()
        session.encode(rng.integers(320, size=40, dtype=np.int32))
        conditioning = rng.standard_normal((CANVAS, 320), np.float32) * 5
        return session.denoise(rng.integers(320, size=CANVAS, dtype=np.int32), conditioning)


def error(got: Values, expected: Values) -> float:
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def in_type(name: str, like: Values, rng: np.random.Generator) -> tuple[Raw, Values] | None:
    """(a tensor of the type called `name`, the numbers that it stands for), of the shape and deviation of `like`; None
    where the rows do not divide into blocks."""
    row = like.shape[-1]
    if name in ("F16", "BF16"):
        data = gguf.quants.quantize(like, T[name])
        raw = data.view(np.uint8) if name == "F16" else data
        return Raw(raw, T[name], row), gguf.quants.dequantize(data, T[name]).astype(np.float32)
    if name in SMALL:
        number, block, per_byte, lowest, step = SMALL[name]
        if row % block:
            return None
        blocks = rng.integers(0, 256, (like.size // block, 18), np.uint8)
        scales = np.full(len(blocks), like.std(), "<f2")
        blocks[:, :2] = scales[:, None].view(np.uint8)
        bits = 8 // per_byte
        quants = (blocks[:, 2:, None] >> (np.arange(per_byte) * bits) & (2**bits - 1)).astype(np.float32)
        values = (quants.reshape(len(blocks), block) * step + lowest) * scales[:, None].astype(np.float32)
    else:
        number, (block, _) = T[name], GGML_QUANT_SIZES[T[name]]
        if row % block:
            return None
        blocks = unit_blocks(rng, T[name], like.size // block)
        scale = like.std() / unit_deviation(T[name]) * rng.uniform(0.8, 1.2, len(blocks))
        set_scales(blocks, T[name], scale.astype(np.float32))
        values = gguf.quants.dequantize(blocks, T[name])
    return Raw(blocks.reshape(*like.shape[:-1], -1), number, row), values.reshape(like.shape).astype(np.float32)


def compare(wide: Path, folder: Path, name: str, chosen: Callable[[str, Values], bool]) -> tuple[int, float]:
    """Puts the chosen tensors, where they fit, into the type: (how many, the logits' error against their numbers in
    float32)."""
    rng = np.random.default_rng(7)
    raw: dict[str, Raw] = {}
    numbers: dict[str, Values] = {}
    for tensor in gguf.GGUFReader(wide).tensors:
        values = np.array(tensor.data, np.float32)
        made = in_type(name, values, rng) if chosen(tensor.name, values) else None
        if made is not None:
            raw[tensor.name], numbers[tensor.name] = made
    rewrite(wide, folder / "typed.gguf", tensors=raw)
    rewrite(wide, folder / "numbers.gguf", tensors=numbers)
    return len(raw), error(logits(folder / "typed.gguf"), logits(folder / "numbers.gguf"))


ALL = ["F16", "BF16", *(kind.name for kind in (*BLOCKS, *ODD_SCALES)), *SMALL]


def test_the_list_of_types_is_ggmls() -> None:
    """No type that gguf-py knows is left out."""
    assert {kind.name for kind in T} - {"F32"} == {*ALL, *(kind.name for kind in UNREADABLE)} - {"Q2_0"}


@pytest.mark.parametrize("name", ALL)
def test_matrices_of_every_type_compute_what_their_numbers_do(wide: Path, tmp_path: Path, name: str) -> None:
    """Attention, FFN, experts, embedding and self-conditioning at once. ggml rounds the other factor to 8 bits, or to
    the float type: measured 0.0004 to 0.034 for the quantized types, 0.006 for BF16, 0.0007 for F16. Numbers
    that were misread would have nothing in common with the right ones, and an error of the order of 1."""
    n, got = compare(wide, tmp_path, name, lambda tensor, values: values.ndim > 1 and "ffn_gate_inp" not in tensor)
    assert n == 2 * 9 - 1 + 4
    assert got < 0.05


@pytest.mark.parametrize("name", ALL)
def test_norms_and_routers_of_every_type_are_made_float32(wide: Path, tmp_path: Path, name: str) -> None:
    """They are small: their numbers are the same bits from then on. The factors of experts and of layers have rows that
    only the float types fit; rotary factors must be positive, and reach 1e30."""
    n, got = compare(
        wide,
        tmp_path,
        name,
        lambda tensor, values: (
            (values.ndim == 1 or "ffn_gate_inp" in tensor) and (name == "BF16" or tensor != "rope_freqs.weight")
        ),
    )
    assert n == {"F16": 2 * 14 + 2, "BF16": 2 * 14 + 3}.get(name, 2 * 11 + 2)
    assert got == 0


@pytest.mark.parametrize("kind", UNREADABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tensor", ["blk.1.ffn_up.weight", "blk.0.attn_norm.weight"])
def test_a_type_without_numbers_is_refused_by_name(wide: Path, tmp_path: Path, kind: T, tensor: str) -> None:
    """Integers, doubles, and the types of intermediate results: ggml has no float32 for them."""
    block, size = (32, 36) if kind == T.Q8_1 else GGML_QUANT_SIZES[kind]  # gguf-py takes Q8_1's two halves for floats
    shape = (256, 256 // block * size) if "ffn" in tensor else (256 // block * size,)
    rewrite(wide, tmp_path / "x.gguf", tensors={tensor: Raw(np.zeros(shape, np.uint8), kind, 256)})
    with pytest.raises(UnsupportedError, match=f"(?i)tensor {tensor} has type {kind.name}"):
        DiffusionModel(tmp_path / "x.gguf")


def test_factors_beside_a_tensor_are_refused(wide: Path, tmp_path: Path) -> None:
    """`blk.0.attn_q.scale` of a converter that keeps a tensor's factor apart: without it the numbers are wrong."""
    rewrite(wide, tmp_path / "x.gguf", tensors={"blk.0.attn_q.scale": np.ones(1, np.float32)})
    with pytest.raises(UnsupportedError, match=r"tensor blk\.0\.attn_q\.scale is present"):
        DiffusionModel(tmp_path / "x.gguf")
