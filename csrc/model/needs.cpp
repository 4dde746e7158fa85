#include "model/needs.h"

#include "cuda/device_loop.h"
#include "sample/sampler_graph.h"
#include "sample/signal_graph.h"

#include "ggml-backend.h"

#include <algorithm>

namespace dg {
namespace {

// Of a session on devices, which compute with ggml's operators. Numbers of floats are at least what ggml's allocator
// comes to for the largest graphs (tests/test_fit.py): it leaves holes, so that some tensors count more often than they
// exist.
class Needs {
  public:
    Needs(const dg_config &config, const std::vector<dg_layer_config> &layers, const dg_session_options &options)
        : c_(config), layers_(layers), figures_(config, options),
          with_kernels_(options.sampler == DG_SAMPLER_AUTO || options.sampler == DG_SAMPLER_KERNELS) {}

    std::vector<size_t> cache() const {
        const size_t alignment = ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
        std::vector<size_t> bytes;
        for (const dg_layer_config &layer : layers_) {
            const size_t slot = figures_.slot_bytes(layer.head_dim, layer.n_head_kv);
            bytes.push_back(2 * GGML_PAD(slot * static_cast<size_t>(figures_.slots(layer.sliding)), alignment));
        }
        return bytes;
    }

    dg_needs sums() const {
        dg_needs needs = {};
        needs.n_ctx = figures_.n_ctx;
        needs.n_rows = figures_.n_rows;
        // What is drawn by operators has the logits of a pass, not of all rows.
        const int32_t rows = with_kernels_ ? figures_.n_rows : figures_.pass_rows;
        needs.logits = sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(c_.n_vocab);
        needs.passes = sizeof(float) * static_cast<size_t>(inputs() + intermediate());
        needs.sampling = sampling();
        return needs;
    }

  private:
    const dg_config &c_;
    const std::vector<dg_layer_config> &layers_;
    const SessionFigures figures_;
    const bool with_kernels_; // the sampler's, or nobody knows

    // Positions, slots, masks of half precision, ids, several segments' outputs, rows that get logits, the signal.
    int64_t inputs() const {
        int64_t widest = 0;
        for (const dg_layer_config &layer : layers_) {
            widest = std::max(widest, int64_t{layer.head_dim} * c_.n_head);
        }
        const int64_t pass = figures_.largest_pass();
        const int64_t masks = pass * (int64_t{figures_.slots(false)} + figures_.slots(true)) / 2;
        return 4 * std::max<int64_t>(pass, figures_.n_rows) + masks + widest * figures_.pass_rows +
               int64_t{figures_.n_rows} * (c_.n_embd + 1);
    }

    // The most floats that exist at a time within a layer.
    int64_t intermediate() const {
        const int64_t chunk = figures_.longest_chunk();
        const int64_t rows = std::max<int64_t>(chunk, figures_.pass_rows);
        const int64_t experts = c_.n_expert_used * (5 * int64_t{c_.n_ff_exp} + c_.n_embd) + c_.n_expert;
        int64_t most = rows * (std::max(experts, 4 * int64_t{c_.n_ff}) + 4 * int64_t{c_.n_embd});
        for (const dg_layer_config &layer : layers_) {
            most = std::max({most, attention(layer, figures_.n_ctx - c_.canvas_length, chunk, chunk),
                             attention(layer, figures_.n_ctx, c_.canvas_length, figures_.pass_rows)});
        }
        return most;
    }

    // Scores [visible, rows of a segment, heads]; V in float32 as it lies in the cache, and transposed; beside them
    // what waits, and its holes, of all rows.
    int64_t attention(const dg_layer_config &layer, int32_t n_visible, int64_t segment, int64_t rows) const {
        const int64_t visible = view_rows(n_visible, figures_.slots(layer.sliding));
        const int64_t q = int64_t{layer.head_dim} * c_.n_head;
        const int64_t kv = int64_t{layer.head_dim} * layer.n_head_kv;
        return visible * (segment * c_.n_head + 2 * kv) + rows * (2 * q + 2 * kv + 2 * int64_t{c_.n_embd});
    }

    // The sampler's operators are part of a pass's graph, and share its memory; the graph that makes a signal of logits
    // stands by itself.
    size_t sampling() const {
        const auto rows = static_cast<size_t>(figures_.n_rows);
        size_t bytes =
            SampleIo::bytes(figures_.pass_rows) + rows * (static_cast<size_t>(c_.n_embd) + 1) * sizeof(float);
        size_t in_pass = sample_bytes(c_.n_vocab, figures_.pass_rows);
        if (c_.has_self_conditioning) {
            const size_t signal = signal_bytes(c_.n_vocab, c_.n_embd, figures_.pass_rows);
            in_pass = std::max(in_pass, signal);
            bytes += signal + sizeof(float) * static_cast<size_t>(figures_.pass_rows) * static_cast<size_t>(c_.n_vocab);
        }
        bytes += 2 * static_cast<size_t>(figures_.pass_rows) * sizeof(int32_t); // which rows are flat
        if (with_kernels_) {
            bytes += cuda::candidate_bytes(figures_.n_rows, cuda::candidate_capacity(c_.n_vocab));
        }
        const size_t pass = sizeof(float) * static_cast<size_t>(intermediate());
        return bytes + (in_pass > pass ? in_pass - pass : 0);
    }
};

} // namespace

dg_needs session_needs(const dg_config &config, const std::vector<dg_layer_config> &layers,
                       const dg_session_options &session, std::vector<size_t> &cache) {
    check_figures(config, layers);
    const Needs needs(config, layers, session);
    cache = needs.cache();
    return needs.sums();
}

} // namespace dg
