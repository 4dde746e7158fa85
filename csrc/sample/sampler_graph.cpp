#include "sample/sampler_graph.h"

#include "base/error.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace dg {
namespace {

// A cumulative sum over the whole vocabulary in float32 would lose what is small; the sums of blocks go first.
constexpr int64_t BLOCK = 512;
// Rows are sampled so many floats at a time, which bounds the intermediate tensors.
constexpr int64_t SLICE_FLOATS = 8 << 20;
constexpr int64_t SLICE_ALIGNMENT = 16; // rows
constexpr size_t NODES_PER_SLICE = 112;
constexpr int64_t SLICES_ALIVE = 5;  // intermediate tensors of a slice's size at a time
constexpr int64_t VECTORS_ALIVE = 2; // and of a row's

constexpr float SMALLEST = 1e-37f;
constexpr float LOWEST = -1e4f; // exp of it is 0; -inf times 0 would be NaN

// Slices begin at multiples of 64 bytes, whatever a row's are: see ALIGNED_ROWS in graph.cpp.
int64_t slice_rows(int64_t n_vocab, int64_t n_rows) {
    const int64_t rows = SLICE_FLOATS / n_vocab / SLICE_ALIGNMENT * SLICE_ALIGNMENT;
    return std::min(std::max(rows, SLICE_ALIGNMENT), n_rows);
}

class SliceBuilder {
  public:
    SliceBuilder(ggml_context *ctx, ggml_cgraph *graph, const SampleIo &io, int64_t first, int64_t n)
        : ctx_(ctx), graph_(graph), io_(io), first_(first), n_(n) {}

    void build(ggml_tensor *z, bool draws, bool watched) {
        if (watched) { // before the division below, which happens in place
            ggml_tensor *x = below_max(z);
            const Sums sums = sum(x);
            store(sums.ties, io_.sums, 3);
            store(sums.rest, io_.sums, 4);
            ggml_tensor *ids = ggml_reshape_2d(ctx_, part(io_.watched), 1, n_);
            store(ggml_get_rows(ctx_, ggml_reshape_3d(ctx_, x, 1, x->ne[0], n_), ids), io_.sums, 5);
        }
        if (!draws) {
            return;
        }
        z = ggml_div_inplace(ctx_, z, columns(io_.temperature));
        ggml_tensor *x = below_max(z);
        const Sums sums = sum(x);
        store(sums.ties, io_.sums, 0);
        store(sums.rest, io_.sums, 1);
        store(ggml_sum_rows(ctx_, ggml_mul(ctx_, ggml_clamp(ctx_, x, LOWEST, 0.0f), sums.weights)), io_.sums, 2);
        // The lowest id among equals: its key is the greatest.
        store(ggml_argmax(ctx_, ggml_mul(ctx_, sums.is_max, falling(x->ne[0]))), io_.chosen, 0);
        draw(sums.weights);
    }

  private:
    ggml_context *ctx_;
    ggml_cgraph *graph_;
    const SampleIo &io_;
    const int64_t first_; // rows of this slice, in the tensors of io_
    const int64_t n_;

    struct Sums {
        ggml_tensor *weights; // [V, n]: exp(x)
        ggml_tensor *is_max;  // [V, n]: 1 where x is 0
        ggml_tensor *ties;    // [1, n]
        ggml_tensor *rest;
    };

    ggml_tensor *part(ggml_tensor *t) const {
        return ggml_view_1d(ctx_, t, n_, static_cast<size_t>(first_) * t->nb[t->ne[0] == 1 ? 1 : 0]);
    }
    ggml_tensor *columns(ggml_tensor *t) const { return ggml_reshape_2d(ctx_, part(t), 1, n_); }

    void store(ggml_tensor *value, ggml_tensor *results, size_t which) const {
        ggml_tensor *place =
            ggml_view_1d(ctx_, results, n_, which * results->nb[1] + static_cast<size_t>(first_) * results->nb[0]);
        ggml_build_forward_expand(graph_, ggml_cpy(ctx_, ggml_reshape_1d(ctx_, value, n_), place));
    }

