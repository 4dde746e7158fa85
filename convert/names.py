"""The names of the GGUF dialect: every key with its type, every tensor with its checkpoint name and shape, once.

The dialect is that of the published DiffusionGemma files. The engine holds the same names in csrc/file/names.h; a test
compares the two. Keys that begin with a dot stand behind the architecture's name; layer tensors behind `blk.N.`.
"""

from __future__ import annotations

from typing import NamedTuple

ARCHITECTURE = "diffusion-gemma"

# Key -> type, in the order in which the converter writes them. Types: str, bool, u32, f32, and arr[...] of str, bool,
# u32, i32, f32.
KEYS: dict[str, str] = {
    "general.architecture": "str",
    "general.type": "str",
    "general.name": "str",
    "general.size_label": "str",
    "general.file_type": "u32",
    "general.quantization_version": "u32",
    ".block_count": "u32",
    ".context_length": "u32",
    ".embedding_length": "u32",
    ".feed_forward_length": "u32",
    ".attention.head_count": "u32",
    ".attention.head_count_kv": "arr[i32]",
    ".attention.key_length": "u32",
    ".attention.value_length": "u32",
    ".attention.key_length_swa": "u32",
    ".attention.value_length_swa": "u32",
    ".attention.sliding_window": "u32",
    ".attention.sliding_window_pattern": "arr[bool]",
    ".attention.shared_kv_layers": "u32",
    ".embedding_length_per_layer_input": "u32",
    ".attention.layer_norm_rms_epsilon": "f32",
    ".attention.causal": "bool",
    ".rope.freq_base": "f32",
    ".rope.freq_base_swa": "f32",
    ".rope.dimension_count": "u32",
    ".rope.dimension_count_swa": "u32",
    ".expert_count": "u32",
    ".expert_used_count": "u32",
    ".expert_feed_forward_length": "u32",
    ".final_logit_softcapping": "f32",
    "diffusion.canvas_length": "u32",
    "diffusion.eb_max_steps": "u32",
    "diffusion.eb_stability_threshold": "u32",
    "diffusion.eb_t_min": "f32",
    "diffusion.eb_t_max": "f32",
    "diffusion.eb_entropy_bound": "f32",
    "diffusion.eb_confidence_threshold": "f32",
    "diffusion.eos_token_ids": "arr[u32]",
    "diffusion.infill_mode": "str",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.tokens": "arr[str]",
    "tokenizer.ggml.scores": "arr[f32]",
    "tokenizer.ggml.token_type": "arr[i32]",
    "tokenizer.ggml.merges": "arr[str]",
    "tokenizer.ggml.bos_token_id": "u32",
    "tokenizer.ggml.eos_token_id": "u32",
    "tokenizer.ggml.unknown_token_id": "u32",
    "tokenizer.ggml.padding_token_id": "u32",
    "tokenizer.ggml.mask_token_id": "u32",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_space_prefix": "bool",
    "tokenizer.chat_template": "str",
}

# Keys of an adapter: llama.cpp's, but for the region; one of another method than plain LoRA is refused by its key.
ADAPTER_KEYS: dict[str, str] = {
    "adapter.type": "str",
    "adapter.lora.alpha": "f32",
    "diffusion.adapter.region": "str",
    "adapter.alora.invocation_tokens": "arr[u32]",
    "general.base_model.0.name": "str",
}

# Keys of the parts of a split file, which other programs write: which part this is, from 0, how many there are, and the
# tensors of all together.
SPLIT_KEYS: dict[str, str] = {"split.no": "u16", "split.count": "u16", "split.tensors.count": "i32"}

# The sampler's keys: GGUF key -> the name in generation_config.json, where `entropy_bound` lies in `sampler_config`.
SAMPLER_KEYS: dict[str, str] = {
    "diffusion.eb_max_steps": "max_denoising_steps",
    "diffusion.eb_stability_threshold": "stability_threshold",
    "diffusion.eb_t_min": "t_min",
    "diffusion.eb_t_max": "t_max",
    "diffusion.eb_entropy_bound": "entropy_bound",
    "diffusion.eb_confidence_threshold": "confidence_threshold",
}

# End tokens are found by their text, whatever their ids. `</s>` is a vocabulary entry here, not an end token.
END_TOKENS = ("<eos>", "<turn|>", "<|tool_response>")

# Where a checkpoint keeps the weights. A tied copy in the other places may stand beside the first, or instead of it.
DECODER = "model.decoder."
ENCODER = "model.encoder.language_model."
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"


class Tensor(NamedTuple):
    """One tensor of the dialect.

    `name`: in the GGUF, behind `blk.N.` for a layer's tensor. `source`: in the checkpoint, behind `DECODER` (or
    `ENCODER`, see `encoder_only`) and `layers.N.`. `dims`: row-major, by the names that CheckpointConfig.dims() gives.
    `kind`: the class that recipes and reports speak of.
    """

    name: str
    source: str
    dims: tuple[str, ...]
    kind: str
    sliding_only: bool = False
    encoder_only: bool = False


