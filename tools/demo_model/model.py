"""The demo model's shape: every part of the architecture, at 1.6 M parameters; and a sister for the quality table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

CANVAS = 64
PAD, EOS, BOS, TOOL_RESPONSE, TURN_END = 0, 1, 2, 50, 106
# What differs by model. "demo" ships. "rows256" has rows of multiples of 256 only, so that K-quants of it are K-quants:
# it ranks the quantization recipes (benchmarks/quality.py).
SHAPES: dict[str, dict[str, Any]] = {
    "demo": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "head_dim": 32,
        "global_head_dim": 64,
        "moe_intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
    },
    "rows256": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "head_dim": 64,
        "global_head_dim": 128,
        "moe_intermediate_size": 256,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
}
# Fixed, not learnt: the two modes must differ in what the file carries, and a buffer never gets a gradient.
DECODER_SCALARS = [1.05, 0.95, 1.1, 0.95, 1.05]
ENCODER_SCALARS = [0.9, 1.05, 0.95, 1.1, 0.95]


@torch.no_grad()
def prepare_copying(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Start attention as a copier: what a head reads of a token, its output writes back unchanged.

    Each head's value rows are orthonormal and its output columns are their transpose, so attending to a token adds
    a projection of that token's embedding, which the tied head reads as that token. Without this, query-key weights get
    no useful gradient until value and output weights happen to copy, and the other way round: at this size that
    deadlock can outlast a training run. On full layers, half of the query heads start equal to
    the keys ("look for yourself"). The norms that close each branch start low, so that token identity is not drowned.
    """
    for layer in model.model.decoder.layers:
        attn = layer.self_attn
        d, hidden = attn.head_dim, attn.q_proj.in_features
        values = attn.v_proj if attn.v_proj is not None else attn.k_proj
        for g in range(values.out_features // d):
            torch.nn.init.orthogonal_(values.weight[g * d : (g + 1) * d])
        for h in range(attn.q_proj.out_features // d):
            g = h // attn.num_key_value_groups
            attn.o_proj.weight[:, h * d : (h + 1) * d] = values.weight[g * d : (g + 1) * d].T
            if attn.v_proj is None and h % 2 == 0:
                attn.q_proj.weight[h * d : (h + 1) * d] = attn.k_proj.weight[g * d : (g + 1) * d]
        layer.post_attention_layernorm.weight.fill_(0.5)
        layer.post_feedforward_layernorm.weight.fill_(0.3)
        assert hidden == attn.o_proj.out_features
    torch.nn.init.normal_(model.model.decoder.embed_tokens.weight, std=model.config.text_config.hidden_size**-0.5)


def build(vocab: int, seed: int, shape: str = "demo") -> DiffusionGemmaForBlockDiffusion:
    """A fresh model of one of the SHAPES, its two sets of layer scalars set and its attention tempered.

    Attention runs at scale 1.0, so unit q/k norms at head size d give scores of spread sqrt(d); the norms start at
    1.5 d**-0.25 each: 2.25 times as sharp as the usual 1/sqrt(d) at the start of training.
    """
    torch.manual_seed(seed)
    text = DiffusionGemmaTextConfig(
        vocab_size=vocab,
        num_hidden_layers=len(SHAPES[shape]["layer_types"]),
        num_key_value_heads=2,
        num_global_key_value_heads=2,
        num_experts=8,
        top_k_experts=2,
        sliding_window=40,
        max_position_embeddings=2048,
        use_bidirectional_attention="vision",
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        final_logit_softcapping=30.0,
        initializer_range=0.088,
        **SHAPES[shape],
    )
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        boi_token_id=PAD,
        eoi_token_id=PAD,
        infill_mode="raw",  # for the converter: gaps are trained in plain documents, though there is a chat template
        image_token_id=vocab - 1,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model = DiffusionGemmaForBlockDiffusion(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.decoder.layers):
            layer.layer_scalar.fill_(DECODER_SCALARS[i])
            model.model.encoder.language_model.layers[i].layer_scalar.fill_(ENCODER_SCALARS[i])
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight.fill_(1.5 * layer.self_attn.head_dim**-0.25)
    prepare_copying(model)
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=CANVAS,
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=[EOS, TURN_END, TOOL_RESPONSE],
    )
    return model


def load(path: str | Path) -> DiffusionGemmaForBlockDiffusion:
    """A saved checkpoint, in float32, ready to run."""
    return DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval()


def counts(model: DiffusionGemmaForBlockDiffusion) -> str:
    """Parameters of the text stack as JSON (tied weights once, vision left out)."""
    seen = {id(p): p.numel() for n, p in model.named_parameters() if "vision" not in n}
    embed = model.model.decoder.embed_tokens.weight.numel()
    return json.dumps({"parameters": sum(seen.values()), "embedding": embed})