    // 1 where t > 0, else 0
    ggml_tensor *positive(ggml_tensor *t) const { return ggml_step(ctx_, t); }
    ggml_tensor *not_positive(ggml_tensor *t) const { return ggml_scale_bias(ctx_, positive(t), -1.0f, 1.0f); }
    // n, n - 1, .. 1
    ggml_tensor *falling(int64_t n) const {
        const auto size = static_cast<float>(n);
        return ggml_scale_bias(ctx_, ggml_arange(ctx_, 0.0f, size, 1.0f), -1.0f, size);
    }

    // z - max(z), at most 0
    ggml_tensor *below_max(ggml_tensor *z) const {
        ggml_tensor *where = ggml_reshape_2d(ctx_, ggml_argmax(ctx_, z), 1, n_);
        ggml_tensor *greatest = ggml_get_rows(ctx_, ggml_reshape_3d(ctx_, z, 1, z->ne[0], n_), where);
        return ggml_sub(ctx_, z, ggml_reshape_2d(ctx_, greatest, 1, n_));
    }

    Sums sum(ggml_tensor *x) const {
        Sums sums = {};
        sums.weights = ggml_exp(ctx_, x);
        sums.is_max = not_positive(ggml_neg(ctx_, x));
        sums.ties = ggml_sum_rows(ctx_, sums.is_max);
        // exp(0) is 1 exactly. Beside a 1, what is below 6e-8 would vanish.
        sums.rest = ggml_sum_rows(ctx_, ggml_sub(ctx_, sums.weights, sums.is_max));
        return sums;
    }

    // weights [V, n] -> the first id whose cumulative weight reaches u times the row's.
    void draw(ggml_tensor *weights) const {
        const int64_t n_blocks = (weights->ne[0] + BLOCK - 1) / BLOCK;
        const int64_t missing = n_blocks * BLOCK - weights->ne[0];
        if (missing > 0) {
            weights = ggml_pad(ctx_, weights, static_cast<int>(missing), 0, 0, 0);
        }
        ggml_tensor *blocks = ggml_reshape_3d(ctx_, weights, BLOCK, n_blocks, n_);
        ggml_tensor *sums = ggml_reshape_2d(ctx_, ggml_sum_rows(ctx_, blocks), n_blocks, n_);
        ggml_tensor *through = ggml_cumsum(ctx_, sums);
        ggml_tensor *all = ggml_cont(ctx_, ggml_view_2d(ctx_, through, 1, n_, through->nb[1],
                                                        static_cast<size_t>(n_blocks - 1) * through->nb[0]));
        ggml_tensor *target = ggml_clamp(ctx_, ggml_mul(ctx_, all, columns(io_.uniform)), SMALLEST, INFINITY);
        // 1 where the sum through a block is below the target. The last one's never is.
        ggml_tensor *before = positive(ggml_neg(ctx_, ggml_sub(ctx_, through, target)));
        ggml_tensor *reached = ggml_scale_bias(ctx_, before, -1.0f, 1.0f);
        ggml_tensor *block = ggml_argmax(ctx_, ggml_mul(ctx_, reached, falling(n_blocks)));
        store(block, io_.chosen, 1);
        // What the block has to contribute; rounding must not make an id without weight reach it.
        target = ggml_clamp(ctx_, ggml_sub(ctx_, target, ggml_sum_rows(ctx_, ggml_mul(ctx_, sums, before))), SMALLEST,
                            INFINITY);
        ggml_tensor *inside =
            ggml_reshape_2d(ctx_, ggml_get_rows(ctx_, blocks, ggml_reshape_2d(ctx_, block, 1, n_)), BLOCK, n_);
        reached = not_positive(ggml_neg(ctx_, ggml_sub(ctx_, ggml_cumsum(ctx_, inside), target)));
        // The first that has weight and reaches it; if rounding lets none, the last that has weight.
        ggml_tensor *possible = positive(inside);
        ggml_tensor *rising = ggml_arange(ctx_, 1.0f, static_cast<float>(BLOCK) + 1.0f, 1.0f);
        ggml_tensor *key =
            ggml_add(ctx_, ggml_mul(ctx_, possible, rising),
                     ggml_mul(ctx_, ggml_mul(ctx_, possible, reached), ggml_scale(ctx_, falling(BLOCK), 2.0f)));
        store(ggml_argmax(ctx_, key), io_.chosen, 2);
    }
};

} // namespace

