"""benchmarks/shapes.py: random GGUF files that the engine opens, in every type, with weights of the size they claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import shapes

from pydiffgguf import DiffusionModel
from pydiffgguf.convert import inspect_file

#: A shape whose rows divide into blocks of 256, but for those of the experts' down projection.
SMALL: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=256,
    layer_types=["sliding_attention", "full_attention"],
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_global_key_value_heads=1,
    global_head_dim=128,
    sliding_window=16,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=96,
    canvas_length=16,
    max_position_embeddings=256,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)


@pytest.mark.parametrize("kind", shapes.TYPES)
def test_every_type_opens_and_has_weights_of_the_right_size(tmp_path: Path, kind: str) -> None:
    """Mean zero and the wanted deviation, in every matrix; finite logits that differ from row to row."""
    path = tmp_path / "small.gguf"
    assert shapes.write(path, "small", type=kind) == path.stat().st_size
    assert not [f for f in inspect_file(path).findings if f.level == "error"]
    deviations = {tensor.name: shapes.deviation(tensor) for tensor in shapes.tensors(shapes.shape("small"))}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            wanted = deviations[tensor.name]
            # 2,048 blocks fix the deviation of a type to a percent, a matrix of some thousand entries to a few; coarse
            # types have a mean half a quant away from zero.
            assert abs(values.std() / wanted - 1) < 0.1, tensor.name
            assert abs(values.mean()) < 0.2 * wanted, tensor.name
    with DiffusionModel(path, n_threads=1) as model, model.session() as session:
        session.encode(np.arange(20))
        z = session.denoise(np.arange(16))
        assert np.isfinite(z).all() and 0.5 < z.std() < 25
        assert len({int(i) for i in z.argmax(-1)}) > 4


def test_types_by_tensor_and_rows_that_do_not_divide(tmp_path: Path) -> None:
    """The first pattern that matches; rows of 96 have no blocks of 256 and get what llama.cpp would give them; norms
    and the router stay F32."""
    path = tmp_path / "mixed.gguf"
    shapes.write(path, "small", type="q4_k", tensor_types=["attn_v=q6_k", r"blk\.1\.attn_=q5_k"])
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_v.weight"] == "Q6_K" and types["blk.1.attn_q.weight"] == "Q5_K"
    assert types["blk.0.attn_k.weight"] == types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.ffn_down_exps.weight"] == "Q5_0"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.attn_norm.weight"] == "F32"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        shapes.write(path, "small", seed=seed)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_the_two_shapes_are_those_that_are_spoken_of() -> None:
    """723.5 million parameters, and 25.25 billion of the released checkpoint."""
    assert shapes.count_parameters(shapes.shape("724m")) == pytest.approx(723.5e6, rel=1e-4)
    assert shapes.count_parameters(shapes.shape("26b-a4b")) == pytest.approx(25.25e9, rel=1e-4)


def test_unknown_names_come_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of 724m"):
        shapes.write(tmp_path / "x.gguf", "7b")
    with pytest.raises(ValueError, match=r"q9_9.*expected one of f32"):
        shapes.write(tmp_path / "x.gguf", "small", type="q9_9")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected PATTERN=TYPE"):
        shapes.write(tmp_path / "x.gguf", "small", tensor_types=["attn_v"])
