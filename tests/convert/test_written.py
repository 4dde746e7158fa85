"""What a converted file holds, against the dialect, the checkpoint, and gguf's own rounding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoint
from checkpoint_names import checkpoint_names
from convert_files import Weights, read_keys, read_tensors
from safetensors.numpy import load_file

from pydiffgguf.convert import convert
from pydiffgguf.convert.recipes import RECIPES, TypeRules
from pydiffgguf.convert.source.checkpoint import Checkpoint, CheckpointTensor, wanted_tensors
from pydiffgguf.convert.source.config import parse_config
from pydiffgguf.convert.writing import plan_tensors

# The dialect's keys with their types and the values that the default tiny checkpoint must give; written out here, so
# that a slip in the converter's own table is seen.
MODEL_KEYS: dict[str, tuple[str, Any]] = {
    "general.architecture": ("STRING", "diffusion-gemma"),
    "general.type": ("STRING", "model"),
    "general.name": ("STRING", "tiny"),
    "general.size_label": ("STRING", "8x804K"),
    "general.file_type": ("UINT32", 0),
    "general.quantization_version": ("UINT32", 2),
    "diffusion-gemma.block_count": ("UINT32", 6),
    "diffusion-gemma.context_length": ("UINT32", 4096),
    "diffusion-gemma.embedding_length": ("UINT32", 128),
    "diffusion-gemma.feed_forward_length": ("UINT32", 96),
    "diffusion-gemma.attention.head_count": ("UINT32", 4),
    "diffusion-gemma.attention.head_count_kv": ("ARRAY INT32", [2, 2, 2, 2, 2, 1]),
    "diffusion-gemma.attention.key_length": ("UINT32", 64),
    "diffusion-gemma.attention.value_length": ("UINT32", 64),
    "diffusion-gemma.attention.key_length_swa": ("UINT32", 32),
    "diffusion-gemma.attention.value_length_swa": ("UINT32", 32),
    "diffusion-gemma.attention.sliding_window": ("UINT32", 16),
    "diffusion-gemma.attention.sliding_window_pattern": ("ARRAY BOOL", [True] * 5 + [False]),
    "diffusion-gemma.attention.shared_kv_layers": ("UINT32", 0),
    "diffusion-gemma.embedding_length_per_layer_input": ("UINT32", 0),
    "diffusion-gemma.attention.layer_norm_rms_epsilon": ("FLOAT32", 1e-6),
    "diffusion-gemma.attention.causal": ("BOOL", False),
    "diffusion-gemma.rope.freq_base": ("FLOAT32", 1e6),
    "diffusion-gemma.rope.freq_base_swa": ("FLOAT32", 1e4),
    "diffusion-gemma.rope.dimension_count": ("UINT32", 64),
    "diffusion-gemma.rope.dimension_count_swa": ("UINT32", 32),
    "diffusion-gemma.expert_count": ("UINT32", 8),
    "diffusion-gemma.expert_used_count": ("UINT32", 2),
    "diffusion-gemma.expert_feed_forward_length": ("UINT32", 64),
    "diffusion-gemma.final_logit_softcapping": ("FLOAT32", 30.0),
    "diffusion.canvas_length": ("UINT32", 64),
}
SAMPLER = {
    "diffusion.eb_max_steps": ("UINT32", 24),
    "diffusion.eb_stability_threshold": ("UINT32", 2),
    "diffusion.eb_t_min": ("FLOAT32", 0.3),
    "diffusion.eb_t_max": ("FLOAT32", 0.9),
    "diffusion.eb_entropy_bound": ("FLOAT32", 0.25),
    "diffusion.eb_confidence_threshold": ("FLOAT32", 0.01),
}
TOKENIZER_TYPES = {
    "tokenizer.ggml.model": "STRING",
    "tokenizer.ggml.tokens": "ARRAY STRING",
    "tokenizer.ggml.scores": "ARRAY FLOAT32",
    "tokenizer.ggml.token_type": "ARRAY INT32",
    "tokenizer.ggml.merges": "ARRAY STRING",
    "tokenizer.ggml.bos_token_id": "UINT32",
    "tokenizer.ggml.eos_token_id": "UINT32",
    "tokenizer.ggml.unknown_token_id": "UINT32",
    "tokenizer.ggml.padding_token_id": "UINT32",
    "tokenizer.ggml.mask_token_id": "UINT32",
    "tokenizer.ggml.add_bos_token": "BOOL",
    "tokenizer.ggml.add_space_prefix": "BOOL",
    "tokenizer.chat_template": "STRING",
}

ALWAYS_F32 = re.compile(r"norm|ffn_gate_inp|\.scale$|rope_freqs|output_scale")


def expected_sources(n_layers: int = 6, full: tuple[int, ...] = (5,)) -> dict[str, str]:
    """GGUF name -> checkpoint name of every tensor that is read."""
    return checkpoint_names(["full_attention" if i in full else "sliding_attention" for i in range(n_layers)])


def test_keys_and_their_types_are_the_dialects(source: Path, tmp_path: Path) -> None:
    """Every key of the dialect, with its type and the checkpoint's value, and no other key."""
    convert(source, tmp_path / "x.gguf", type="f32")
    keys = read_keys(tmp_path / "x.gguf")
    expected = MODEL_KEYS | SAMPLER
    assert {k: v[0] for k, v in keys.items()} == {k: v[0] for k, v in expected.items()} | TOKENIZER_TYPES
    for key, (kind, value) in expected.items():
        assert keys[key][1] == (np.float32(value) if kind == "FLOAT32" else value), key