double RowSums::entropy() const {
    // Rounding can leave it a hair below zero on a one-hot row.
    return std::max(0.0, std::log(weight()) - static_cast<double>(moment) / weight());
}

bool RowSums::sound() const { return ties >= 1.0f && std::isfinite(weight()); }

void SampleIo::make(ggml_context *ctx, int64_t n_rows) {
    temperature = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_rows);
    uniform = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_rows);
    pinned = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    is_pinned = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_rows);
    watched = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    logits_of = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    chosen = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_rows, 3);
    sums = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rows, 6);
}

size_t SampleIo::bytes(int64_t n_rows) {
    return static_cast<size_t>(n_rows) * (6 * sizeof(float) + 3 * sizeof(int32_t) + 6 * sizeof(float));
}

size_t sample_nodes(int64_t n_vocab, int64_t n_rows) {
    const int64_t rows = slice_rows(n_vocab, n_rows);
    return static_cast<size_t>((n_rows + rows - 1) / rows) * NODES_PER_SLICE;
}

size_t sample_bytes(int64_t n_vocab, int64_t n_rows) {
    const int64_t floats = SLICES_ALIVE * slice_rows(n_vocab, n_rows) * n_vocab + VECTORS_ALIVE * n_vocab;
    return static_cast<size_t>(floats) * sizeof(float);
}

void sample_ops(ggml_context *ctx, ggml_cgraph *graph, const SampleIo &io, ggml_tensor *logits, bool draws,
                bool watched) {
    const int64_t rows = slice_rows(logits->ne[0], logits->ne[1]);
    for (int64_t first = 0; first < logits->ne[1]; first += rows) {
        const int64_t n = std::min(rows, logits->ne[1] - first);
        ggml_tensor *z =
            ggml_view_2d(ctx, logits, logits->ne[0], n, logits->nb[1], static_cast<size_t>(first) * logits->nb[1]);
        SliceBuilder(ctx, graph, io, first, n).build(z, draws, watched);
    }
}

ggml_tensor *with_pins(ggml_context *ctx, const SampleIo &io, ggml_tensor *sum, ggml_tensor *embedding, int64_t n) {
    if (sum->ne[1] < n) {
        sum = ggml_get_rows(ctx, sum, ggml_view_1d(ctx, io.logits_of, n, 0));
    }
    ggml_tensor *is_pinned = ggml_view_2d(ctx, io.is_pinned, 1, n, io.is_pinned->nb[1], 0);
    ggml_tensor *own = ggml_get_rows(ctx, embedding, ggml_view_1d(ctx, io.pinned, n, 0));
    ggml_tensor *free = ggml_mul(ctx, sum, ggml_scale_bias(ctx, is_pinned, -1.0f, 1.0f));
    return ggml_add(ctx, free, ggml_mul(ctx, own, is_pinned));
}