# rope_freqs.weight is computed, not read: `source` is empty.
GLOBAL_TENSORS: tuple[Tensor, ...] = (
    Tensor("token_embd.weight", EMBEDDING, ("vocab", "hidden"), "embedding"),
    Tensor("output_norm.weight", "norm.weight", ("hidden",), "norm"),
    Tensor("rope_freqs.weight", "", ("pairs",), "rope"),
    Tensor("self_cond_pre_norm.weight", "self_conditioning.pre_norm.weight", ("hidden",), "norm"),
    Tensor("self_cond_gate.weight", "self_conditioning.gate_proj.weight", ("ffn", "hidden"), "self-conditioning"),
    Tensor("self_cond_up.weight", "self_conditioning.up_proj.weight", ("ffn", "hidden"), "self-conditioning"),
    Tensor("self_cond_down.weight", "self_conditioning.down_proj.weight", ("hidden", "ffn"), "self-conditioning"),
)

LAYER_TENSORS: tuple[Tensor, ...] = (
    Tensor("attn_norm.weight", "input_layernorm.weight", ("hidden",), "norm"),
    Tensor("attn_q.weight", "self_attn.q_proj.weight", ("q", "hidden"), "attention"),
    Tensor("attn_k.weight", "self_attn.k_proj.weight", ("kv", "hidden"), "attention"),
    Tensor("attn_v.weight", "self_attn.v_proj.weight", ("kv", "hidden"), "attention", sliding_only=True),
    Tensor("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q"), "attention"),
    Tensor("attn_q_norm.weight", "self_attn.q_norm.weight", ("head",), "norm"),
    Tensor("attn_k_norm.weight", "self_attn.k_norm.weight", ("head",), "norm"),
    Tensor("post_attention_norm.weight", "post_attention_layernorm.weight", ("hidden",), "norm"),
    Tensor("ffn_norm.weight", "pre_feedforward_layernorm.weight", ("hidden",), "norm"),
    Tensor("ffn_gate.weight", "mlp.gate_proj.weight", ("ffn", "hidden"), "dense FFN"),
    Tensor("ffn_up.weight", "mlp.up_proj.weight", ("ffn", "hidden"), "dense FFN"),
    Tensor("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "ffn"), "dense FFN"),
    Tensor("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight", ("hidden",), "norm"),
    Tensor("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", ("hidden",), "norm"),
    Tensor("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight", ("hidden",), "norm"),
    Tensor("post_ffw_norm.weight", "post_feedforward_layernorm.weight", ("hidden",), "norm"),
    Tensor("ffn_gate_inp.weight", "router.proj.weight", ("experts", "hidden"), "router"),
    Tensor("ffn_gate_inp.scale", "router.scale", ("hidden",), "router"),
    Tensor("ffn_gate_up_exps.weight", "experts.gate_up_proj", ("experts", "gate_up", "hidden"), "experts"),
    Tensor("ffn_down_exps.weight", "experts.down_proj", ("experts", "hidden", "expert_ffn"), "experts"),
    Tensor("ffn_down_exps.scale", "router.per_expert_scale", ("experts",), "router"),
    Tensor("layer_output_scale.weight", "layer_scalar", ("one",), "scalar"),
    Tensor("enc_layer_output_scale.weight", "layer_scalar", ("one",), "scalar", encoder_only=True),
)

# Other writers' tensors, which are read but never written: the rival dialect's name for self_cond_pre_norm, gate and up
# of the experts kept apart, and an untied head, which is refused.
FOREIGN_GLOBAL_TENSORS: tuple[Tensor, ...] = (
    Tensor("self_cond_norm.weight", "", ("hidden",), "norm"),
    Tensor("output.weight", "", ("vocab", "hidden"), "embedding"),
)
FOREIGN_LAYER_TENSORS: tuple[Tensor, ...] = (
    Tensor("ffn_gate_exps.weight", "", ("experts", "expert_ffn", "hidden"), "experts"),
    Tensor("ffn_up_exps.weight", "", ("experts", "expert_ffn", "hidden"), "experts"),
)


def full_key(key: str, architecture: str = ARCHITECTURE) -> str:
    """The key as it stands in a file: `.block_count` -> `diffusion-gemma.block_count`, `general.name` unchanged."""
    return architecture + key if key.startswith(".") else key


def layer_name(layer: int, name: str) -> str:
    """The name of a layer's tensor as it stands in a file: (3, `attn_q.weight`) -> `blk.3.attn_q.weight`."""
    return f"blk.{layer}.{name}"


def layer_tensors(sliding: bool) -> tuple[Tensor, ...]:
    """The tensors of one layer; full layers have no `attn_v`."""
    return tuple(t for t in LAYER_TENSORS if sliding or not t.sliding_only)
