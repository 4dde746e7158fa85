// Names of the GGUF keys and tensors that this engine reads, once. The converter's table (convert/names.py) is tested
// against this file. Keys that begin with a dot stand behind the architecture's name.
#pragma once

namespace dg::names {

inline constexpr const char *ARCHITECTURE = "diffusion-gemma";

// keys
inline constexpr const char *KEY_ARCHITECTURE = "general.architecture";
inline constexpr const char *KEY_TYPE = "general.type";
inline constexpr const char *KEY_BLOCK_COUNT = ".block_count";
inline constexpr const char *KEY_CONTEXT_LENGTH = ".context_length";
inline constexpr const char *KEY_EMBEDDING_LENGTH = ".embedding_length";
inline constexpr const char *KEY_FEED_FORWARD_LENGTH = ".feed_forward_length";
inline constexpr const char *KEY_HEAD_COUNT = ".attention.head_count";
inline constexpr const char *KEY_HEAD_COUNT_KV = ".attention.head_count_kv";
inline constexpr const char *KEY_KEY_LENGTH = ".attention.key_length";
inline constexpr const char *KEY_VALUE_LENGTH = ".attention.value_length";
inline constexpr const char *KEY_KEY_LENGTH_SWA = ".attention.key_length_swa";
inline constexpr const char *KEY_VALUE_LENGTH_SWA = ".attention.value_length_swa";
inline constexpr const char *KEY_SLIDING_WINDOW = ".attention.sliding_window";
inline constexpr const char *KEY_SLIDING_WINDOW_PATTERN = ".attention.sliding_window_pattern";
inline constexpr const char *KEY_SHARED_KV_LAYERS = ".attention.shared_kv_layers";
inline constexpr const char *KEY_EMBEDDING_LENGTH_PER_LAYER = ".embedding_length_per_layer_input";
inline constexpr const char *KEY_RMS_EPSILON = ".attention.layer_norm_rms_epsilon";
inline constexpr const char *KEY_ROPE_FREQ_BASE = ".rope.freq_base";
inline constexpr const char *KEY_ROPE_FREQ_BASE_SWA = ".rope.freq_base_swa";
inline constexpr const char *KEY_ROPE_DIMENSION_COUNT = ".rope.dimension_count";
inline constexpr const char *KEY_ROPE_DIMENSION_COUNT_SWA = ".rope.dimension_count_swa";
inline constexpr const char *KEY_EXPERT_COUNT = ".expert_count";
inline constexpr const char *KEY_EXPERT_USED_COUNT = ".expert_used_count";
inline constexpr const char *KEY_EXPERT_FEED_FORWARD_LENGTH = ".expert_feed_forward_length";
inline constexpr const char *KEY_FINAL_LOGIT_SOFTCAPPING = ".final_logit_softcapping";
inline constexpr const char *KEY_CANVAS_LENGTH = "diffusion.canvas_length";
inline constexpr const char *KEY_EB_MAX_STEPS = "diffusion.eb_max_steps";
inline constexpr const char *KEY_EB_STABILITY_THRESHOLD = "diffusion.eb_stability_threshold";
inline constexpr const char *KEY_EB_T_MIN = "diffusion.eb_t_min";
inline constexpr const char *KEY_EB_T_MAX = "diffusion.eb_t_max";
inline constexpr const char *KEY_EB_ENTROPY_BOUND = "diffusion.eb_entropy_bound";
inline constexpr const char *KEY_EB_CONFIDENCE_THRESHOLD = "diffusion.eb_confidence_threshold";
inline constexpr const char *KEY_ADAPTER_TYPE = "adapter.type";
inline constexpr const char *KEY_ADAPTER_ALPHA = "adapter.lora.alpha";
inline constexpr const char *KEY_ADAPTER_REGION = "diffusion.adapter.region";
inline constexpr const char *KEY_ADAPTER_ALORA = "adapter.alora.invocation_tokens"; // refused
inline constexpr const char *KEY_ADAPTER_BASE = "general.base_model.0.name";
inline constexpr const char *KEY_SPLIT_NO = "split.no";
inline constexpr const char *KEY_SPLIT_COUNT = "split.count";
inline constexpr const char *KEY_SPLIT_TENSORS_COUNT = "split.tensors.count";

// global tensors
inline constexpr const char *TOKEN_EMBD = "token_embd.weight";
inline constexpr const char *OUTPUT = "output.weight"; // an untied head: refused
inline constexpr const char *OUTPUT_NORM = "output_norm.weight";
inline constexpr const char *ROPE_FREQS = "rope_freqs.weight";
inline constexpr const char *SELF_COND_PRE_NORM = "self_cond_pre_norm.weight";
inline constexpr const char *SELF_COND_NORM = "self_cond_norm.weight"; // the rival dialect's spelling of the same
inline constexpr const char *SELF_COND_GATE = "self_cond_gate.weight";
inline constexpr const char *SELF_COND_UP = "self_cond_up.weight";
inline constexpr const char *SELF_COND_DOWN = "self_cond_down.weight";

// tensors of layer N stand behind "blk.N."
inline constexpr const char *ATTN_NORM = "attn_norm.weight";
inline constexpr const char *ATTN_Q = "attn_q.weight";
inline constexpr const char *ATTN_K = "attn_k.weight";
inline constexpr const char *ATTN_V = "attn_v.weight";
inline constexpr const char *ATTN_OUTPUT = "attn_output.weight";
inline constexpr const char *ATTN_Q_NORM = "attn_q_norm.weight";
inline constexpr const char *ATTN_K_NORM = "attn_k_norm.weight";
inline constexpr const char *POST_ATTENTION_NORM = "post_attention_norm.weight";
inline constexpr const char *FFN_NORM = "ffn_norm.weight";
inline constexpr const char *FFN_GATE = "ffn_gate.weight";
inline constexpr const char *FFN_UP = "ffn_up.weight";
inline constexpr const char *FFN_DOWN = "ffn_down.weight";
inline constexpr const char *POST_FFW_NORM_1 = "post_ffw_norm_1.weight";
inline constexpr const char *PRE_FFW_NORM_2 = "pre_ffw_norm_2.weight";
inline constexpr const char *POST_FFW_NORM_2 = "post_ffw_norm_2.weight";
inline constexpr const char *POST_FFW_NORM = "post_ffw_norm.weight";
inline constexpr const char *FFN_GATE_INP = "ffn_gate_inp.weight";
inline constexpr const char *FFN_GATE_INP_SCALE = "ffn_gate_inp.scale";
inline constexpr const char *FFN_GATE_UP_EXPS = "ffn_gate_up_exps.weight";
inline constexpr const char *FFN_GATE_EXPS = "ffn_gate_exps.weight"; // the split spelling, with FFN_UP_EXPS
inline constexpr const char *FFN_UP_EXPS = "ffn_up_exps.weight";
inline constexpr const char *FFN_DOWN_EXPS = "ffn_down_exps.weight";
inline constexpr const char *FFN_DOWN_EXPS_SCALE = "ffn_down_exps.scale";
inline constexpr const char *LAYER_OUTPUT_SCALE = "layer_output_scale.weight";
inline constexpr const char *ENC_LAYER_OUTPUT_SCALE = "enc_layer_output_scale.weight";

} // namespace dg::names
