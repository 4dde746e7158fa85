#include "model/figures.h"

#include "base/error.h"

#include <algorithm>
#include <cinttypes>

namespace dg {
namespace {

constexpr int32_t DEFAULT_CONTEXT = 8192;
constexpr Range BATCHES = {1, 1 << 20};
constexpr int64_t MOST_ROWS = 1 << 16;
// Canvases side by side go through the layers so many rows at a time. Eight canvases of 256 rows (724 M parameters,
// Q8_0, ggml's operators) took 1.09 times what they took one by one in a pass of 2048 rows, and 1.03 in passes of 512:
// the work is arithmetic, and larger intermediate tensors leave the processor's cache.
constexpr int32_t PASS_ROWS = 256;

int32_t batch_size(int32_t n_ctx, int32_t asked) {
    check_range("n_batch", asked, BATCHES);
    return std::min(asked, n_ctx);
}

int32_t row_count(const dg_config &c, int32_t asked) {
    if (asked == 0) {
        return c.canvas_length;
    }
    check_range("n_rows", asked, {c.canvas_length, MOST_ROWS});
    return asked;
}

ggml_type cache_type(int32_t type) {
    switch (type) {
        case DG_KV_F32: return GGML_TYPE_F32;
        case DG_KV_F16: return GGML_TYPE_F16;
        case DG_KV_BF16: return GGML_TYPE_BF16;
        case DG_KV_Q8_0: return GGML_TYPE_Q8_0;
    }
    throw Error(DG_ERROR_ARGUMENT, format("type_kv is %d: it must be one of dg_kv_type", type));
}

// Longer steps would cost more in attention than they save: by estimate, on an RTX 4090 a graph that is built, run once
// and captured costs 25 ms, and 400 more rows in all layers as much in the 16 steps of a canvas.
int64_t rounded_length(int64_t n) {
    int64_t step = 512;
    while (4 * step < n) {
        step *= 2;
    }
    return (n + step - 1) / step * step;
}

} // namespace

void check_range(const char *name, int64_t value, const Range &range) {
    if (value < range.least || value > range.most) {
        throw Error(DG_ERROR_ARGUMENT, format("%s is %" PRId64 ": it must be from %" PRId64 " to %" PRId64, name, value,
                                              range.least, range.most));
    }
}

void check_figures(const dg_config &c, const std::vector<dg_layer_config> &layers) {
    check_range("n_layer", c.n_layer, ranges::LAYERS);
    check_range("n_embd", c.n_embd, ranges::WIDTHS);
    check_range("n_vocab", c.n_vocab, ranges::VOCABULARIES);
    check_range("n_head", c.n_head, ranges::HEADS);
    check_range("n_ff", c.n_ff, ranges::WIDTHS);
    check_range("n_ff_exp", c.n_ff_exp, ranges::WIDTHS);
    check_range("n_expert", c.n_expert, ranges::EXPERTS);
    check_range("n_expert_used", c.n_expert_used, ranges::up_to(c.n_expert));
    check_range("sliding_window", c.sliding_window, ranges::WINDOWS);
    check_range("canvas_length", c.canvas_length, ranges::CANVASES);
    check_range("n_ctx_train", c.n_ctx_train, ranges::contexts(c.canvas_length));
    for (const dg_layer_config &layer : layers) {
        check_range("n_head_kv", layer.n_head_kv, ranges::up_to(c.n_head));
        check_range("head_dim", layer.head_dim, ranges::HEAD_DIMS);
    }
}

int32_t context_size(const dg_config &c, int32_t asked) {
    check_range("n_ctx", asked, {0, INT32_MAX});
    const int32_t n_ctx = asked > 0 ? asked : std::min(DEFAULT_CONTEXT, c.n_ctx_train);
    if (n_ctx < c.canvas_length + 1) {
        throw Error(DG_ERROR_CONTEXT,
                    format("n_ctx is %d: a prefix of one token and the canvas need %d", n_ctx, c.canvas_length + 1));
    }
    if (n_ctx > c.n_ctx_train) {
        throw Error(DG_ERROR_CONTEXT, format("n_ctx is %d: the file's context_length is %d", n_ctx, c.n_ctx_train));
    }
    return n_ctx;
}

SessionFigures::SessionFigures(const dg_config &config, const dg_session_options &options)
    : n_ctx(context_size(config, options.n_ctx)), n_batch(batch_size(n_ctx, options.n_batch)),
      n_rows(row_count(config, options.n_rows)), pass_rows(std::min(n_rows, std::max(PASS_ROWS, config.canvas_length))),
      type_kv(cache_type(options.type_kv)), canvas_length(config.canvas_length), sliding_window(config.sliding_window) {
}

int32_t view_rows(int32_t end, int32_t slots) {
    return static_cast<int32_t>(std::min<int64_t>(rounded_length(end), slots));
}

int32_t longest_in_view(int32_t end, int32_t slots, int32_t n_ctx) {
    const int64_t length = rounded_length(end);
    return length < slots ? static_cast<int32_t>(length) : n_ctx;
}

int32_t SessionFigures::largest_pass() const { return std::max(n_batch, pass_rows); }

int32_t SessionFigures::longest_chunk() const { return std::min(n_batch, n_ctx - canvas_length); }

int32_t SessionFigures::slots(bool sliding) const {
    const int64_t ring = int64_t{sliding_window} - 1 + std::max(n_batch, canvas_length) + 1;
    return sliding ? static_cast<int32_t>(std::min<int64_t>(n_ctx, ring)) : n_ctx;
}

size_t SessionFigures::slot_bytes(int64_t head_dim, int64_t n_head_kv) const {
    if (head_dim % ggml_blck_size(type_kv) != 0) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    format("type_kv %s needs heads of a multiple of %" PRId64 ", this file has %" PRId64,
                           ggml_type_name(type_kv), ggml_blck_size(type_kv), head_dim));
    }
    return ggml_row_size(type_kv, head_dim * n_head_kv);
}

} // namespace dg