@pytest.mark.parametrize(("kind", "file_type"), [("f32", 0), ("f16", 1), ("q8_0", 7), ("bf16", 32)])
def test_the_file_type_names_the_big_tensors_type(source: Path, tmp_path: Path, kind: str, file_type: int) -> None:
    """general.file_type by llama.cpp's numbers; big tensors have the type, small ones and the router stay F32."""
    report = convert(source, tmp_path / "x.gguf", type=kind)
    assert read_keys(tmp_path / "x.gguf")["general.file_type"] == ("UINT32", file_type)
    tensors = read_tensors(tmp_path / "x.gguf")
    for name, tensor in tensors.items():
        assert tensor.tensor_type.name == ("F32" if ALWAYS_F32.search(name) else kind.upper()), name
    assert (report.n_tensors, report.n_bytes) == (len(tensors), (tmp_path / "x.gguf").stat().st_size)
    assert sum(report.types.values()) == report.n_tensors


def test_f32_tensors_are_the_checkpoints_values(source: Path, weights: Weights, tmp_path: Path) -> None:
    """Every tensor bit for bit, shapes as they are, nothing permuted; rope_freqs is the only one computed."""
    convert(source, tmp_path / "x.gguf", type="f32")
    tensors = read_tensors(tmp_path / "x.gguf")
    sources = expected_sources()
    assert set(tensors) == {*sources, "rope_freqs.weight"}
    for name, source_name in sources.items():
        assert tuple(tensors[name].shape) == tuple(reversed(weights[source_name].shape)), name
        np.testing.assert_array_equal(tensors[name].data, weights[source_name], err_msg=name)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_rounded_tensors_are_the_known_rounding(source: Path, weights: Weights, tmp_path: Path, kind: str) -> None:
    """As gguf's reference rounds the whole tensor at once."""
    convert(source, tmp_path / "x.gguf", type=kind)
    tensors = read_tensors(tmp_path / "x.gguf")
    rounded = 0
    for name, source_name in expected_sources().items():
        value = expected = weights[source_name]
        if not ALWAYS_F32.search(name):
            type_ = gguf.GGMLQuantizationType[kind.upper()]
            expected = gguf.dequantize(gguf.quantize(value, type_), type_)
        got = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        np.testing.assert_array_equal(got, expected, err_msg=name)
        rounded += not np.array_equal(expected, value)
    assert rounded == 57


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    """BF16 and F16 weights widen to F32 without loss."""
    tiny_checkpoint.make_checkpoint(tmp_path / "src", dtype=dtype, num_hidden_layers=2)
    convert(tmp_path / "src", tmp_path / "x.gguf", type="f32", allow_missing_tokenizer=True)
    tiny_checkpoint.make_checkpoint(tmp_path / "float32", num_hidden_layers=2)
    weights = load_file(tmp_path / "float32" / "model.safetensors")
    tensors = read_tensors(tmp_path / "x.gguf")
    for name, source_name in expected_sources(2, (1,)).items():
        bits = tiny_checkpoint.rounded(weights[source_name], dtype)
        expected = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits.astype(np.float32)
        np.testing.assert_array_equal(tensors[name].data, expected, err_msg=name)


