"""The converter against the dialect, the checkpoint, gguf's and torch's own rounding, and everything that can fail."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig

from pydiffgguf.convert import ConvertProgress, convert
from pydiffgguf.convert.checkpoint import Checkpoint, SourceTensor, wanted_tensors
from pydiffgguf.convert.config import parse_config
from pydiffgguf.convert.hf_to_gguf import plan_tensors
from pydiffgguf.convert.quantize import RECIPES
from pydiffgguf.errors import ModelFormatError, UnsupportedError

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

# GGUF name -> checkpoint name under model.decoder.(layers.N.), from the dialect's page.
GLOBAL = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "self_cond_pre_norm.weight": "self_conditioning.pre_norm.weight",
    "self_cond_gate.weight": "self_conditioning.gate_proj.weight",
    "self_cond_up.weight": "self_conditioning.up_proj.weight",
    "self_cond_down.weight": "self_conditioning.down_proj.weight",
}
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "layer_output_scale.weight": "layer_scalar",
}
ALWAYS_F32 = re.compile(r"norm|ffn_gate_inp|\.scale$|rope_freqs|output_scale")

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny checkpoint, with a tokenizer. Tests that change it work on a copy."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    tiny_checkpoint.make_checkpoint(path, tokenizer=True)
    return path


@pytest.fixture(scope="module")
def weights(source: Path) -> Weights:
    return load_file(source / "model.safetensors")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may break; named alike, since the name goes into the file."""
    return Path(shutil.copytree(source, tmp_path / "copy" / "tiny"))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def read_keys(path: Path) -> dict[str, tuple[str, Any]]:
    """Key -> (type, value) by gguf's own reader."""
    fields = gguf.GGUFReader(path).fields
    return {
        name: (" ".join(t.name for t in field.types), field.contents())
        for name, field in fields.items()
        if not name.startswith("GGUF.")
    }


def read_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def expected_sources(n_layers: int = 6, full: tuple[int, ...] = (5,)) -> dict[str, str]:
    """GGUF name -> checkpoint name of every tensor that is read."""
    names = {name: f"model.decoder.{source}" for name, source in GLOBAL.items()}
    for i in range(n_layers):
        for name, source in LAYER.items():
            if not (i in full and name == "attn_v.weight"):
                names[f"blk.{i}.{name}"] = f"model.decoder.layers.{i}.{source}"
        names[f"blk.{i}.enc_layer_output_scale.weight"] = f"model.encoder.language_model.layers.{i}.layer_scalar"
    return names


