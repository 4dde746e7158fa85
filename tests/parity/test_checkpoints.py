"""Checkpoints as transformers reads and writes them, against what the tests write and what the converter reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import SHAPES
from rebuild import read_tensors
from reference import load_reference
from safetensors.torch import load_file
from tiny_checkpoint import SMALL_TEXT_CONFIG, make_checkpoint, write_weights
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

from pydiffgguf.convert import convert
from pydiffgguf.convert.source.config import parse_config

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_tests_own_checkpoints_are_what_transformers_saves(tmp_path: Path, name: str, dtype: str) -> None:
    """Configs, names, shapes and values: transformers reads them, and writes the same again."""
    shape = SHAPES[name] | {"num_hidden_layers": len(SHAPES[name]["layer_types"])}
    make_checkpoint(tmp_path / "ours", dtype=dtype, **shape)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "ours", dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    configs = [
        [json.loads((tmp_path / who / file).read_text()) for file in ("config.json", "generation_config.json")]
        for who in ("ours", "theirs")
    ]
    for part in ("text_config", "vision_config"):
        assert configs[1][0][part].pop("dtype") == dtype  # loading a model notes it there too
    assert configs[0] == configs[1]
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_tests_own_checkpoints_round_as_torch_does(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path / "whole", num_hidden_layers=1)
    make_checkpoint(tmp_path / "half", num_hidden_layers=1, dtype=dtype)
    whole, half = (load_file(tmp_path / which / "model.safetensors") for which in ("whole", "half"))
    assert all(torch.equal(half[key], whole[key].to(getattr(torch, dtype))) for key in whole)


def test_a_reference_reads_one_name_of_a_tied_pair(tmp_path: Path) -> None:
    """What tests/convert/test_sources.py shows of the converter: the head's name alone stands for the embedding."""
    make_checkpoint(tmp_path, num_hidden_layers=1)
    weights = {key: value.numpy().copy() for key, value in load_file(tmp_path / "model.safetensors").items()}
    embedding = weights["lm_head.weight"] = weights.pop("model.decoder.embed_tokens.weight")
    write_weights(tmp_path / "model.safetensors", weights)
    np.testing.assert_array_equal(load_reference(tmp_path).lm_head.weight.detach().numpy(), embedding)


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
    values: dict[str, Any] = json.loads(json.dumps(SMALL_TEXT_CONFIG | spelling))
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

    inv_freq = DiffusionGemmaTextRotaryEmbedding(theirs).full_attention_inv_freq
    assert (len(inv_freq), int((inv_freq > 0).sum())) == (ours.full.head_dim // 2, ours.rotating_pairs)


def test_rope_freqs_give_the_references_frequencies(tmp_path: Path) -> None:
    """theta^(-2i/d) / rope_freqs is the reference's inv_freq on full layers, with its zeros for the resting pairs."""
    make_checkpoint(tmp_path / "src", num_hidden_layers=2, global_head_dim=40)
    convert(tmp_path / "src", tmp_path / "x.gguf", type="q8_0", allow_missing_tokenizer=True)
    freqs = read_tensors(tmp_path / "x.gguf")["rope_freqs.weight"].values
    expected = load_reference(tmp_path / "src").model.decoder.rotary_emb.full_attention_inv_freq.numpy()
    assert freqs.shape == (20,)
    assert set(freqs.tolist()) == {1.0, float(np.float32(1e30))}
    ours = 1e6 ** (-2.0 * np.arange(20) / 40) / freqs.astype(np.float64)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-29)