def test_rows_that_do_not_divide_fall_back_and_are_listed(tmp_path: Path) -> None:
    """Q8_0 has blocks of 32: other rows become F16, and the report says which; the vocabulary may be any number."""
    tiny_checkpoint.make_checkpoint(
        tmp_path / "src", num_hidden_layers=1, vocab_size=509, intermediate_size=88, moe_intermediate_size=40
    )
    report = convert(tmp_path / "src", tmp_path / "x.gguf", type="q8_0", allow_missing_tokenizer=True)
    tensors = read_tensors(tmp_path / "x.gguf")
    expected = {"self_cond_down.weight", "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"}
    assert {name for name, t in tensors.items() if t.tensor_type.name == "F16"} == expected
    assert {(f.tensor, f.row, f.wanted, f.written) for f in report.fallbacks} == {
        ("self_cond_down.weight", 88, "Q8_0", "F16"),
        ("blk.0.ffn_down.weight", 88, "Q8_0", "F16"),
        ("blk.0.ffn_down_exps.weight", 40, "Q8_0", "F16"),
    }
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"


def test_the_released_shape_gives_the_published_count_and_sizes() -> None:
    """The 26B model's figures give 692 tensors, and 50.5 GB in BF16, 26.9 GB in Q8_0, as published."""
    config = parse_config(
        {
            "model_type": "diffusion_gemma",
            "canvas_length": 256,
            "text_config": {
                "vocab_size": 262144,
                "hidden_size": 2816,
                "intermediate_size": 2112,
                "num_hidden_layers": 30,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "num_global_key_value_heads": 2,
                "num_experts": 128,
                "top_k_experts": 8,
                "moe_intermediate_size": 704,
                "sliding_window": 1024,
            },
        },
        "config.json",
    )
    assert [i for i, layer in enumerate(config.layers) if not layer.sliding] == [5, 11, 17, 23, 29]
    assert (config.rotating_pairs, config.full.head_dim) == (64, 512)

    class Shapes(Checkpoint):
        def __init__(self) -> None:
            self.config = config
            self.tensors = [CheckpointTensor(name, rule, shape, "") for name, rule, shape, _ in wanted_tensors(config)]

    sizes = {}
    for kind in ("bf16", "q8_0"):
        shapes = Shapes()
        plan, fallbacks = plan_tensors(shapes, TypeRules(RECIPES[kind], shapes.facts()))
        assert len(plan) == 692
        assert not fallbacks
        sizes[kind] = sum(p.n_bytes for p in plan) / 1e9
    assert sizes["bf16"] == pytest.approx(50.5, abs=0.05)
    assert sizes["q8_0"] == pytest.approx(26.9, abs=0.05)


def test_the_engines_names_are_the_converters() -> None:
    """csrc/file/names.h and convert/names.py hold the same tensors, and no key that the other does not know."""
    from pydiffgguf.convert import names

    text = (Path(__file__).parents[2] / "csrc" / "file" / "names.h").read_text(encoding="utf-8")
    engine = dict(re.findall(r'constexpr const char \*(\w+) = "([^"]+)";', text))
    assert engine.pop("ARCHITECTURE") == names.ARCHITECTURE
    keys = {value for name, value in engine.items() if name.startswith("KEY_")}
    assert keys <= {*names.KEYS, *names.SPLIT_KEYS, *names.ADAPTER_KEYS}
    written = {t.name for t in names.GLOBAL_TENSORS + names.LAYER_TENSORS}
    foreign = {t.name for t in names.FOREIGN_GLOBAL_TENSORS + names.FOREIGN_LAYER_TENSORS}
    assert set(engine.values()) - keys == written | foreign
