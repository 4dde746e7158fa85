#include "pass/graph.h"

#include "base/error.h"
#include "cpu/attention.h"
#include "cpu/norm.h"
#include "cpu/product.h"
#include "cpu/self_conditioning.h"
#include "sample/signal_graph.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dg {
namespace {

constexpr size_t NODES_PER_LAYER = 96;   // 66 in the widest layer, plus 2 for each expert that a row uses
constexpr size_t NODES_PER_SEGMENT = 32; // of a layer: 27 in its attention
constexpr size_t NODES_BESIDES = 64;
constexpr size_t NODES_OF_ADAPTERS = 64; // of a layer: 4 for each of 11 products, and views
// Vulkan's get_rows gives up on ids that do not begin at a multiple of a device's alignment: 4 to 64 bytes of most, 256
// at most.
constexpr size_t ALIGNED_BYTES = 256;

Graph make_graph(size_t n_nodes) {
    Graph graph;
    ggml_init_params params = {};
    params.mem_size = ggml_graph_overhead_custom(n_nodes, false) + n_nodes * ggml_tensor_overhead();
    params.no_alloc = true;
    graph.context.reset(ggml_init(params));
    if (!graph.context) {
        throw Error(DG_ERROR_MEMORY, format("%zu bytes for a graph were refused", params.mem_size));
    }
    graph.nodes = ggml_new_graph_custom(graph.context.get(), n_nodes, false);
    return graph;
}

// Remembers which device each node belongs to: those that were made since the last call.
class Settler {
  public:
    Settler(Graph &graph, const Devices &devices) : graph_(graph), devices_(devices) {}

    void settle(int32_t device) {
        ggml_context *ctx = graph_.context.get();
        ggml_tensor *t = last_ ? ggml_get_next_tensor(ctx, last_) : ggml_get_first_tensor(ctx);
        for (; t; t = ggml_get_next_tensor(ctx, t)) {
            last_ = t;
            if (!devices_.empty() && !is_view(t)) {
                graph_.devices.emplace_back(t, t->op == GGML_OP_CUSTOM ? devices_.cpu() : device);
            }
        }
    }

  private:
    Graph &graph_;
    const Devices &devices_;
    ggml_tensor *last_ = nullptr;

    // Views are where their tensor is.
    static bool is_view(const ggml_tensor *t) {
        return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
               t->op == GGML_OP_TRANSPOSE;
    }
};

ggml_tensor *rows_of_io(ggml_context *ctx, ggml_tensor *input, int64_t first, int64_t n) {
    return ggml_view_2d(ctx, input, input->ne[0], n, input->nb[1], static_cast<size_t>(first) * input->nb[1]);
}

class PassBuilder {
  public:
    PassBuilder(const Model &model, const KvCache &cache, const GraphIo &io, const Pass &pass, Importance *importance,
                const ActiveAdapters *adapters)
        : model_(model), c_(model.config()), cache_(cache), io_(io), pass_(pass), importance_(importance),
          adapters_(adapters), n_(pass.rows()),
          graph_(make_graph(
              static_cast<size_t>(c_.n_layer) *
                  (NODES_PER_LAYER + (adapters ? NODES_OF_ADAPTERS : 0) + 2 * static_cast<size_t>(c_.n_expert_used) +
                   NODES_PER_SEGMENT * pass.segments.size()) +
              NODES_BESIDES + (adapters ? NODES_OF_ADAPTERS : 0) +
              (pass.sampled || pass.watched ? sample_nodes(c_.n_vocab, n_) + signal_nodes(c_.n_vocab, c_.n_embd) : 0))),
          ctx_(graph_.context.get()), settler_(graph_, model.devices()) {}

    Graph build() {
        const Weights &w = model_.weights();
        const Placement &placement = model_.placement();
        ids_ = ggml_view_1d(ctx_, io_.ids, n_, static_cast<size_t>(pass_.first_row) * io_.ids->nb[0]);
        ggml_tensor *x = embed();
        for (size_t i = 0; i < w.layers.size(); ++i) {
            const bool only_cache = pass_.mode == Mode::ENCODE && i + 1 == w.layers.size();
            device_ = placement.layers[i];
            x = layer(i, x, only_cache);
        }
        if (pass_.has_logits()) {
            device_ = placement.head;
            head(x);
            settle();
        }
        return std::move(graph_);
    }

