#include "pass/cpu_ops.h"

#include "cpu/attention.h"
#include "cpu/norm.h"

namespace dg {

ggml_tensor *CpuOps::norm(ggml_tensor *x, ggml_tensor *weight, ggml_tensor *add, float scale) {
    return norm_op(to_.ctx, *to_.model.kernels(), to_.graph.work, x, weight, add, scale, to_.model.config().norm_eps);
}

ggml_tensor *CpuOps::multiply(ggml_tensor *weight, Operand &x, float softcap) {
    watch(weight, x.rows, nullptr);
    return products().multiply(weight, x, softcap, beside(weight));
}

ggml_tensor *CpuOps::gated(ggml_tensor *x, ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down) {
    if (to_.importance) {
        return GgmlOps::gated(x, gate, up, down);
    }
    Operand in = {x, to_.n, {}};
    Operand hidden = products().gated(gate, up, in, beside(gate), beside(up));
    return products().multiply(down, hidden, 0.0f, beside(down));
}

ggml_tensor *CpuOps::experts(const LayerWeights &l, ggml_tensor *x, ggml_tensor *selected, ggml_tensor *weights) {
    if (to_.importance) {
        return GgmlOps::experts(l, x, selected, weights);
    }
    return products().experts(x, selected, weights, l.gate_up_exps, l.gate_exps, l.up_exps, l.down_exps,
                              beside(l.gate_up_exps ? l.gate_up_exps : l.gate_exps), beside(l.down_exps));
}

ggml_tensor *CpuOps::attend(const Segment &s, const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q) {
    Visible visible;
    visible.first = to_.pass.first_position();
    visible.end = s.end;
    visible.slots = to_.cache.slots(l.sliding);
    visible.window = l.sliding ? to_.model.config().sliding_window : 0;
    visible.causal = to_.pass.causal();
    visible.n_past = to_.pass.n_past;
    return attention_op(to_.ctx, *to_.model.kernels(), to_.graph.work, to_.io.scratch, q, cache.k, cache.v, l.n_head_kv,
                        visible);
}

} // namespace dg
