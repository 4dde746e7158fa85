#include "pass/graph.h"

#include "base/error.h"
#include "cpu/self_conditioning.h"
#include "pass/cpu_ops.h"
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
        : model_(model), c_(model.config()), cache_(cache), io_(io), pass_(pass), n_(pass.rows()),
          graph_(make_graph(
              static_cast<size_t>(c_.n_layer) *
                  (NODES_PER_LAYER + (adapters ? NODES_OF_ADAPTERS : 0) + 2 * static_cast<size_t>(c_.n_expert_used) +
                   NODES_PER_SEGMENT * pass.segments.size()) +
              NODES_BESIDES + (adapters ? NODES_OF_ADAPTERS : 0) +
              (pass.sampled || pass.watched ? sample_nodes(c_.n_vocab, n_) + signal_nodes(c_.n_vocab, c_.n_embd) : 0))),
          ctx_(graph_.context.get()), settler_(graph_, model.devices()),
          to_{model, cache, io, pass_, importance, adapters, n_, graph_, ctx_}, ggml_ops_(to_), cpu_ops_(to_) {}

    Graph build() {
        const Weights &w = model_.weights();
        const Placement &placement = model_.placement();
        ggml_tensor *x = embed();
        for (size_t i = 0; i < w.layers.size(); ++i) {
            const bool only_cache = pass_.mode == Mode::ENCODE && i + 1 == w.layers.size();
            on(placement.layers[i]);
            x = layer(i, x, only_cache);
        }
        if (pass_.has_logits()) {
            on(placement.head);
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
    const int64_t n_; // rows of all segments
    Graph graph_;
    ggml_context *ctx_;
    Settler settler_;
    Building to_;
    GgmlOps ggml_ops_;
    CpuOps cpu_ops_;
    Ops *ops_ = nullptr; // of the device that is being built for

    // What is built from here on belongs to `device`.
    void on(int32_t device) {
        settle();
        to_.device = device;
        ops_ = io_.scratch && to_.is_on_cpu() ? &cpu_ops_ : &ggml_ops_;
    }
    // What was built since the last call belongs to the device.
    void settle() { settler_.settle(to_.device); }

    // What is built until this ends belongs to another device.
    class Elsewhere {
      public:
        Elsewhere(PassBuilder &builder, int32_t device) : builder_(builder), here_(builder.to_.device) {
            builder_.on(device);
        }
        ~Elsewhere() { builder_.on(here_); }
        Elsewhere(const Elsewhere &) = delete;
        Elsewhere &operator=(const Elsewhere &) = delete;

      private:
        PassBuilder &builder_;
        const int32_t here_;
    };

    // The first n entries of an input of the largest size.
    ggml_tensor *head_of(ggml_tensor *input) const { return ggml_view_1d(ctx_, input, n_, 0); }

    // -> [n_embd, n]
    ggml_tensor *embed() {
        const Weights &w = model_.weights();
        on(model_.placement().input);
        ggml_tensor *ids = ggml_view_1d(ctx_, io_.ids, n_, static_cast<size_t>(pass_.first_row) * io_.ids->nb[0]);
        ggml_tensor *x = ops_->rows(w.input_embd, ids);
        on(model_.placement().layers.front());
        x = ggml_scale(ctx_, x, std::sqrt(static_cast<float>(c_.n_embd)));
        if (pass_.causal()) {
            return x;
        }
        if (c_.has_self_conditioning) {
            ggml_tensor *from = rows_of_io(ctx_, io_.signal, pass_.first_row, n_);
            ggml_tensor *signal =
                ops_->gated(ops_->norm(from, w.self_cond_pre_norm), w.self_cond_gate, w.self_cond_up, w.self_cond_down);
            x = ggml_add(ctx_, x, signal);
        }
        return ops_->norm(x); // also on the first step, whose signal is zero
    }

    // Angles: float32(position) / divisor, to the last bit those of the reference on the CPU (vendor/patches/0002).
    // With the base for ggml, GPUs would take powers of a rounded base^(-2/D), which are off by 1e-7 of the position
    // and more: at position 1,000 Vulkan's sines by 1e-4, with the divisors by 7e-6.
    ggml_tensor *rope(const LayerWeights &l, ggml_tensor *x) const {
        return ggml_rope_ext(ctx_, x, head_of(to_.inputs().positions), l.rope_divisors, static_cast<int>(l.head_dim),
                             GGML_ROPE_TYPE_NEOX, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    }

    // The segment's rows of x [width, heads, rows].
    ggml_tensor *rows_of(const Segment &s, ggml_tensor *x) const {
        return s.n == n_ ? x
                         : ggml_view_3d(ctx_, x, x->ne[0], x->ne[1], s.n, x->nb[1], x->nb[2],
                                        static_cast<size_t>(s.first) * x->nb[2]);
    }

    void write_cache(const Segment &s, ggml_tensor *cache, ggml_tensor *rows, bool sliding) {
        to_.rounds(rows, cache->type);
        ggml_tensor *input = sliding ? to_.inputs().slots_sliding : to_.inputs().slots_full;
        ggml_tensor *slots = ggml_view_1d(ctx_, input, s.n, static_cast<size_t>(s.first) * input->nb[0]);
        ggml_tensor *flat = ggml_reshape_2d(ctx_, rows_of(s, rows), cache->ne[0], s.n);
        ggml_build_forward_expand(graph_.nodes, ggml_set_rows(ctx_, cache, flat, slots));
    }

    ggml_tensor *attention(size_t index, ggml_tensor *x, bool only_cache) {
        const LayerWeights &l = model_.weights().layers[index];
        Operand h = {ops_->norm(x, l.attn_norm), n_, {}};
        ggml_tensor *k = ops_->multiply(l.attn_k, h);
        ggml_tensor *v = l.attn_v ? ops_->multiply(l.attn_v, h) : k; // the raw projection, before k_norm and rope
        k = ggml_reshape_3d(ctx_, k, l.head_dim, l.n_head_kv, n_);
        v = ggml_reshape_3d(ctx_, v, l.head_dim, l.n_head_kv, n_);
        k = rope(l, ops_->norm(k, l.attn_k_norm));
        v = ops_->norm(v);
        ggml_tensor *q = nullptr;
        if (!only_cache) {
            q = ggml_reshape_3d(ctx_, ops_->multiply(l.attn_q, h), l.head_dim, c_.n_head, n_);
            q = rope(l, ops_->norm(q, l.attn_q_norm));
        }
        ggml_tensor *attended = nullptr;
        {
            const Elsewhere cache_device(*this, model_.placement().cache[index]);
            attended = through_cache(l, cache_.layers()[index], q, k, v);
        }
        if (only_cache) {
            return nullptr;
        }
        return ops_->norm(ops_->multiply(l.attn_output, attended), l.post_attention_norm, x);
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
            attended = ops_->attend(s, l, cache, rows_of(s, q));
            if (pass_.segments.size() > 1) {
                // Carried out before the next segment writes the cache: a graph runs in the order of this call.
                ggml_tensor *all = to_.inputs().attended;
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
        ggml_tensor *probabilities =
            ggml_soft_max(ctx_, ops_->route(l.router, ops_->norm(x, l.router_scale))); // [n_expert, n]
        ggml_tensor *selected =
            ggml_cont(ctx_, ggml_argsort_top_k(ctx_, probabilities, static_cast<int>(n_used))); // [n_used, n]
        ggml_tensor *weights = ggml_get_rows(ctx_, ggml_reshape_3d(ctx_, probabilities, 1, c_.n_expert, n_),
                                             selected); // [1, n_used, n]
        weights = ggml_reshape_2d(ctx_, weights, n_used, n_);
        weights = ggml_div(ctx_, weights, ggml_sum_rows(ctx_, weights));
        ggml_tensor *scales = ggml_get_rows(ctx_, l.down_exps_scale, ggml_reshape_1d(ctx_, selected, n_used * n_));
        weights = ggml_mul(ctx_, weights, ggml_reshape_2d(ctx_, scales, n_used, n_));

        ggml_tensor *h = ops_->norm(x, l.pre_ffw_norm_2);
        const Elsewhere expert_device(*this, model_.placement().experts[index]);
        return ops_->experts(l, h, selected, weights);
    }

    ggml_tensor *layer(size_t index, ggml_tensor *x, bool only_cache) {
        const LayerWeights &l = model_.weights().layers[index];
        x = attention(index, x, only_cache);
        if (only_cache) {
            settle();
            return nullptr;
        }
        ggml_tensor *dense = ops_->gated(ops_->norm(x, l.ffn_norm), l.ffn_gate, l.ffn_up, l.ffn_down);
        ggml_tensor *both = ops_->norm(experts(index, x), l.post_ffw_norm_2, ops_->norm(dense, l.post_ffw_norm_1));
        x = ops_->norm(both, l.post_ffw_norm, x, pass_.causal() ? l.encoder_output_scale : l.output_scale);
        settle();
        return x;
    }

    // The product is placed in StepIo::logits and softcapped there: a canvas of logits exists once (268 MB at the
    // released shape).
    void head(ggml_tensor *x) {
        if (!pass_.logit_rows.empty()) {
            x = ops_->rows(x, ggml_view_1d(ctx_, io_.logit_rows, pass_.n_logits(),
                                           static_cast<size_t>(pass_.first_row) * io_.logit_rows->nb[0]));
        }
        Operand h = {ops_->norm(x, model_.weights().output_norm), pass_.n_logits(), {}};
        ggml_tensor *logits = ops_->multiply(model_.weights().token_embd, h, pass_.uncapped ? 0.0f : c_.logit_softcap);
        ggml_tensor *product = mark(logits->view_src ? logits->view_src : logits, Part::HEAD);
        product->data = static_cast<char *>(io_.step->logits->data) +
                        static_cast<size_t>(pass_.first_logit) * io_.step->logits->nb[1];
        product->buffer = io_.step->logits->buffer;
        ggml_build_forward_expand(graph_.nodes, logits);
        if (pass_.sampled || pass_.watched) {
            sample_ops(ctx_, graph_.nodes, io_.step->sample, logits, pass_.sampled, pass_.watched);
        }
        if (pass_.sampled && c_.has_self_conditioning) {
            ggml_tensor *signal = signal_of(ctx_, model_.weights().token_embd, model_.weights().signal_copy,
                                            ggml_soft_max_inplace(ctx_, logits), &io_.step->sample, n_);
            ggml_tensor *out = rows_of_io(ctx_, io_.step->next_signal, pass_.first_row, n_);
            ggml_build_forward_expand(graph_.nodes, ggml_cpy(ctx_, signal, out));
        }
    }
};

} // namespace

const char *product_kernel(const Model &model, ggml_type type) {
    const Kernels *kernels = model.kernels();
    return !kernels ? "ggml" : FORM_NAMES[static_cast<int>(kernels->form_for(type))];
}

int64_t scratch_floats(const Model &model) {
    const Kernels &kernels = *model.kernels();
    int64_t n = kernels.product_scratch(model.config().n_embd, model.config().n_ff_exp);
    n = std::max(n, kernels.self_conditioning_scratch(model.config().n_embd));
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
    if (io.scratch && !io.step->next_signal && model.placement().head == model.devices().cpu()) {
        Graph own = make_graph(static_cast<size_t>(self_conditioning_nodes(model.config().n_vocab)));
        self_conditioning_ops(own.context.get(), *model.kernels(), own.nodes, own.work, io.scratch,
                              model.weights().token_embd,
                              rows_of_io(own.context.get(), io.step->logits, first_logit, n_rows),
                              rows_of_io(own.context.get(), io.signal, first_row, n_rows), &io.longest_embedding);
        return own;
    }
    Graph graph = make_graph(signal_nodes(model.config().n_vocab, model.config().n_embd));
    ggml_context *ctx = graph.context.get();
    ggml_tensor *logits = rows_of_io(ctx, io.step->logits, first_logit, n_rows);
    ggml_tensor *out = rows_of_io(ctx, io.step->next_signal ? io.step->next_signal : io.signal, first_row, n_rows);
    Settler settler(graph, model.devices());
    ggml_tensor *signal = signal_of(ctx, model.weights().token_embd, model.weights().signal_copy,
                                    ggml_soft_max(ctx, logits), nullptr, n_rows);
    ggml_build_forward_expand(graph.nodes, ggml_cpy(ctx, signal, out));
    settler.settle(model.placement().head);
    return graph;
}

Graph build_flat_signal(const Model &model, const GraphIo &io, int32_t n_rows) {
    const StepIo &step = *io.step;
    Graph graph = make_graph(signal_nodes(model.config().n_vocab, model.config().n_embd));
    ggml_context *ctx = graph.context.get();
    Settler settler(graph, model.devices());
    ggml_tensor *logits = ggml_get_rows(ctx, step.logits, ggml_view_1d(ctx, step.flat_logits, n_rows, 0));
    ggml_tensor *rows = signal_of(ctx, model.weights().token_embd, model.weights().signal_copy,
                                  ggml_soft_max_inplace(ctx, logits), nullptr, n_rows);
    ggml_tensor *out = step.next_signal ? step.next_signal : io.signal;
    ggml_tensor *numbers = ggml_view_1d(ctx, step.flat_rows, n_rows, 0);
    ggml_build_forward_expand(graph.nodes, ggml_set_rows(ctx, out, rows, numbers));
    settler.settle(model.placement().head);
    return graph;
}

} // namespace dg