  private:
    const Model &model_;
    const dg_config &c_;
    const KvCache &cache_;
    const GraphIo &io_;
    const Pass pass_;
    Importance *importance_; // nullptr unless it is collected
    const ActiveAdapters *adapters_;
    const int64_t n_; // rows of all segments
    Graph graph_;
    ggml_context *ctx_;
    Settler settler_;
    int32_t device_ = 0; // of what is being built
    ggml_tensor *ids_ = nullptr;

    // What was built since the last call belongs to device_.
    void settle() { settler_.settle(device_); }

    // What is built until this ends belongs to another device.
    class Elsewhere {
      public:
        Elsewhere(PassBuilder &builder, int32_t device) : builder_(builder), here_(builder.device_) {
            builder_.settle();
            builder_.device_ = device;
        }
        ~Elsewhere() {
            builder_.settle();
            builder_.device_ = here_;
        }
        Elsewhere(const Elsewhere &) = delete;
        Elsewhere &operator=(const Elsewhere &) = delete;

      private:
        PassBuilder &builder_;
        const int32_t here_;
    };

    bool device_computes(ggml_tensor *node) const {
        const Devices &devices = model_.devices();
        return device_ == devices.cpu() ||
               ggml_backend_dev_supports_op(devices[static_cast<size_t>(device_)].handle, node);
    }

    const DeviceIo &inputs() const { return io_.devices[static_cast<size_t>(device_)]; }

    // The first n entries of an input of the largest size.
    ggml_tensor *head_of(ggml_tensor *input) const { return ggml_view_1d(ctx_, input, n_, 0); }

    // scale * (add + x / rms(x) * weight); without a weight it is 1, without `add` neither that nor the scale counts.
    ggml_tensor *norm(ggml_tensor *x, ggml_tensor *weight = nullptr, ggml_tensor *add = nullptr, float scale = 1.0f) {
        if (own_operators()) {
            return norm_op(ctx_, *model_.kernels(), graph_.work, x, weight, add, scale, c_.norm_eps);
        }
        x = ggml_rms_norm(ctx_, x, c_.norm_eps);
        x = weight ? ggml_mul(ctx_, x, weight) : x;
        x = add ? ggml_add(ctx_, add, x) : x;
        return scale == 1.0f ? x : ggml_scale(ctx_, x, scale);
    }

    bool own_operators() const { return io_.scratch && device_ == model_.devices().cpu(); }
    ProductOps own() { return {ctx_, *model_.kernels(), graph_.work, io_.scratch}; }

    // Every product with a weight matrix goes through these three, or is one with the operators around it in gated_mlp
    // and experts. -> [n_out, n]
    ggml_tensor *multiply(ggml_tensor *weight, Operand &x, float softcap = 0.0f) {
        if (importance_) {
            importance_->watch(ctx_, graph_.nodes, weight, x.rows, nullptr);
        }
        const LowRank *low = low_rank(weight);
        if (own_operators()) {
            return own().multiply(weight, x, softcap, low);
        }
        ggml_tensor *product = mark(ggml_mul_mat(ctx_, weight, x.rows), Part::PRODUCTS);
        if (low) {
            // Into the product itself, which the head has placed in its logits.
            product = mark(ggml_add_inplace(ctx_, product, low_product(*low, x.rows)), Part::PRODUCTS);
        }
        if (softcap > 0.0f) {
            product = ggml_tanh_inplace(ctx_, ggml_scale_inplace(ctx_, product, 1.0f / softcap));
            product = ggml_scale_inplace(ctx_, product, softcap);
        }
        return product;
    }
    ggml_tensor *multiply(ggml_tensor *weight, ggml_tensor *x) {
        Operand in = {x, n_, nullptr, nullptr};
        return multiply(weight, in);
    }
    // What runs beside a matrix in this pass; null: nothing.
    const LowRank *low_rank(const ggml_tensor *weight) const {
        return adapters_ ? adapters_->find(weight, pass_.causal()) : nullptr;
    }

