// The operators that a forward pass is made of, as graph.cpp asks for them: CpuOps builds them of the CPU's own
// (csrc/cpu), GgmlOps of ggml's, which every device has. What a device wants done differently is in there, not in the
// pass.
#pragma once

#include "adapter/adapter.h"
#include "cpu/finite.h"
#include "cpu/product.h"
#include "pass/cache.h"
#include "pass/importance.h"
#include "pass/pass.h"

#include "ggml.h"

#include <cstdint>

namespace dg {

// What a pass is built of and into.
struct Building {
    const Model &model;
    const KvCache &cache;
    const GraphIo &io;
    const Pass &pass;
    Importance *importance;         // nullptr unless it is collected
    const ActiveAdapters *adapters; // nullptr: none
    int64_t n;                      // rows of all segments
    Graph &graph;
    ggml_context *ctx;
    int32_t device = 0;                   // of what is being built
    const ggml_tensor *checked = nullptr; // the last that finite() looked at

    const DeviceIo &inputs() const { return io.devices[static_cast<size_t>(device)]; }
    bool is_on_cpu() const { return device == model.devices().cpu(); }
    // Called before ggml rounds x [., .] to the integers of a quantized type, in which NaN and infinity would vanish.
    // A graph for a device has no such look: it would cost two launches for each matrix there.
    void rounds(ggml_tensor *x, ggml_type type) {
        if (is_on_cpu() && ggml_is_quantized(type) && x != checked) {
            finite_op(ctx, graph.nodes, graph.work, x);
            checked = x;
        }
    }
};

// One segment of the pass: rows first .. first + n - 1.
struct Segment {
    int64_t first;
    int64_t n;
    int32_t end; // one past its last position
};

class Ops {
  public:
    explicit Ops(Building &to) : to_(to) {}
    virtual ~Ops() = default;
    Ops(const Ops &) = delete;
    Ops &operator=(const Ops &) = delete;

    // The rows of a matrix that `ids` names.
    virtual ggml_tensor *rows(ggml_tensor *matrix, ggml_tensor *ids) = 0;
    // scale * (add + x / rms(x) * weight); without a weight it is 1, without `add` neither that nor the scale counts.
    virtual ggml_tensor *norm(ggml_tensor *x, ggml_tensor *weight = nullptr, ggml_tensor *add = nullptr,
                              float scale = 1.0f) = 0;
    // weight [n_in, n_out] times x, with what runs beside it in this pass -> [n_out, n]; softcapped where softcap > 0.
    virtual ggml_tensor *multiply(ggml_tensor *weight, Operand &x, float softcap = 0.0f) = 0;
    ggml_tensor *multiply(ggml_tensor *weight, ggml_tensor *x) {
        Operand in = {x, to_.n, {}};
        return multiply(weight, in);
    }
    // The same of a layer's router, in true float32: a near tie between two experts is decided by the last bits.
    virtual ggml_tensor *route(ggml_tensor *router, ggml_tensor *x) { return multiply(router, x); }
    // down(gelu_tanh(gate x) * (up x))
    virtual ggml_tensor *gated(ggml_tensor *x, ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down) = 0;
    // The same of the experts that `selected` I32 [n_used, n] names of a layer, x [n_embd, n]: the sum of their
    // outputs, times `weights` F32 [n_used, n].
    virtual ggml_tensor *experts(const LayerWeights &l, ggml_tensor *x, ggml_tensor *selected,
                                 ggml_tensor *weights) = 0;
    // softmax(q k) v of a segment over the cache's rows that it sees; scale 1: the norms of q and k take its place.
    // q: [head_dim, n_head, n] -> [head_dim * n_head, n].
    virtual ggml_tensor *attend(const Segment &s, const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q) = 0;

  protected:
    Building &to_;

    // Every product with a weight asks this: what runs beside the matrix in this pass's mode; null: nothing.
    const LowRank *beside(const ggml_tensor *weight) const {
        return to_.adapters ? to_.adapters->find(weight, to_.pass.causal()) : nullptr;
    }
    // And tells this, before it: x [n_in, n], or [n_in, 1 or n_used, n] of the experts that `selected` names.
    void watch(const ggml_tensor *weight, ggml_tensor *x, ggml_tensor *selected) const {
        if (to_.importance) {
            to_.importance->watch(to_.ctx, to_.graph.nodes, weight, x, selected);
        }
    }
};

} // namespace dg
