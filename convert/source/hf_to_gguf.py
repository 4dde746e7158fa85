"""The keys of a GGUF file made from a checkpoint."""

from __future__ import annotations

from typing import Any

from ..names import ARCHITECTURE
from ..recipes import Recipe
from .checkpoint import Checkpoint
from .vocabulary import SCORE, Vocabulary

# The version of ggml's quantized formats; 2 since 2023.
QUANTIZATION_VERSION = 2


def metadata(checkpoint: Checkpoint, vocabulary: Vocabulary | None, wanted: Recipe, name: str) -> dict[str, Any]:
    """GGUF key, as in names.KEYS -> value; but for general.size_label, which needs the tensors counted."""
    c = checkpoint.config
    values: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        # A folder's name may hold bytes that are not text.
        "general.name": name.encode("utf-8", errors="replace").decode("utf-8"),
        "general.file_type": int(wanted.file_type),
        "general.quantization_version": QUANTIZATION_VERSION,
        ".block_count": len(c.layers),
        ".context_length": c.context_length,
        ".embedding_length": c.hidden_size,
        ".feed_forward_length": c.ffn_size,
        ".attention.head_count": c.heads,
        ".attention.head_count_kv": [layer.kv_heads for layer in c.layers],
        ".attention.key_length": c.full.head_dim,
        ".attention.value_length": c.full.head_dim,
        ".attention.key_length_swa": c.sliding.head_dim,
        ".attention.value_length_swa": c.sliding.head_dim,
        ".attention.sliding_window": c.sliding_window,
        ".attention.sliding_window_pattern": [layer.sliding for layer in c.layers],
        ".attention.shared_kv_layers": 0,
        ".embedding_length_per_layer_input": 0,
        ".attention.layer_norm_rms_epsilon": c.rms_eps,
        ".attention.causal": False,
        ".rope.freq_base": c.rope_base,
        ".rope.freq_base_swa": c.rope_base_sliding,
        ".rope.dimension_count": c.full.head_dim,
        ".rope.dimension_count_swa": c.sliding.head_dim,
        ".expert_count": c.experts,
        ".expert_used_count": c.experts_used,
        ".expert_feed_forward_length": c.expert_ffn_size,
        ".final_logit_softcapping": c.softcap,
        "diffusion.canvas_length": c.canvas_length,
        **checkpoint.sampler,
    }
    # A reader finds the end tokens by their text, so the list is worth a key only where it says something else.
    by_text = vocabulary.end_ids() if vocabulary else set()
    if checkpoint.eos_ids and set(checkpoint.eos_ids) != by_text:
        values["diffusion.eos_token_ids"] = checkpoint.eos_ids
    if checkpoint.infill_mode:
        values["diffusion.infill_mode"] = checkpoint.infill_mode
    if vocabulary:
        values |= {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": vocabulary.tokens,
            "tokenizer.ggml.scores": [SCORE] * len(vocabulary.tokens),
            "tokenizer.ggml.token_type": vocabulary.types,
            "tokenizer.ggml.merges": vocabulary.merges,
            **vocabulary.special_ids,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": False,
        }
        if vocabulary.chat_template:
            values["tokenizer.chat_template"] = vocabulary.chat_template
    return values