    // B (scales * (A x))
    ggml_tensor *low_product(const LowRank &low, ggml_tensor *x) const {
        ggml_tensor *t = mark(ggml_mul_mat(ctx_, low.a, x), Part::PRODUCTS);
        return mark(ggml_mul_mat(ctx_, low.b, ggml_mul(ctx_, t, low.scales)), Part::PRODUCTS);
    }
    // The same of the experts that each row has selected: x [n_in, 1 or n_used, n] -> [n_out, n_used, n].
    ggml_tensor *low_experts(const LowRank &low, ggml_tensor *x, ggml_tensor *selected) const {
        ggml_tensor *t = mark(ggml_mul_mat_id(ctx_, low.a, x, selected), Part::EXPERTS);
        return mark(ggml_mul_mat_id(ctx_, low.b, ggml_mul(ctx_, t, low.scales), selected), Part::EXPERTS);
    }

    ggml_tensor *multiply_experts(ggml_tensor *weights, ggml_tensor *x, ggml_tensor *selected) const {
        if (importance_) {
            importance_->watch(ctx_, graph_.nodes, weights, x, selected);
        }
        return mark(ggml_mul_mat_id(ctx_, weights, x, selected), Part::EXPERTS);
    }

    // gelu_tanh(gate) * up, in float32: gelu_tanh(g) = g * sigmoid(g * w) with w = 2 sqrt(2/pi) (1 + 0.044715 g^2), and
    // swiglu_split(a, b) = a * sigmoid(a) * b. ggml's own CPU gelu reads a half-precision table, which costs 3e-4 in
    // the logits; this form costs 6e-7 and runs on every device.
    ggml_tensor *gelu_mul(ggml_tensor *gate, ggml_tensor *up) const {
        const float a = 2.0f * std::sqrt(2.0f / 3.14159265358979f);
        // Not ggml_sqr: CUDA's takes no view, as the experts' gate is, and gives up.
        ggml_tensor *w = ggml_scale_bias(ctx_, ggml_mul(ctx_, gate, gate), a * 0.044715f, a);
        return ggml_swiglu_split(ctx_, ggml_mul(ctx_, gate, w), ggml_div(ctx_, up, w));
    }

    ggml_tensor *gated_mlp(ggml_tensor *x, ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down) {
        Operand in = {x, n_, nullptr, nullptr};
        if (own_operators() && !importance_) {
            Operand hidden = own().gated(gate, up, in, low_rank(gate), low_rank(up));
            return own().multiply(down, hidden, 0.0f, low_rank(down));
        }
        ggml_tensor *gated = gelu_mul(multiply(gate, in), multiply(up, in));
        return multiply(down, gated);
    }

    // -> [n_embd, n]
    ggml_tensor *embed() {
        const Weights &w = model_.weights();
        device_ = model_.placement().input;
        const bool aligned = static_cast<size_t>(pass_.first_row) * io_.ids->nb[0] % ALIGNED_BYTES == 0;
        const bool copied = !aligned && device_ != model_.devices().cpu();
        ggml_tensor *x = ggml_get_rows(ctx_, w.input_embd, copied ? ggml_cont(ctx_, ids_) : ids_);
        settle();
        device_ = model_.placement().layers.front();
        x = ggml_scale(ctx_, x, std::sqrt(static_cast<float>(c_.n_embd)));
        if (pass_.causal()) {
            return x;
        }
        if (c_.has_self_conditioning) {
            ggml_tensor *from = rows_of_io(ctx_, io_.signal, pass_.first_row, n_);
            ggml_tensor *signal =
                gated_mlp(norm(from, w.self_cond_pre_norm), w.self_cond_gate, w.self_cond_up, w.self_cond_down);
            x = ggml_add(ctx_, x, signal);
        }
        return norm(x); // also on the first step, whose signal is zero
    }