# ------------------------------------------------------------------------------------------------ what is written


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
        np.testing.assert_array_equal(tensors[name].data, weights[source_name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_rounded_tensors_are_the_known_rounding(source: Path, weights: Weights, tmp_path: Path, kind: str) -> None:
    """F16 and BF16 as torch rounds them; Q8_0 as gguf's reference quantizes the whole tensor at once."""
    convert(source, tmp_path / "x.gguf", type=kind)
    tensors = read_tensors(tmp_path / "x.gguf")
    rounded = 0
    for name, source_name in expected_sources().items():
        value = weights[source_name]
        got = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        if ALWAYS_F32.search(name):
            expected = value.numpy()
        elif kind == "q8_0":
            expected = gguf.dequantize(
                gguf.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            )
        else:
            expected = value.to(torch.float16 if kind == "f16" else torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(got, expected, err_msg=name)
        rounded += not np.array_equal(expected, value.numpy())
    assert rounded == 57


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    """BF16 and F16 weights widen to F32 without loss."""
    model = tiny_checkpoint.make_checkpoint(tmp_path / "src", dtype=dtype, num_hidden_layers=2)
    convert(tmp_path / "src", tmp_path / "x.gguf", type="f32", allow_missing_tokenizer=True)
    state = model.state_dict()
    tensors = read_tensors(tmp_path / "x.gguf")
    for name, source_name in expected_sources(2, (1,)).items():
        np.testing.assert_array_equal(tensors[name].data, state[source_name].numpy(), err_msg=name)


def test_rope_freqs_give_the_references_frequencies(tmp_path: Path) -> None:
    """theta^(-2i/d) / rope_freqs is the reference's inv_freq on full layers, with its zeros for the resting pairs."""
    model = tiny_checkpoint.make_checkpoint(tmp_path / "src", num_hidden_layers=2, global_head_dim=40)
    convert(tmp_path / "src", tmp_path / "x.gguf", type="q8_0", allow_missing_tokenizer=True)
    freqs = read_tensors(tmp_path / "x.gguf")["rope_freqs.weight"].data
    expected = model.model.decoder.rotary_emb.full_attention_inv_freq.numpy()
    assert freqs.shape == (20,)
    assert set(freqs.tolist()) == {1.0, float(np.float32(1e30))}
    ours = 1e6 ** (-2.0 * np.arange(20) / 40) / freqs.astype(np.float64)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-29)


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
            self.tensors = [SourceTensor(name, rule, shape, "") for name, rule, shape, _ in wanted_tensors(config)]

    sizes = {}
    for kind in ("bf16", "q8_0"):
        plan, fallbacks = plan_tensors(Shapes(), RECIPES[kind])
        assert len(plan) == 692
        assert not fallbacks
        sizes[kind] = sum(p.n_bytes for p in plan) / 1e9
    assert sizes["bf16"] == pytest.approx(50.5, abs=0.05)
    assert sizes["q8_0"] == pytest.approx(26.9, abs=0.05)


def test_the_engines_names_are_the_converters() -> None:
    """csrc/names.h and convert/names.py hold the same tensors, and no key that the other does not know."""
    from pydiffgguf.convert import names

    text = (Path(__file__).parents[1] / "csrc" / "names.h").read_text(encoding="utf-8")
    engine = dict(re.findall(r'constexpr const char \*(\w+) = "([^"]+)";', text))
    assert engine.pop("ARCHITECTURE") == names.ARCHITECTURE
    keys = {value for name, value in engine.items() if name.startswith("KEY_")}
    assert keys <= set(names.KEYS)
    written = {t.name for t in names.GLOBAL_TENSORS + names.LAYER_TENSORS}
    foreign = {t.name for t in names.FOREIGN_GLOBAL_TENSORS + names.FOREIGN_LAYER_TENSORS}
    assert set(engine.values()) - keys == written | foreign


# ------------------------------------------------------------------------------------------------- many ways in


def test_two_runs_and_shards_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """Output depends on the weights alone: not on the run, nor on how the checkpoint is cut into files."""
    tiny_checkpoint.make_checkpoint(tmp_path / "sharded" / "tiny", tokenizer=True, sharded=True)
    assert len(list((tmp_path / "sharded" / "tiny").glob("model-*.safetensors"))) > 3
    for kind in ("f32", "q8_0"):
        outputs = []
        for i, path in enumerate([source, source, tmp_path / "sharded" / "tiny"]):
            convert(path, tmp_path / f"{i}.gguf", type=kind)
            outputs.append((tmp_path / f"{i}.gguf").read_bytes())
        assert outputs[0] == outputs[1] == outputs[2]


def test_both_spellings_of_the_config_give_the_same_bytes(source: Path, copy: Path, tmp_path: Path) -> None:
    """per_layer_config, and global_head_dim with num_global_key_value_heads; the former wins where both stand."""
    convert(source, tmp_path / "a.gguf", type="f32")

    def other_spelling(config: dict[str, Any]) -> None:
        assert config["text_config"].pop("per_layer_config") == {"5": {"head_dim": 64, "num_key_value_heads": 1}}
        config["text_config"] |= {"global_head_dim": 64, "num_global_key_value_heads": 1}

    edit_json(copy / "config.json", other_spelling)
    convert(copy, tmp_path / "b.gguf", type="f32")
    overrides = {"5": {"head_dim": 64, "num_key_value_heads": 1}}
    edit_json(
        copy / "config.json",
        lambda c: c["text_config"].update(per_layer_config=overrides, global_head_dim=8, num_global_key_value_heads=4),
    )
    convert(copy, tmp_path / "c.gguf", type="f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 8,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 123.0}
PARTIAL_ROPE = {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.3}


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"num_global_key_value_heads": 2},
        {"global_head_dim": 24},
        {"global_head_dim": 24, "num_global_key_value_heads": 1},
        {"per_layer_config": {}},
        {"per_layer_config": {}, "global_head_dim": 24, "num_global_key_value_heads": 1},
        {"per_layer_config": None, "global_head_dim": 24},
        {"per_layer_config": {"5": {"head_dim": 24}, "6": {"head_dim": 24}}},
        {"per_layer_config": {str(i): {"head_dim": 8, "num_key_value_heads": 2} for i in range(5)}},
        {"per_layer_config": {"5": {"head_dim": 16, "hidden_size": 32}}},
        {"layer_types": ["full_attention"] * 7},
        {"layer_types": ["full_attention", "sliding_attention"] * 3 + ["sliding_attention"], "global_head_dim": 32},
        {"layer_types": ["sliding_attention"] * 7},
        {"num_hidden_layers": 1},
        {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
        {"rope_parameters": {"full_attention": PARTIAL_ROPE, "sliding_attention": PLAIN_ROPE}},
        {"final_logit_softcapping": 12.5, "rms_norm_eps": 1e-5, "max_position_embeddings": 777},
    ],
)
def test_configs_are_resolved_as_the_reference_does(spelling: dict[str, Any]) -> None:
    """Layer types, head sizes, KV heads, frequencies and defaults are those of transformers' config and rope."""
    values: dict[str, Any] = json.loads(json.dumps(SHAPE | spelling))
    ours = parse_config({"model_type": "diffusion_gemma", "canvas_length": 8, "text_config": values}, "config.json")
    theirs = DiffusionGemmaTextConfig(**json.loads(json.dumps(values)))
    assert [s.sliding for s in ours.layers] == [t == "sliding_attention" for t in theirs.layer_types]
    for i, shape in enumerate(ours.layers):
        layer = theirs.per_layer_config[i]
        assert (shape.head_dim, shape.kv_heads) == (layer.head_dim, layer.num_key_value_heads), i
    assert ours.softcap == theirs.final_logit_softcapping
    assert (ours.rms_eps, ours.context_length) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.rope_base == theirs.rope_parameters["full_attention"]["rope_theta"]
    if any(s.sliding for s in ours.layers):
        assert ours.rope_base_sliding == theirs.rope_parameters["sliding_attention"]["rope_theta"]

    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

    inv_freq = DiffusionGemmaTextRotaryEmbedding(theirs).full_attention_inv_freq
    assert (len(inv_freq), int((inv_freq > 0).sum())) == (ours.full.head_dim // 2, ours.rotating_pairs)


def test_a_bare_text_config_is_read_too(source: Path, copy: Path, tmp_path: Path) -> None:
    """The text part alone, with canvas_length beside, means the same model."""
    convert(source, tmp_path / "a.gguf", type="f32")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config["text_config"] | {"canvas_length": config["canvas_length"]}))
    convert(copy, tmp_path / "b.gguf", type="f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def rename(weights: Weights, rule: Callable[[str], list[str]]) -> Weights:
    return {new: tensor.clone() for name, tensor in weights.items() for new in rule(name)}


def tied_places(name: str) -> list[str]:
    """The decoder's name and the encoder's of a tied pair; names that are not tied alone."""
    tied = name.startswith("model.decoder.") and "self_conditioning" not in name and "layer_scalar" not in name
    other = name.replace("model.decoder.", "model.encoder.language_model.")
    head = ["lm_head.weight"] if name.endswith("embed_tokens.weight") else []
    return [name, other, *head] if tied else [name]


@pytest.mark.parametrize("place", ["encoder only", "head only", "copies"])
def test_any_name_of_a_tied_pair_will_do(
    source: Path, copy: Path, weights: Weights, tmp_path: Path, place: str
) -> None:
    """Whatever names a writer left, the result is the same, as it is for the reference's loader."""
    pick = {
        "encoder only": lambda name: tied_places(name)[1:2] or [name],
        "head only": lambda name: tied_places(name)[-1:] if "embed_tokens" in name else [name],
        "copies": tied_places,
    }[place]
    save_file(rename(weights, pick), copy / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "a.gguf", type="f32")
    convert(copy, tmp_path / "b.gguf", type="f32")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(copy)
    assert torch.equal(reference.lm_head.weight, weights["model.decoder.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.encoder.language_model.layers.3.mlp.up_proj.weight"])
def test_a_copy_that_differs_is_refused(copy: Path, weights: Weights, tmp_path: Path, name: str) -> None:
    """The reference unties such a pair; one stack of weights could not hold it."""
    changed = rename(weights, tied_places)
    changed[name][0, 0] += 1
    save_file(changed, copy / "model.safetensors")
    with pytest.raises(UnsupportedError, match=re.escape(f"'{name}' differs from")):
        convert(copy, tmp_path / "x.gguf")


# ------------------------------------------------------------------------------------------- sampler and tokenizer


def test_sampler_values_and_end_tokens_are_optional(source: Path, copy: Path, tmp_path: Path) -> None:
    """Without generation_config.json, or with nulls in it, the keys are left out; the report says so."""
    (copy / "generation_config.json").unlink()
    report = convert(copy, tmp_path / "x.gguf", type="f32")
    assert not any(k.startswith("diffusion.eb_") for k in read_keys(tmp_path / "x.gguf"))
    assert any("sampler" in note for note in report.notes)
    (copy / "generation_config.json").write_text('{"t_min": null, "t_max": 0.5, "stability_threshold": 0}')
    convert(copy, tmp_path / "x.gguf", type="f32")
    keys = read_keys(tmp_path / "x.gguf")
    assert {k: v for k, v in keys.items() if k.startswith("diffusion.eb_")} == {
        "diffusion.eb_t_max": ("FLOAT32", 0.5),
        "diffusion.eb_stability_threshold": ("UINT32", 0),
    }


@pytest.mark.parametrize(
    ("eos", "written"),
    [([1, 6, 7], None), ([7, 1, 6, 6], None), (1, [1]), ([1, 6, 20], [1, 6, 20]), (None, None), ([], None)],
)
def test_the_eos_list_is_written_where_it_differs_from_the_texts(
    copy: Path, tmp_path: Path, eos: object, written: list[int] | None
) -> None:
    """`<eos>`, `<turn|>` and `<|tool_response>` (1, 6, 7 here) are found by text; another list gets its key."""
    edit_json(copy / "generation_config.json", lambda c: c.update(eos_token_id=eos))
    convert(copy, tmp_path / "x.gguf", type="f32")
    assert read_keys(tmp_path / "x.gguf").get("diffusion.eos_token_ids") == (
        written and ("ARRAY UINT32", written)
    )  # fmt: skip


def test_the_vocabulary_arrives_whole(source: Path, tmp_path: Path) -> None:
    """Tokens by id, types by the GGUF convention, merges in order, special ids, and the template's text."""
    report = convert(source, tmp_path / "x.gguf", type="f32")
    keys = {name: value for name, (_, value) in read_keys(tmp_path / "x.gguf").items()}
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == 512
    assert {token: i for i, token in enumerate(tokens[: len(vocab)])} == vocab
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert set(keys["tokenizer.ggml.scores"]) == {-1000.0}
    types = keys["tokenizer.ggml.token_type"]
    specials = {token: types[vocab[token]] for token in tiny_checkpoint.SPECIAL_TOKENS}
    assert specials.pop("<unk>") == 2
    assert set(specials.values()) == {3}
    assert {types[vocab[t]] for t in tiny_checkpoint.PLAIN_ADDED_TOKENS} == {4}
    assert {types[vocab[f"<0x{b:02X}>"]] for b in range(256)} == {6}
    assert types[vocab["\u2581the\u2581"]] == 1
    assert set(types[len(vocab) :]) == {5}
    assert any(f"{512 - len(vocab)} of 512 ids" in note for note in report.notes)
    ids = {k: v for k, v in keys.items() if k.endswith("_token_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }
    assert keys["tokenizer.ggml.model"] == "gemma4"
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_space_prefix"]) == (True, False)
    assert keys["tokenizer.chat_template"] == tiny_checkpoint.CHAT_TEMPLATE


def test_merges_may_be_strings_or_pairs(source: Path, copy: Path, tmp_path: Path) -> None:
    """Older tokenizer.json files spell a merge "a b"."""

    def as_strings(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]

    edit_json(copy / "tokenizer.json", as_strings)
    for path, name in ((source, "a"), (copy, "b")):
        convert(path, tmp_path / name, type="f32")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_chat_template_may_stand_in_the_tokenizer_config(copy: Path, tmp_path: Path) -> None:
    """As a string or a list of named ones; chat_template.jinja wins; none at all is noted."""
    for template, expected in [
        ("from config", "from config"),
        ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        (None, None),
    ]:
        edit_json(copy / "tokenizer_config.json", lambda c, t=template: c.update(chat_template=t))
        convert(copy, tmp_path / "x.gguf", type="f32")
        assert read_keys(tmp_path / "x.gguf")["tokenizer.chat_template"][1] == tiny_checkpoint.CHAT_TEMPLATE
        (copy / "chat_template.jinja").rename(copy / "away")
        report = convert(copy, tmp_path / "x.gguf", type="f32")
        (copy / "away").rename(copy / "chat_template.jinja")
        got = read_keys(tmp_path / "x.gguf").get("tokenizer.chat_template")
        assert (got and got[1]) == expected
        assert any("chat template" in note for note in report.notes) == (expected is None)


def test_a_missing_tokenizer_is_an_error_unless_allowed(copy: Path, tmp_path: Path) -> None:
    """Allowed, the keys are left out, and the end tokens, which no text can tell, are written as ids."""
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelFormatError, match=r"no tokenizer\.json"):
        convert(copy, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    report = convert(copy, tmp_path / "x.gguf", type="f32", allow_missing_tokenizer=True)
    keys = read_keys(tmp_path / "x.gguf")
    assert not any(k.startswith("tokenizer.") for k in keys)
    assert keys["diffusion.eos_token_ids"] == ("ARRAY UINT32", [1, 6, 7])
    assert any("token ids" in note for note in report.notes)


TokenizerEdit = Callable[[dict[str, Any]], object]
FOREIGN_TOKENIZERS: dict[str, tuple[TokenizerEdit, type[Exception], str]] = {
    "another kind": (lambda t: t["model"].update(type="Unigram"), UnsupportedError, "BPE"),
    "no byte fallback": (lambda t: t["model"].update(byte_fallback=False), UnsupportedError, "byte_fallback"),
    "no normalizer": (lambda t: t.update(normalizer=None), UnsupportedError, "normalizer"),
    "two normalizers": (
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [t["normalizer"], {"type": "NFC"}]}),
        UnsupportedError,
        "normalizer",
    ),
    "byte level": (lambda t: t.update(pre_tokenizer={"type": "ByteLevel"}), UnsupportedError, "pre_tokenizer"),
    "id past the end": (lambda t: t["model"]["vocab"].update(zzz=512), ModelFormatError, "id 512"),
    "negative id": (lambda t: t["model"]["vocab"].update(zzz=-1), ModelFormatError, "id -1"),
    "two tokens, one id": (lambda t: t["model"]["vocab"].update(zzz=400), ModelFormatError, "id 400 stands for both"),
    "two ids, one token": (lambda t: t["added_tokens"][0].update(id=450), ModelFormatError, "'<pad>' has id 450"),
    "a byte missing": (lambda t: t["model"]["vocab"].pop("<0x41>"), ModelFormatError, "1 are missing"),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), ModelFormatError, "vocab"),
    "no merges": (lambda t: t["model"].pop("merges"), ModelFormatError, "merges"),
    "a merge of three": (lambda t: t["model"]["merges"].append(["a", "b", "c"]), ModelFormatError, "merge 78"),
    "a merge of nothing": (lambda t: t["model"]["merges"].append(["qq", "zz"]), ModelFormatError, "merge 78"),
    "a space in a merge": (lambda t: t["model"]["merges"].append(["a ", "b"]), UnsupportedError, "space"),
    "no bos": (
        lambda t: (t["model"]["vocab"].pop("<bos>"), t["added_tokens"].pop(2)),
        ModelFormatError,
        "'<bos>' is not in the vocabulary",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_TOKENIZERS)
