// An opened model: its figures, and its tensors bound once into typed structs. Immutable after construction.
//
// Shapes are in ggml's order (ne[0] contiguous): a matrix [in, out] maps rows of `in` values to rows of `out`.
#pragma once

#include "cpu/kernels.h"
#include "diffgguf.h"
#include "file/gguf_files.h"
#include "model/device_weights.h"
#include "model/devices.h"
#include "model/placement.h"

#include "ggml-cpp.h"

#include <memory>
#include <string>
#include <vector>

namespace dg {

// D: head_dim, H: n_head, K: n_head_kv (both of the layer), F: n_ff, X: n_ff_exp, E: n_expert.
struct LayerWeights {
    bool sliding = false;
    int64_t n_head_kv = 0;
    int64_t head_dim = 0;

    ggml_tensor *attn_norm = nullptr;     // [n_embd]
    ggml_tensor *attn_q = nullptr;        // [n_embd, D*H]
    ggml_tensor *attn_k = nullptr;        // [n_embd, D*K]
    ggml_tensor *attn_v = nullptr;        // [n_embd, D*K]; null on full layers, whose V is K's raw projection
    ggml_tensor *attn_output = nullptr;   // [D*H, n_embd]
    ggml_tensor *rope_divisors = nullptr; // [D/2], of angles: base^(2i/D); of full layers 1e30 where a pair rests
    ggml_tensor *attn_q_norm = nullptr;   // [D]
    ggml_tensor *attn_k_norm = nullptr;   // [D]
    ggml_tensor *post_attention_norm = nullptr;

    ggml_tensor *ffn_norm = nullptr;
    ggml_tensor *ffn_gate = nullptr; // [n_embd, F]
    ggml_tensor *ffn_up = nullptr;   // [n_embd, F]
    ggml_tensor *ffn_down = nullptr; // [F, n_embd]
    ggml_tensor *post_ffw_norm_1 = nullptr;

    ggml_tensor *router = nullptr;       // [n_embd, E]
    ggml_tensor *router_scale = nullptr; // [n_embd], with hidden^-0.5 multiplied in
    ggml_tensor *pre_ffw_norm_2 = nullptr;
    ggml_tensor *gate_up_exps =
        nullptr;                      // [n_embd, 2X, E]: rows 0..X-1 gate, X..2X-1 up; null when the file splits them
    ggml_tensor *gate_exps = nullptr; // [n_embd, X, E]
    ggml_tensor *up_exps = nullptr;   // [n_embd, X, E]
    ggml_tensor *down_exps = nullptr; // [X, n_embd, E]
    ggml_tensor *down_exps_scale = nullptr; // [1, E]: one value a row, as get_rows wants it
    ggml_tensor *post_ffw_norm_2 = nullptr;
    ggml_tensor *post_ffw_norm = nullptr;

    float output_scale = 1.0f;         // the decoder's layer scalar
    float encoder_output_scale = 1.0f; // the encoder's own
};

struct Weights {
    ggml_tensor *token_embd = nullptr;  // [n_embd, n_vocab]: the head, and what the self-conditioning signal is made of
    ggml_tensor *signal_copy = nullptr; // F16 [n_vocab, n_embd], of a head on a device, where it was asked for
    ggml_tensor *input_embd = nullptr;  // the same numbers, where the rows of the ids are taken from
    ggml_tensor *output_norm = nullptr;
    ggml_tensor *self_cond_pre_norm = nullptr; // the four are null in a file without self-conditioning
    ggml_tensor *self_cond_gate = nullptr;
    ggml_tensor *self_cond_up = nullptr;
    ggml_tensor *self_cond_down = nullptr;
    std::vector<LayerWeights> layers;
};

class Model {
  public:
    Model(const std::string &path, const dg_model_options &options);

    const dg_config &config() const { return config_; }
    const dg_sampling &sampling() const { return sampling_; }
    const Weights &weights() const { return weights_; }
    std::vector<dg_layer_config> layers() const;
    const std::vector<std::string> &warnings() const { return warnings_; }
    const GgufFiles &files() const { return *files_; }
    const Devices &devices() const { return *devices_; }
    const Placement &placement() const { return placement_; }
    // What the CPU computes with, of the level that was chosen; nullptr: ggml's operators.
    const Kernels *kernels() const { return kernels_; }
    // Bytes of weights on a device; what the CPU uses where it lies in the file is not among them.
    size_t weights_on(int32_t device) const { return placed_->bytes(device); }
    // Bytes of Weights::signal_copy, which is beside those, on the head's device.
    size_t signal_copy_bytes() const { return signal_copy_ ? signal_copy_->bytes() : 0; }
    // Weights that one row of a pass is multiplied with.
    int64_t active_parameters() const;
    // Differs between models whose caches are not exchangeable: a hash of the figures and of every tensor's name, type
    // and samples.
    uint64_t fingerprint() const;

  private:
    friend class ModelReader;

    const Kernels *kernels_ = nullptr;
    std::unique_ptr<const GgufFiles> files_;
    std::unique_ptr<const Devices> devices_;
    Placement placement_;
    std::unique_ptr<DeviceWeights> placed_;
    std::unique_ptr<DeviceWeights> signal_copy_; // null: not asked for
    dg_config config_ = {};
    dg_sampling sampling_ = {};
    Weights weights_;
    std::vector<std::string> warnings_;
};

} // namespace dg
