#include "pass/ggml_ops.h"

#include <cmath>

namespace dg {
namespace {

// Vulkan's get_rows gives up on ids that do not begin at a multiple of a device's alignment: 4 to 64 bytes of most, 256
// at most.
constexpr size_t ALIGNED_BYTES = 256;

} // namespace

bool GgmlOps::device_computes(ggml_tensor *node) const {
    return to_.is_on_cpu() ||
           ggml_backend_dev_supports_op(to_.model.devices()[static_cast<size_t>(to_.device)].handle, node);
}

ggml_tensor *GgmlOps::rows(ggml_tensor *matrix, ggml_tensor *ids) {
    const bool aligned = ids->view_offs % ALIGNED_BYTES == 0;
    return ggml_get_rows(to_.ctx, matrix, aligned || to_.is_on_cpu() ? ids : ggml_cont(to_.ctx, ids));
}

ggml_tensor *GgmlOps::norm(ggml_tensor *x, ggml_tensor *weight, ggml_tensor *add, float scale) {
    x = ggml_rms_norm(to_.ctx, x, to_.model.config().norm_eps);
    x = weight ? ggml_mul(to_.ctx, x, weight) : x;
    x = add ? ggml_add(to_.ctx, add, x) : x;
    return scale == 1.0f ? x : ggml_scale(to_.ctx, x, scale);
}

ggml_tensor *GgmlOps::multiply(ggml_tensor *weight, Operand &x, float softcap) {
    watch(weight, x.rows, nullptr);
    to_.rounds(x.rows, weight->type);
    const LowRank *low = beside(weight);
    ggml_tensor *product = mark(ggml_mul_mat(to_.ctx, weight, x.rows), Part::PRODUCTS);
    if (low) {
        // Into the product itself, which the head has placed in its logits.
        product = mark(ggml_add_inplace(to_.ctx, product, low_product(*low, x.rows)), Part::PRODUCTS);
    }
    if (softcap > 0.0f) {
        product = ggml_tanh_inplace(to_.ctx, ggml_scale_inplace(to_.ctx, product, 1.0f / softcap));
        product = ggml_scale_inplace(to_.ctx, product, softcap);
    }
    return product;
}

// cuBLAS multiplies float32 matrices in TF32, as ggml-cuda asks it to: ten bits of each factor are left, whatever
// precision an operator wants (benchmarks/results/tf32.md has the routers that chose otherwise). Three columns or fewer
// it leaves to a kernel of its own, in float32, so the rows go there two by two.
ggml_tensor *GgmlOps::route(ggml_tensor *router, ggml_tensor *x) {
    if (!to_.model.devices().is_cuda(to_.device)) {
        return multiply(router, x);
    }
    watch(router, x, nullptr);
    const int64_t columns = to_.n % 2 == 0 ? 2 : 1;
    ggml_tensor *pairs = ggml_reshape_3d(to_.ctx, x, x->ne[0], columns, to_.n / columns);
    ggml_tensor *product = mark(ggml_mul_mat(to_.ctx, router, pairs), Part::PRODUCTS);
    product = ggml_reshape_2d(to_.ctx, product, router->ne[1], to_.n);
    const LowRank *low = beside(router);
    return low ? mark(ggml_add(to_.ctx, product, low_product(*low, x)), Part::PRODUCTS) : product;
}

// B (scales * (A x))
ggml_tensor *GgmlOps::low_product(const LowRank &low, ggml_tensor *x) const {
    ggml_tensor *t = mark(ggml_mul_mat(to_.ctx, low.a, x), Part::PRODUCTS);
    return mark(ggml_mul_mat(to_.ctx, low.b, ggml_mul(to_.ctx, t, low.scales)), Part::PRODUCTS);
}

// The same of the experts that each row has selected: x [n_in, 1 or n_used, n] -> [n_out, n_used, n].
ggml_tensor *GgmlOps::low_experts(const LowRank &low, ggml_tensor *x, ggml_tensor *selected) const {
    ggml_tensor *t = mark(ggml_mul_mat_id(to_.ctx, low.a, x, selected), Part::EXPERTS);
    return mark(ggml_mul_mat_id(to_.ctx, low.b, ggml_mul(to_.ctx, t, low.scales), selected), Part::EXPERTS);
}

ggml_tensor *GgmlOps::multiply_experts(ggml_tensor *weights, ggml_tensor *x, ggml_tensor *selected) const {
    watch(weights, x, selected);
    to_.rounds(x, weights->type);
    return mark(ggml_mul_mat_id(to_.ctx, weights, x, selected), Part::EXPERTS);
}

// gelu_tanh(gate) * up, in float32: gelu_tanh(g) = g * sigmoid(g * w) with w = 2 sqrt(2/pi) (1 + 0.044715 g^2), and
// swiglu_split(a, b) = a * sigmoid(a) * b. ggml's own CPU gelu reads a half-precision table, which costs 3e-4 in
// the logits; this form costs 6e-7 and runs on every device.
ggml_tensor *GgmlOps::gelu_mul(ggml_tensor *gate, ggml_tensor *up) const {
    const float a = 2.0f * std::sqrt(2.0f / 3.14159265358979f);
    // Not ggml_sqr: CUDA's takes no view, as the experts' gate is, and gives up.
    ggml_tensor *w = ggml_scale_bias(to_.ctx, ggml_mul(to_.ctx, gate, gate), a * 0.044715f, a);
    return ggml_swiglu_split(to_.ctx, ggml_mul(to_.ctx, gate, w), ggml_div(to_.ctx, up, w));
}

ggml_tensor *GgmlOps::gated(ggml_tensor *x, ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down) {
    Operand in = {x, to_.n, {}};
    ggml_tensor *hidden = gelu_mul(multiply(gate, in, 0.0f), multiply(up, in, 0.0f));
    return multiply(down, hidden);
}

ggml_tensor *GgmlOps::experts(const LayerWeights &l, ggml_tensor *x, ggml_tensor *selected, ggml_tensor *weights) {
    const dg_config &c = to_.model.config();
    const int64_t n_used = c.n_expert_used;
    x = ggml_reshape_3d(to_.ctx, x, c.n_embd, 1, to_.n);
    ggml_tensor *gate = nullptr;
    ggml_tensor *up = nullptr; // both [n_ff_exp, n_used, n]
    const LowRank *low_gate_up = beside(l.gate_up_exps ? l.gate_up_exps : l.gate_exps);
    ggml_tensor *low = low_gate_up ? low_experts(*low_gate_up, x, selected) : nullptr;
    const auto half = [&](ggml_tensor *both, int64_t first) {
        return ggml_view_3d(to_.ctx, both, c.n_ff_exp, n_used, to_.n, both->nb[1], both->nb[2],
                            static_cast<size_t>(first) * both->nb[0]);
    };
    if (l.gate_up_exps) {
        ggml_tensor *both = multiply_experts(l.gate_up_exps, x, selected);
        both = low ? ggml_add(to_.ctx, both, low) : both;
        gate = half(both, 0);
        up = half(both, c.n_ff_exp);
    } else {
        gate = multiply_experts(l.gate_exps, x, selected);
        up = multiply_experts(l.up_exps, x, selected);
        gate = low ? ggml_add(to_.ctx, gate, half(low, 0)) : gate;
        up = low ? ggml_add(to_.ctx, up, half(low, c.n_ff_exp)) : up;
    }
    ggml_tensor *hidden = gelu_mul(gate, up);
    ggml_tensor *out = multiply_experts(l.down_exps, hidden, selected); // [n_embd, n_used, n]
    const LowRank *low_down = beside(l.down_exps);
    out = low_down ? ggml_add(to_.ctx, out, low_experts(*low_down, hidden, selected)) : out;
    out = ggml_mul(to_.ctx, out, ggml_reshape_3d(to_.ctx, weights, 1, n_used, to_.n));
    ggml_tensor *sum = nullptr;
    for (int64_t i = 0; i < n_used; ++i) {
        ggml_tensor *one = ggml_view_2d(to_.ctx, out, c.n_embd, to_.n, out->nb[2], static_cast<size_t>(i) * out->nb[1]);
        sum = sum ? ggml_add(to_.ctx, sum, one) : one;
    }
    return n_used == 1 ? ggml_cont(to_.ctx, sum) : sum;
}

// The cache's rows that a segment sees, as [head_dim, rows, n_head_kv].
ggml_tensor *GgmlOps::read_cache(const Segment &s, const LayerWeights &l, ggml_tensor *cache) const {
    const int64_t rows = to_.cache.view_rows(l.sliding, s.end);
    return ggml_view_3d(to_.ctx, cache, l.head_dim, rows, l.n_head_kv, cache->nb[1],
                        ggml_row_size(cache->type, l.head_dim), 0);
}

ggml_tensor *GgmlOps::attend(const Segment &s, const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q) {
    ggml_tensor *k = read_cache(s, l, cache.k);
    ggml_tensor *v = read_cache(s, l, cache.v);
    if (v->type != GGML_TYPE_F32) {
        v = mark(ggml_cast(to_.ctx, v, GGML_TYPE_F32), Part::ATTENTION);
    }
    v = mark(ggml_cont(to_.ctx, ggml_permute(to_.ctx, v, 1, 0, 2, 3)), Part::ATTENTION); // [rows, head_dim, n_head_kv]
    // Also where a canvas sees all there is: it hides what the view has beyond that.
    ggml_tensor *input = l.sliding ? to_.inputs().mask_sliding : to_.inputs().mask_full;
    const int64_t rows = k->ne[1];
    const size_t first = static_cast<size_t>(s.first) * to_.cache.slots(l.sliding) * ggml_type_size(input->type);
    ggml_tensor *mask = ggml_view_2d(to_.ctx, input, rows, s.n, ggml_row_size(input->type, rows), first);
    to_.rounds(q, k->type);
    q = ggml_permute(to_.ctx, q, 0, 2, 1, 3);
    if (k->type == GGML_TYPE_F32) {
        // A cache in single precision is for those who want no less. Vulkan copies strided factors in half
        // precision: 2e-4 in the logits of a small net, 1e-6 with these.
        k = mark(ggml_cont(to_.ctx, k), Part::ATTENTION);
        q = mark(ggml_cont(to_.ctx, q), Part::ATTENTION);
    }
    ggml_tensor *scores = ggml_mul_mat(to_.ctx, k, q); // [rows, n, n_head]
    if (!device_computes(scores)) {
        // Vulkan multiplies by no quantized matrix whose rows are strided. In place of the scores alone, the CPU
        // would get them, their softmax and the cache of each layer.
        scores->src[0] = mark(ggml_cast(to_.ctx, k, GGML_TYPE_F32), Part::ATTENTION);
    }
    mark(scores, Part::ATTENTION);
    // Norms in place of a scale make large scores, which a product in half precision may not hold; and CUDA's keeps
    // a second copy of them then, in half precision.
    ggml_mul_mat_set_prec(scores, GGML_PREC_F32);
    scores = mark(ggml_soft_max_ext(to_.ctx, scores, mask, 1.0f, 0.0f), Part::ATTENTION);
    ggml_tensor *out = mark(ggml_mul_mat(to_.ctx, v, scores), Part::ATTENTION); // [head_dim, n, n_head]
    out = mark(ggml_cont(to_.ctx, ggml_permute(to_.ctx, out, 0, 2, 1, 3)), Part::ATTENTION);
    return ggml_reshape_2d(to_.ctx, out, l.head_dim * to_.model.config().n_head, s.n);
}

} // namespace dg
