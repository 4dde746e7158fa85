"""A transformers model rebuilt from a GGUF file alone: its keys become the config, its dequantized tensors the weights.

With it a file that was never a checkpoint on this machine (the bundled demo model) has a reference too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from checkpoint_names import checkpoint_names
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from reference import Model
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its type there, and its values as float32 in row-major order."""

    kind: GGMLQuantizationType
    values: npt.NDArray[np.float32]


def read_keys(path: Path) -> dict[str, Any]:
    """All key-value pairs of a GGUF file as Python values."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a GGUF file, dequantized."""
    tensors = {}
    for tensor in GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        tensors[tensor.name] = Tensor(tensor.tensor_type, values)
    return tensors


def tensor_names(model: Model) -> dict[str, str]:
    """GGUF name -> name in the model's state dict, for every text weight there is."""
    return checkpoint_names(model.config.text_config.layer_types)


def config_from_keys(keys: dict[str, Any], rope_factors: npt.NDArray[np.float32]) -> DiffusionGemmaConfig:
    """The transformers config that a file's keys describe. rope_factors: [head_dim / 2] of the full layers, 1 on the
    frequency pairs that rotate."""

    def key(name: str) -> Any:
        return keys[f"diffusion-gemma.{name}"]

    sliding = [bool(flag) for flag in key("attention.sliding_window_pattern")]
    kv_heads = [int(n) for n in key("attention.head_count_kv")]
    kv_sliding = {n for n, flag in zip(kv_heads, sliding, strict=True) if flag}
    kv_full = {n for n, flag in zip(kv_heads, sliding, strict=True) if not flag}
    assert len(kv_sliding) <= 1 and len(kv_full) == 1
    text = DiffusionGemmaTextConfig(
        vocab_size=len(keys["tokenizer.ggml.tokens"]) if "tokenizer.ggml.tokens" in keys else key("vocab_size"),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        layer_types=["sliding_attention" if flag else "full_attention" for flag in sliding],
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=max(kv_sliding or kv_full),
        head_dim=key("attention.key_length_swa"),
        global_head_dim=key("attention.key_length"),
        num_global_key_value_heads=max(kv_full),
        num_experts=key("expert_count"),
        top_k_experts=key("expert_used_count"),
        moe_intermediate_size=key("expert_feed_forward_length"),
        sliding_window=key("attention.sliding_window"),
        max_position_embeddings=key("context_length"),
        rms_norm_eps=float(np.float32(key("attention.layer_norm_rms_epsilon"))),
        final_logit_softcapping=float(key("final_logit_softcapping")),
        use_bidirectional_attention="vision",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": float(key("rope.freq_base_swa"))},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": float((rope_factors == 1.0).sum()) / rope_factors.size,
                "rope_theta": float(key("rope.freq_base")),
            },
        },
    )
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        position_embedding_size=16,
    )
    return DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=keys["diffusion.canvas_length"], image_token_id=-1
    )


def model_from_gguf(path: Path) -> Model:
    """The transformers model of a GGUF file, float32, in eval mode, every text weight taken from the file."""
    tensors = read_tensors(path)
    keys = read_keys(path)
    keys.setdefault("diffusion-gemma.vocab_size", tensors["token_embd.weight"].values.shape[0])
    rope_factors = tensors["rope_freqs.weight"].values
    model = Model(config_from_keys(keys, rope_factors)).eval()
    rotating = int((model.model.decoder.rotary_emb.full_attention_inv_freq > 0).sum())
    assert rotating == int((rope_factors == 1.0).sum())

    names = tensor_names(model)
    assert set(tensors) == {*names, "rope_freqs.weight"}
    state = {names[name]: torch.from_numpy(tensor.values) for name, tensor in tensors.items() if name in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    # What is missing is the encoder's half of tied weights, the head (tied to the embedding), and the vision tower.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameter) for name, parameter in parameters.items() if name in state}
    for name in missing:
        assert "vision" in name or id(parameters[name]) in tied, name
    return model