    // Angles: float32(position) / divisor, to the last bit those of the reference on the CPU (vendor/patches/0002).
    // With the base for ggml, GPUs would take powers of a rounded base^(-2/D), which are off by 1e-7 of the position
    // and more: at position 1,000 Vulkan's sines by 1e-4, with the divisors by 7e-6.
    ggml_tensor *rope(const LayerWeights &l, ggml_tensor *x) const {
        return ggml_rope_ext(ctx_, x, head_of(inputs().positions), l.rope_divisors, static_cast<int>(l.head_dim),
                             GGML_ROPE_TYPE_NEOX, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    }

    // One segment of the pass: rows first .. first + n - 1.
    struct Segment {
        int64_t first;
        int64_t n;
        int32_t end; // one past its last position
    };

    // The segment's rows of x [width, heads, rows].
    ggml_tensor *rows_of(const Segment &s, ggml_tensor *x) const {
        return s.n == n_ ? x
                         : ggml_view_3d(ctx_, x, x->ne[0], x->ne[1], s.n, x->nb[1], x->nb[2],
                                        static_cast<size_t>(s.first) * x->nb[2]);
    }

    void write_cache(const Segment &s, ggml_tensor *cache, ggml_tensor *rows, bool sliding) const {
        ggml_tensor *input = sliding ? inputs().slots_sliding : inputs().slots_full;
        ggml_tensor *slots = ggml_view_1d(ctx_, input, s.n, static_cast<size_t>(s.first) * input->nb[0]);
        ggml_tensor *flat = ggml_reshape_2d(ctx_, rows_of(s, rows), cache->ne[0], s.n);
        ggml_build_forward_expand(graph_.nodes, ggml_set_rows(ctx_, cache, flat, slots));
    }

    // The cache's rows that a segment sees, as [head_dim, rows, n_head_kv].
    ggml_tensor *read_cache(const Segment &s, const LayerWeights &l, ggml_tensor *cache) const {
        const int64_t rows = cache_.visible_rows(l.sliding, s.end);
        return ggml_view_3d(ctx_, cache, l.head_dim, rows, l.n_head_kv, cache->nb[1],
                            ggml_row_size(cache->type, l.head_dim), 0);
    }

    // q: [head_dim, n_head, n] -> [head_dim * n_head, n]. Scale 1: the norms of q and k take its place.
    ggml_tensor *attend(const Segment &s, const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q) {
        if (own_operators()) {
            Visible visible;
            visible.first = pass_.first_position();
            visible.end = s.end;
            visible.slots = cache_.slots(l.sliding);
            visible.window = l.sliding ? c_.sliding_window : 0;
            visible.causal = pass_.causal();
            visible.n_past = pass_.n_past;
            return attention_op(ctx_, *model_.kernels(), graph_.work, io_.scratch, q, cache.k, cache.v, l.n_head_kv,
                                visible);
        }
        ggml_tensor *k = read_cache(s, l, cache.k);
        ggml_tensor *v = read_cache(s, l, cache.v);
        if (v->type != GGML_TYPE_F32) {
            v = mark(ggml_cast(ctx_, v, GGML_TYPE_F32), Part::ATTENTION);
        }
        v = mark(ggml_cont(ctx_, ggml_permute(ctx_, v, 1, 0, 2, 3)), Part::ATTENTION); // [rows, head_dim, n_head_kv]
        ggml_tensor *mask = nullptr;
        if (needs_mask(model_, pass_, l.sliding)) {
            ggml_tensor *input = l.sliding ? inputs().mask_sliding : inputs().mask_full;
            const int64_t rows = k->ne[1];
            const size_t first = static_cast<size_t>(s.first) * cache_.slots(l.sliding) * ggml_type_size(input->type);
            mask = ggml_view_2d(ctx_, input, rows, s.n, ggml_row_size(input->type, rows), first);
        }
        q = ggml_permute(ctx_, q, 0, 2, 1, 3);
        if (k->type == GGML_TYPE_F32) {
            // A cache in single precision is for those who want no less. Vulkan copies strided factors in half
            // precision: 2e-4 in the logits of a small net, 1e-6 with these.
            k = mark(ggml_cont(ctx_, k), Part::ATTENTION);
            q = mark(ggml_cont(ctx_, q), Part::ATTENTION);
        }
        ggml_tensor *scores = ggml_mul_mat(ctx_, k, q); // [rows, n, n_head]
        if (!device_computes(scores)) {
            // Vulkan multiplies by no quantized matrix whose rows are strided. In place of the scores alone, the CPU
            // would get them, their softmax and the cache of each layer.
            scores->src[0] = mark(ggml_cast(ctx_, k, GGML_TYPE_F32), Part::ATTENTION);
        }
        mark(scores, Part::ATTENTION);
        // Norms in place of a scale make large scores, which a product in half precision may not hold; and CUDA's keeps
        // a second copy of them then, in half precision.
        ggml_mul_mat_set_prec(scores, GGML_PREC_F32);
        scores = mark(ggml_soft_max_ext(ctx_, scores, mask, 1.0f, 0.0f), Part::ATTENTION);
        ggml_tensor *out = mark(ggml_mul_mat(ctx_, v, scores), Part::ATTENTION); // [head_dim, n, n_head]
        out = mark(ggml_cont(ctx_, ggml_permute(ctx_, out, 0, 2, 1, 3)), Part::ATTENTION);
        return ggml_reshape_2d(ctx_, out, l.head_dim * c_.n_head, s.n);
    }

    ggml_tensor *attention(size_t index, ggml_tensor *x, bool only_cache) {
        const LayerWeights &l = model_.weights().layers[index];
        Operand h = {norm(x, l.attn_norm), n_, nullptr, nullptr};
        ggml_tensor *k = multiply(l.attn_k, h);
        ggml_tensor *v = l.attn_v ? multiply(l.attn_v, h) : k; // the raw projection, before k_norm and rope
        k = ggml_reshape_3d(ctx_, k, l.head_dim, l.n_head_kv, n_);
        v = ggml_reshape_3d(ctx_, v, l.head_dim, l.n_head_kv, n_);
        k = rope(l, norm(k, l.attn_k_norm));
        v = norm(v);
        ggml_tensor *q = nullptr;
        if (!only_cache) {
            q = ggml_reshape_3d(ctx_, multiply(l.attn_q, h), l.head_dim, c_.n_head, n_);
            q = rope(l, norm(q, l.attn_q_norm));
        }
        ggml_tensor *attended = nullptr;
        {
            const Elsewhere cache_device(*this, model_.placement().cache[index]);
            attended = through_cache(l, cache_.layers()[index], q, k, v);
        }
        if (only_cache) {
            return nullptr;
        }
        return norm(multiply(l.attn_output, attended), l.post_attention_norm, x);
    }

    // Writes k and v, and attends with q, which is null where nobody reads the result; one segment after the other.
    ggml_tensor *through_cache(const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q, ggml_tensor *k,
                               ggml_tensor *v) {
        ggml_tensor *attended = nullptr;
        int64_t first = 0;
        for (const int32_t rows : pass_.segments) {
            const Segment s = {first, rows, pass_.end(rows)};
            first += rows;
            write_cache(s, cache.k, k, l.sliding);
            write_cache(s, cache.v, v, l.sliding);
            if (!q) {
                continue;
            }
            attended = attend(s, l, cache, rows_of(s, q));
            if (pass_.segments.size() > 1) {
                // Carried out before the next segment writes the cache: a graph runs in the order of this call.
                ggml_tensor *all = inputs().attended;
                const size_t row = static_cast<size_t>(attended->ne[0]) * sizeof(float);
                ggml_tensor *place =
                    ggml_view_2d(ctx_, all, attended->ne[0], s.n, row, static_cast<size_t>(s.first) * row);
                ggml_build_forward_expand(graph_.nodes, ggml_cpy(ctx_, attended, place));
                attended = ggml_view_2d(ctx_, all, attended->ne[0], n_, row, 0);
            }
        }
        return attended;
    }

    // Both inputs come from the raw residual x: the router has a norm of its own, without a weight.
    ggml_tensor *experts(size_t index, ggml_tensor *x) {
        const LayerWeights &l = model_.weights().layers[index];
        const int64_t n_used = c_.n_expert_used;
        ggml_tensor *probabilities = ggml_soft_max(ctx_, multiply(l.router, norm(x, l.router_scale))); // [n_expert, n]
        ggml_tensor *selected =
            ggml_cont(ctx_, ggml_argsort_top_k(ctx_, probabilities, static_cast<int>(n_used))); // [n_used, n]
        ggml_tensor *weights = ggml_get_rows(ctx_, ggml_reshape_3d(ctx_, probabilities, 1, c_.n_expert, n_),
                                             selected); // [1, n_used, n]
        weights = ggml_reshape_2d(ctx_, weights, n_used, n_);
        weights = ggml_div(ctx_, weights, ggml_sum_rows(ctx_, weights));
        ggml_tensor *scales = ggml_get_rows(ctx_, l.down_exps_scale, ggml_reshape_1d(ctx_, selected, n_used * n_));
        weights = ggml_mul(ctx_, weights, ggml_reshape_2d(ctx_, scales, n_used, n_));

        ggml_tensor *h = norm(x, l.pre_ffw_norm_2);
        const Elsewhere expert_device(*this, model_.placement().experts[index]);
        const LowRank *low_gate_up = low_rank(l.gate_up_exps ? l.gate_up_exps : l.gate_exps);
        const LowRank *low_down = low_rank(l.down_exps);
        if (own_operators() && !importance_) {
            return own().experts(h, selected, weights, l.gate_up_exps, l.gate_exps, l.up_exps, l.down_exps, low_gate_up,
                                 low_down);
        }
        h = ggml_reshape_3d(ctx_, h, c_.n_embd, 1, n_);
        ggml_tensor *gate = nullptr;
        ggml_tensor *up = nullptr; // both [n_ff_exp, n_used, n]
        ggml_tensor *low = low_gate_up ? low_experts(*low_gate_up, h, selected) : nullptr;
        const auto half = [&](ggml_tensor *both, int64_t first) {
            return ggml_view_3d(ctx_, both, c_.n_ff_exp, n_used, n_, both->nb[1], both->nb[2],
                                static_cast<size_t>(first) * both->nb[0]);
        };
        if (l.gate_up_exps) {
            ggml_tensor *both = multiply_experts(l.gate_up_exps, h, selected);
            both = low ? ggml_add(ctx_, both, low) : both;
            gate = half(both, 0);
            up = half(both, c_.n_ff_exp);
        } else {
            gate = multiply_experts(l.gate_exps, h, selected);
            up = multiply_experts(l.up_exps, h, selected);
            gate = low ? ggml_add(ctx_, gate, half(low, 0)) : gate;
            up = low ? ggml_add(ctx_, up, half(low, c_.n_ff_exp)) : up;
        }
        ggml_tensor *hidden = gelu_mul(gate, up);
        ggml_tensor *out = multiply_experts(l.down_exps, hidden, selected); // [n_embd, n_used, n]
        out = low_down ? ggml_add(ctx_, out, low_experts(*low_down, hidden, selected)) : out;
        out = ggml_mul(ctx_, out, ggml_reshape_3d(ctx_, weights, 1, n_used, n_));
        ggml_tensor *sum = nullptr;
        for (int64_t i = 0; i < n_used; ++i) {
            ggml_tensor *one = ggml_view_2d(ctx_, out, c_.n_embd, n_, out->nb[2], static_cast<size_t>(i) * out->nb[1]);
            sum = sum ? ggml_add(ctx_, sum, one) : one;
        }
        return n_used == 1 ? ggml_cont(ctx_, sum) : sum;
    }

    ggml_tensor *layer(size_t index, ggml_tensor *x, bool only_cache) {
        const LayerWeights &l = model_.weights().layers[index];
        x = attention(index, x, only_cache);
        if (only_cache) {
            settle();
            return nullptr;
        }
        ggml_tensor *dense = gated_mlp(norm(x, l.ffn_norm), l.ffn_gate, l.ffn_up, l.ffn_down);
        ggml_tensor *both = norm(experts(index, x), l.post_ffw_norm_2, norm(dense, l.post_ffw_norm_1));
        x = norm(both, l.post_ffw_norm, x, pass_.causal() ? l.encoder_output_scale : l.output_scale);
        settle();
        return x;
    }

    // The product is placed in io.logits and softcapped there: a canvas of logits exists once (268 MB at the released
    // shape).
    void head(ggml_tensor *x) {
        Operand h = {norm(x, model_.weights().output_norm), n_, nullptr, nullptr};
        ggml_tensor *logits = multiply(model_.weights().token_embd, h, pass_.uncapped ? 0.0f : c_.logit_softcap);
        ggml_tensor *product = mark(logits->view_src ? logits->view_src : logits, Part::HEAD);
        product->data =
            static_cast<char *>(io_.logits->data) + static_cast<size_t>(pass_.first_logit) * io_.logits->nb[1];
        product->buffer = io_.logits->buffer;
        ggml_build_forward_expand(graph_.nodes, logits);
        if (pass_.sampled || pass_.watched) {
            sample_ops(ctx_, graph_.nodes, io_.sample, logits, pass_.sampled, pass_.watched);
        }
        if (pass_.sampled && c_.has_self_conditioning) {
            add_signal(ctx_, graph_.nodes, model_.weights().token_embd, ggml_soft_max_inplace(ctx_, logits),
                       rows_of_io(ctx_, io_.next_signal, pass_.first_row, n_), &io_.sample);
        }
    }
};

} // namespace

int32_t Pass::rows() const { return std::accumulate(segments.begin(), segments.end(), 0); }

int32_t Pass::end() const { return end(*std::max_element(segments.begin(), segments.end())); }

const char *product_kernel(const Model &model, ggml_type type) {
    const Kernels *kernels = model.kernels();
    return !kernels ? "ggml" : kernels->has_int8_product(type) ? "8-bit integers" : "float32";
}

int64_t scratch_floats(const Model &model) {
    const Kernels &kernels = *model.kernels();
    int64_t n = kernels.product_scratch(model.config().n_embd, model.config().n_ff_exp);
    n = std::max(n, kernels.soft_scratch(model.config().n_embd));
    for (const LayerWeights &layer : model.weights().layers) {
        n = std::max(n, kernels.attention_scratch(layer.head_dim));
    }
    return (n + 15) / 16 * 16; // each thread's part begins at a vector
}

Graph build_pass(const Model &model, const KvCache &cache, const GraphIo &io, const Pass &pass, Importance *importance,
                 const ActiveAdapters *adapters) {
    return PassBuilder(model, cache, io, pass, importance, adapters).build();
}

Graph build_signal(const Model &model, const GraphIo &io, int32_t first_row, int32_t first_logit, int32_t n_rows) {
    if (io.scratch && !io.next_signal && model.placement().head == model.devices().cpu()) {
        Graph own = make_graph(static_cast<size_t>(soft_nodes(model.config().n_vocab)));
        soft_embedding_ops(own.context.get(), *model.kernels(), own.nodes, own.work, io.scratch,
                           model.weights().token_embd, rows_of_io(own.context.get(), io.logits, first_logit, n_rows),
                           rows_of_io(own.context.get(), io.signal, first_row, n_rows), &io.longest_embedding);
        return own;
    }
    Graph graph = make_graph(signal_nodes(model.config().n_vocab, model.config().n_embd));
    ggml_context *ctx = graph.context.get();
    ggml_tensor *logits = rows_of_io(ctx, io.logits, first_logit, n_rows);
    ggml_tensor *out = rows_of_io(ctx, io.next_signal ? io.next_signal : io.signal, first_row, n_rows);
    Settler settler(graph, model.devices());
    add_signal(ctx, graph.nodes, model.weights().token_embd, ggml_soft_max(ctx, logits), out, nullptr);
    settler.settle(model.placement().head);
    return graph;
}

} // namespace dg