std::vector<RowResult> read_results(const SampleIo &io, int64_t n) {
    std::vector<int32_t> chosen(static_cast<size_t>(ggml_nelements(io.chosen)));
    std::vector<float> sums(static_cast<size_t>(ggml_nelements(io.sums)));
    ggml_backend_tensor_get(io.chosen, chosen.data(), 0, ggml_nbytes(io.chosen));
    ggml_backend_tensor_get(io.sums, sums.data(), 0, ggml_nbytes(io.sums));
    const auto stride = static_cast<size_t>(io.chosen->ne[0]);
    std::vector<RowResult> results(static_cast<size_t>(n));
    for (size_t i = 0; i < results.size(); ++i) {
        RowResult &r = results[i];
        r.argmax = chosen[i];
        r.draw = static_cast<int32_t>(BLOCK) * chosen[stride + i] + chosen[2 * stride + i];
        r.sums = {sums[i], sums[stride + i], sums[2 * stride + i]};
        r.before = {sums[3 * stride + i], sums[4 * stride + i], sums[5 * stride + i]};
    }
    return results;
}

void take_rows(const RowResult *results, int32_t n_rows, const RowRules &rules, SamplerScratch &scratch,
               const StepOutput &out) {
    scratch.draws.resize(static_cast<size_t>(n_rows));
    for (int32_t row = 0; row < n_rows; ++row) {
        RowResult result = results[row];
        if (rules.is_pinned(row)) {
            out.argmax[row] = rules.pinned[row];
            out.entropy[row] = 0.0;
            if (out.logprob) {
                out.logprob[row] = 0.0;
            }
            continue;
        }
        if (!result.sums.sound()) {
            throw_unsound_row();
        }
        out.argmax[row] = result.argmax;
        out.entropy[row] = result.sums.entropy();
        scratch.draws[static_cast<size_t>(row)] = result.draw;
        if (out.logprob) {
            if (rules.watched[row] < 0) {
                result.before.moment = 0.0f; // the argmax's distance to itself
            }
            out.logprob[row] = result.logprob();
        }
    }
}

std::vector<RowResult> sample_by_graph(const float *z, int32_t n_rows, int32_t n_vocab, float t,
                                       const double *uniform) {
    const ggml_backend_ptr cpu(ggml_backend_cpu_init());
    const size_t n_nodes = sample_nodes(n_vocab, n_rows);
    ggml_init_params params = {};
    params.mem_size = ggml_graph_overhead_custom(n_nodes, false) + (n_nodes + 16) * ggml_tensor_overhead();
    params.no_alloc = true;
    const ggml_context_ptr inputs(ggml_init(params));
    const ggml_context_ptr context(ggml_init(params));
    if (!cpu || !inputs || !context) {
        throw Error(DG_ERROR_MEMORY, "memory for a graph was refused");
    }
    SampleIo io;
    io.make(inputs.get(), n_rows);
    ggml_tensor *logits = ggml_new_tensor_2d(inputs.get(), GGML_TYPE_F32, n_vocab, n_rows);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(inputs.get(), cpu.get()));
    ggml_cgraph *graph = ggml_new_graph_custom(context.get(), n_nodes, false);
    sample_ops(context.get(), graph, io, logits, true, false);
    const ggml_gallocr_ptr allocator(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
    if (!buffer || !ggml_gallocr_alloc_graph(allocator.get(), graph)) {
        throw Error(DG_ERROR_MEMORY, "memory for the logits and the sampler's intermediate tensors was refused");
    }
    const std::vector<float> temperatures(static_cast<size_t>(n_rows), t);
    std::vector<float> draws;
    std::transform(uniform, uniform + n_rows, std::back_inserter(draws), uniform_in_float);
    ggml_backend_tensor_set(io.temperature, temperatures.data(), 0, ggml_nbytes(io.temperature));
    ggml_backend_tensor_set(io.uniform, draws.data(), 0, ggml_nbytes(io.uniform));
    ggml_backend_tensor_set(logits, z, 0, ggml_nbytes(logits));
    if (ggml_backend_graph_compute(cpu.get(), graph) != GGML_STATUS_SUCCESS) {
        throw Error(DG_ERROR_INTERNAL, "ggml failed to compute a graph");
    }
    return read_results(io, n_rows);
}

float uniform_in_float(double u) { return std::min(static_cast<float>(u), std::nextafter(1.0f, 0.0f)); }

} // namespace dg