def test_other_kinds_of_tokenizer_are_refused(copy: Path, tmp_path: Path, case: str) -> None:
    """What the keys cannot express is refused, since a reader would split text otherwise."""
    edit, error, text = FOREIGN_TOKENIZERS[case]
    edit_json(copy / "tokenizer.json", edit)
    with pytest.raises(error, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_gemmas_own_split_at_spaces_is_no_obstacle(copy: Path, tmp_path: Path) -> None:
    """Gemma's tokenizer.json splits at ' ' after all spaces were replaced, which splits nothing."""
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    edit_json(copy / "tokenizer.json", lambda t: t.update(pre_tokenizer=split))
    convert(copy, tmp_path / "x.gguf", type="f32")


# ------------------------------------------------------------------------------------------------- broken checkpoints

ConfigEdit = Callable[[dict[str, Any]], object]
BROKEN_CONFIGS: dict[str, tuple[ConfigEdit, type[Exception], str]] = {
    "no canvas": (lambda c: c.pop("canvas_length"), ModelFormatError, "'canvas_length' is missing"),
    "canvas 0": (lambda c: c.update(canvas_length=0), ModelFormatError, "'canvas_length'"),
    "another model": (lambda c: c.update(model_type="gemma3"), ModelFormatError, "got 'gemma3'"),
    "no hidden size": (lambda c: c["text_config"].pop("hidden_size"), ModelFormatError, "'text_config.hidden_size'"),
    "a string": (lambda c: c["text_config"].update(head_dim="32"), ModelFormatError, "'text_config.head_dim'"),
    "a boolean": (lambda c: c["text_config"].update(head_dim=True), ModelFormatError, "got True"),
    "too big": (lambda c: c["text_config"].update(vocab_size=2**40), ModelFormatError, "'text_config.vocab_size'"),
    "many layers": (lambda c: c["text_config"].update(num_hidden_layers=10**9), ModelFormatError, "num_hidden_layers"),
    "eps inf": (lambda c: c["text_config"].update(rms_norm_eps=float("inf")), ModelFormatError, "rms_norm_eps"),
    "eps huge": (lambda c: c["text_config"].update(rms_norm_eps=10**400), ModelFormatError, "rms_norm_eps"),
    "too many experts": (lambda c: c["text_config"].update(top_k_experts=9), ModelFormatError, "from 1 to 8, got 9"),
    "heads": (lambda c: c["text_config"].update(num_key_value_heads=3), ModelFormatError, "do not divide"),
    "odd head": (lambda c: c["text_config"].update(head_dim=31), ModelFormatError, "even"),
    "types too short": (lambda c: c["text_config"]["layer_types"].pop(), ModelFormatError, "list of 6"),
    "odd type": (
        lambda c: c["text_config"]["layer_types"].__setitem__(2, "linear_attention"),
        ModelFormatError,
        "layer 2",
    ),
    "layer index": (
        lambda c: c["text_config"]["per_layer_config"].update({"6": {}}),
        ModelFormatError,
        "'6' is not a layer index",
    ),
    "layer key": (
        lambda c: c["text_config"]["per_layer_config"].update({"5": {"intermediate_size": 7}}),
        UnsupportedError,
        "per_layer_config.5.intermediate_size",
    ),
    "full layers differ": (
        lambda c: c["text_config"].update(
            layer_types=["full_attention"] * 6,
            per_layer_config={"0": {"head_dim": 64}, "5": {"head_dim": 64, "num_key_value_heads": 1}},
        ),
        UnsupportedError,
        "full layers differ",
    ),
    "all": (lambda c: c["text_config"].update(use_bidirectional_attention="all"), UnsupportedError, "'all'"),
    "biases": (lambda c: c["text_config"].update(attention_bias=True), UnsupportedError, "attention_bias"),
    "untied": (lambda c: c.update(tie_word_embeddings=False), UnsupportedError, "tie_word_embeddings"),
    "text untied": (
        lambda c: c["text_config"].update(tie_word_embeddings=False),
        UnsupportedError,
        "text_config.tie_word_embeddings",
    ),
    "silu": (lambda c: c["text_config"].update(hidden_activation="silu"), UnsupportedError, "'silu'"),
    "no softcap": (lambda c: c["text_config"].update(final_logit_softcapping=None), UnsupportedError, "softcap"),
    "yarn": (
        lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(rope_type="yarn"),
        UnsupportedError,
        "'yarn'",
    ),
    "rope factor": (
        lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(factor=8.0),
        UnsupportedError,
        "factor 8.0",
    ),
    "rope gone": (
        lambda c: c["text_config"]["rope_parameters"].pop("sliding_attention"),
        ModelFormatError,
        "rope_parameters.sliding_attention",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_or_foreign_configs_say_which_key(copy: Path, tmp_path: Path, case: str) -> None:
    """One line, with the file, the key, and what was expected; nothing is written."""
    edit, error, text = BROKEN_CONFIGS[case]
    edit_json(copy / "config.json", edit)
    with pytest.raises(error, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        ({"t_min": "hot"}, ModelFormatError, "'t_min'"),
        ({"t_max": -1}, ModelFormatError, "'t_max'"),
        ({"max_denoising_steps": 0}, ModelFormatError, "'max_denoising_steps'"),
        ({"stability_threshold": 1.5}, ModelFormatError, "'stability_threshold'"),
        ({"sampler_config": {"_cls_name": "OtherSamplerConfig"}}, UnsupportedError, "OtherSamplerConfig"),
        ({"sampler_config": 3}, ModelFormatError, "'sampler_config'"),
        ({"eos_token_id": [1, 512]}, ModelFormatError, "'eos_token_id'"),
        ({"eos_token_id": "<eos>"}, ModelFormatError, "'eos_token_id'"),
    ],
)
def test_broken_generation_configs_say_which_key(
    copy: Path, tmp_path: Path, edit: dict[str, Any], error: type[Exception], text: str
) -> None:
    edit_json(copy / "generation_config.json", lambda c: c.update(edit))
    with pytest.raises(error, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_files_that_are_no_json_objects_are_named(copy: Path, tmp_path: Path, file: str, content: bytes) -> None:
    (copy / file).write_bytes(content)
    with pytest.raises(ModelFormatError, match=re.escape(str(copy / file))) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


NORM = "model.decoder.layers.2.input_layernorm.weight"
HeaderEdit = Callable[[dict[str, Any]], object]
BROKEN_HEADERS: dict[str, tuple[HeaderEdit, str]] = {
    "missing tensor": (lambda h: h.pop(NORM), f"'{NORM}' is missing"),
    "missing encoder scalar": (
        lambda h: h.pop("model.encoder.language_model.layers.0.layer_scalar"),
        "'model.encoder.language_model.layers.0.layer_scalar' is missing",
    ),
    "wrong dtype": (lambda h: h[NORM].update(dtype="I32"), "expected dtype F32, F16, BF16, got I32"),
    "wrong shape": (lambda h: h[NORM].update(shape=[2, 64]), "expected shape [128], got [2, 64]"),
    "short data": (lambda h: h[NORM].update(shape=[64]), "needs 256 bytes, got 512"),
    "past the end": (lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 512]), "cut short: tensor"),
    "backwards": (lambda h: h[NORM].update(data_offsets=[512, 0]), "broken header"),
    "no shape": (lambda h: h[NORM].pop("shape"), "broken header"),
    "odd shape": (lambda h: h[NORM].update(shape=[-128]), "broken header"),
    "no object": (lambda h: h.update({NORM: 3}), "broken header"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_safetensors_say_what_and_where(copy: Path, tmp_path: Path, case: str) -> None:
    edit, text = BROKEN_HEADERS[case]
    header, body = header_of(copy / "model.safetensors")
    edit(header)
    write_safetensors(copy / "model.safetensors", header, body)
    with pytest.raises(ModelFormatError, match=re.escape(text)) as caught:
        convert(copy, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("x.gguf*"))


def test_a_cut_safetensors_file_is_noticed_wherever_it_ends(copy: Path, tmp_path: Path) -> None:
    """Every one of 60 places, the header's included, is a ModelFormatError before anything is written."""
    file = copy / "model.safetensors"
    size = file.stat().st_size
    for cut in sorted({*range(0, 12), *np.linspace(12, size - 1, 48).astype(int).tolist()}, reverse=True):
        os.truncate(file, cut)
        with pytest.raises(ModelFormatError, match=r"cut short|not a safetensors file"):
            convert(copy, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "tiny"
    tiny_checkpoint.make_checkpoint(path, sharded=True, num_hidden_layers=2)
    return path


def test_a_missing_or_cut_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    """The message has the shard's name, and how much of the model is in it."""
    path = Path(shutil.copytree(sharded, tmp_path / "src"))
    shard = sorted(path.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ModelFormatError, match=rf"{shard.name}: cut short"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)
    shard.unlink()
    with pytest.raises(ModelFormatError, match=rf"{shard.name}: the shard is missing; .* expects \d+ tensors in it"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)


def test_a_broken_index_is_named(sharded: Path, tmp_path: Path) -> None:
    """A tensor in another shard than the index says, a path for a file name, no index at all."""
    path = Path(shutil.copytree(sharded, tmp_path / "src"))
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = "model.decoder.norm.weight"
    other = next(f for f in sorted(set(good["weight_map"].values())) if f != good["weight_map"][name])
    for value, text in [(other, f"'{name}' is missing, though"), ("../x", "not a file name"), (3, "not a file name")]:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {name: value}}))
        with pytest.raises(ModelFormatError, match=re.escape(text)):
            convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)
    index.write_text("{}")
    with pytest.raises(ModelFormatError, match="weight_map"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)
    index.unlink()
    with pytest.raises(ModelFormatError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        convert(path, tmp_path / "x.gguf", allow_missing_tokenizer=True)


def test_a_source_that_is_no_checkpoint_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        convert(tmp_path / "nowhere", tmp_path / "x.gguf")
    with pytest.raises(NotADirectoryError, match="not a checkpoint folder"):
        convert(source / "model.safetensors", tmp_path / "x.gguf")
    with pytest.raises(ModelFormatError, match=r"no config.json"):
        convert(tmp_path, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("value", "kind", "error", "text"),
    [
        (float("nan"), "q8_0", ModelFormatError, "NaN or infinity"),
        (float("-inf"), "f32", ModelFormatError, "NaN or infinity"),
        (-70000.0, "f16", UnsupportedError, "beyond the range of F16"),
        (1e7, "q8_0", UnsupportedError, "beyond the range of Q8_0"),
    ],
)
def test_values_that_cannot_be_written_leave_no_file(
    copy: Path, weights: Weights, tmp_path: Path, value: float, kind: str, error: type[Exception], text: str
) -> None:
    """NaN in the checkpoint, or a value that the type would turn into infinity, ends the conversion and names it."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["model.decoder.layers.4.mlp.up_proj.weight"][5, 7] = value
    save_file(changed, copy / "model.safetensors")
    with pytest.raises(error, match=rf"(up_proj|ffn_up)\.weight' holds .*{text}"):
        convert(copy, tmp_path / "x.gguf", type=kind)
    assert not list(tmp_path.glob("x.gguf*"))


# --------------------------------------------------------------------------------------------- the output on the disk


def test_an_unknown_type_lists_the_known_ones(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type: 'q9', expected one of f32, f16, bf16, q8_0"):
        convert(source, tmp_path / "x.gguf", type="q9")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_the_old_output(
    source: Path, tmp_path: Path, interruption: type[BaseException]
) -> None:
    """Ctrl-C, or an error in the progress callback, at any tensor: no partial file, the old file untouched."""
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")
    for stop_at in (0, 1, 70, 143, 144):

        def stop(progress: ConvertProgress, at: int = stop_at) -> None:
            assert (tmp_path / "x.gguf.part").exists()
            if progress.index == at:
                raise interruption

        with pytest.raises(interruption):
            convert(source, out, progress=stop)
        assert out.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["x.gguf"]


def test_progress_counts_up_to_the_whole(source: Path, tmp_path: Path) -> None:
    """Every tensor is announced in order; the bytes grow to exactly the tensor data's size."""
    seen: list[ConvertProgress] = []
    convert(source, tmp_path / "x.gguf", progress=seen.append)
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert list(dict.fromkeys(p.tensor for p in seen)) == [*(t.name for t in tensors), ""]
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    assert (seen[-1].index, seen[-1].bytes_done) == (seen[-1].count, seen[-1].bytes_total)
    data = (tmp_path / "x.gguf").stat().st_size - tensors[0].data_offset
    assert seen[-1].bytes_total == data


def test_room_is_checked_before_the_first_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with less free than the output needs: ENOSPC at once, in one line with both numbers."""
    (tmp_path / "x.gguf").write_bytes(b"old")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 2000, 2000))
    seen: list[ConvertProgress] = []
    with pytest.raises(OSError, match=r"it needs 8\.\d MB, 2\.0 kB are free") as caught:
        convert(source, tmp_path / "x.gguf", type="f32", progress=seen.append)
    assert caught.value.errno == errno.ENOSPC
    assert not seen
    assert os.listdir(tmp_path) == ["x.gguf"]


def run_script(script: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("limit", [0, 100, 20_000, 1_000_000, 7_367_000])
def test_a_disk_that_fills_gives_one_error_and_leaves_the_old_output(source: Path, tmp_path: Path, limit: int) -> None:
    """The system refuses a write in the header, in the middle, near the end: one line, no partial file."""
    (tmp_path / "x.gguf").write_bytes(b"old")
    script = """
        import resource, sys
        from pydiffgguf.convert import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
        try:
            convert(sys.argv[1], sys.argv[2], type="f32")
        except OSError as e:
            print(e.errno, e)
    """
    done = run_script(script, source, tmp_path / "x.gguf", limit)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{errno.EFBIG} ")
    assert "no room for the output" in done.stdout
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_conversion_never_shows_a_broken_file(source: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: the old output stays; the next run overwrites what was left and succeeds."""
    out = tmp_path / "x.gguf"
    out.write_bytes(b"old")
    script = """
        import os, signal, sys
        from pydiffgguf.convert import convert
        def die(p):
            if p.index == 100:
                os.kill(os.getpid(), signal.SIGKILL)
        convert(sys.argv[1], sys.argv[2], type="f32", progress=die)
    """
    done = run_script(script, source, out)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["x.gguf", "x.gguf.part"]
    convert(source, out, type="f32")
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert len(gguf.GGUFReader(out).tensors) == 144


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_two_conversions_into_one_file_do_not_mix(source: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work, and the first ends well."""
    out = tmp_path / "x.gguf"
    refusals = []

    def second(progress: ConvertProgress) -> None:
        if progress.index == 10 and not refusals:
            with pytest.raises(BlockingIOError, match="another conversion") as caught:
                convert(source, out, type="f32")
            refusals.append(caught.value)

    convert(source, out, type="q8_0", progress=second)
    assert refusals
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert read_keys(out)["general.file_type"][1] == 7


def test_outputs_that_cannot_be_made_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        convert(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        convert(source, tmp_path / "no" / "x.gguf")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A tensor of 205 MB, and its experts of 67 MB, pass through under 100 MB of Python's and numpy's memory."""
    config = {
        "model_type": "diffusion_gemma",
        "canvas_length": 8,
        "text_config": SHAPE
        | {"num_hidden_layers": 1, "vocab_size": 200_000, "hidden_size": 512, "moe_intermediate_size": 8192},
    }
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for _, _, shape, names in wanted_tensors(parse_config(config, "config.json")):
        if names:
            size = 2 * int(np.prod(shape))
            header[names[0]] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    file = tmp_path / "src" / "model.safetensors"
    write_safetensors(file, header, b"")
    os.truncate(file, file.stat().st_size + end)  # zeros that take no room
    tracemalloc.start()
    try:
        report = convert(tmp_path / "src", tmp_path / "x.gguf", type="bf16", allow_missing_tokenizer=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.n_bytes > 300e6
    assert peak < 100e6
