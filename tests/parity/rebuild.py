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
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from reference import Model
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

GLOBAL_NAMES = {
    "token_embd.weight": "model.decoder.embed_tokens.weight",
    "output_norm.weight": "model.decoder.norm.weight",
    "self_cond_pre_norm.weight": "model.decoder.self_conditioning.pre_norm.weight",
    "self_cond_gate.weight": "model.decoder.self_conditioning.gate_proj.weight",
    "self_cond_up.weight": "model.decoder.self_conditioning.up_proj.weight",
    "self_cond_down.weight": "model.decoder.self_conditioning.down_proj.weight",
}

# behind "blk.N." -> behind "model.decoder.layers.N."
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
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
    names = dict(GLOBAL_NAMES)
    for n, layer_type in enumerate(model.config.text_config.layer_types):
        for gguf_name, name in LAYER_NAMES.items():
            if gguf_name != "attn_v.weight" or layer_type == "sliding_attention":
                names[f"blk.{n}.{gguf_name}"] = f"model.decoder.layers.{n}.{name}"
        names[f"blk.{n}.enc_layer_output_scale.weight"] = f"model.encoder.language_model.layers.{n}.layer_scalar"
    return names


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
