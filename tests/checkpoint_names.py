"""What the text model's tensors are called in a GGUF file and in a checkpoint, from the dialect's page: written out
here, so that the converter's own table (convert/names.py) is compared with something."""

from __future__ import annotations

from collections.abc import Sequence

#: GGUF name -> name behind "model.decoder."
GLOBAL = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "self_cond_pre_norm.weight": "self_conditioning.pre_norm.weight",
    "self_cond_gate.weight": "self_conditioning.gate_proj.weight",
    "self_cond_up.weight": "self_conditioning.up_proj.weight",
    "self_cond_down.weight": "self_conditioning.down_proj.weight",
}
#: The same behind "blk.N." and "model.decoder.layers.N."
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


def checkpoint_names(layer_types: Sequence[str]) -> dict[str, str]:
    """GGUF name -> checkpoint name of every text weight. Full layers have no values of their own."""
    names = {name: f"model.decoder.{source}" for name, source in GLOBAL.items()}
    for i, layer_type in enumerate(layer_types):
        for name, source in LAYER.items():
            if name != "attn_v.weight" or layer_type == "sliding_attention":
                names[f"blk.{i}.{name}"] = f"model.decoder.layers.{i}.{source}"
        names[f"blk.{i}.enc_layer_output_scale.weight"] = f"model.encoder.language_model.layers.{i}.layer_scalar"
    return names
