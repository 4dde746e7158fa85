#include "sample/signal_graph.h"

#include "base/part.h"

#include <algorithm>
#include <cmath>

namespace dg {
namespace {

// Floats of transposed embedding that exist at a time: 16 MB.
constexpr int64_t SLICE_FLOATS = 4 << 20;
// Vulkan's get_rows gives up on a matrix that does not begin at a multiple of a device's alignment: 4 to 64 bytes of
// most, 256 at most. So many rows are a multiple of it, whatever a row's bytes are.
constexpr int64_t ALIGNED_ROWS = 256;

// Rows of the embedding in a slice.
int64_t slice_rows(int64_t n_vocab, int64_t n_embd) {
    const int64_t slice = SLICE_FLOATS / n_embd / ALIGNED_ROWS * ALIGNED_ROWS;
    return std::min<int64_t>(std::max(slice, ALIGNED_ROWS), n_vocab);
}

// Backends round both factors of a product with F16 to that type, and what is below 2^-24 to multiples of it or to 0:
// of a row with p1 = 0.9 and a wide tail, whose tokens have 4e-7 each, up to a hundredth would be gone. At 2^14 times
// their size the largest probability is still a number of half precision, and what a row of 262,144 tokens loses is
// below 5e-7.
constexpr float SCALED = 16384.0f;

// Slice by slice -> [n_embd, n].
ggml_tensor *product_in_slices(ggml_context *ctx, ggml_tensor *embedding, ggml_tensor *p) {
    const int64_t n_embd = embedding->ne[0];
    const int64_t n_vocab = embedding->ne[1];
    const int64_t slice = slice_rows(n_vocab, n_embd);
    // Rows as float32 by get_rows: a cast would do, but CUDA's knows no K-quants, and the scheduler would bring the
    // whole embedding to the CPU.
    ggml_tensor *numbers = nullptr;
    if (embedding->type != GGML_TYPE_F32) {
        numbers = ggml_cast(ctx, ggml_arange(ctx, 0.0f, static_cast<float>(slice), 1.0f), GGML_TYPE_I32);
    }
    ggml_tensor *sum = nullptr;
    for (int64_t first = 0; first < n_vocab; first += slice) {
        const int64_t n = std::min<int64_t>(slice, n_vocab - first);
        ggml_tensor *rows =
            ggml_view_2d(ctx, embedding, n_embd, n, embedding->nb[1], static_cast<size_t>(first) * embedding->nb[1]);
        if (numbers) {
            rows = ggml_get_rows(ctx, rows, n == slice ? numbers : ggml_view_1d(ctx, numbers, n, 0));
        }
        ggml_tensor *transposed = ggml_cont(ctx, ggml_transpose(ctx, rows)); // [n, n_embd]
        ggml_tensor *weights = ggml_view_2d(ctx, p, n, p->ne[1], p->nb[1], static_cast<size_t>(first) * p->nb[0]);
        ggml_tensor *product = mark(ggml_mul_mat(ctx, transposed, weights), Part::SELF_CONDITIONING); // [n_embd, n]
        sum = sum ? ggml_add(ctx, sum, product) : product;
    }
    return sum;
}

// -> [n_embd, n]
ggml_tensor *product_with_copy(ggml_context *ctx, ggml_tensor *copy, ggml_tensor *p) {
    ggml_tensor *product = mark(ggml_mul_mat(ctx, copy, ggml_scale_inplace(ctx, p, SCALED)), Part::SELF_CONDITIONING);
    ggml_mul_mat_set_prec(product, GGML_PREC_F32);
    return ggml_scale(ctx, product, 1.0f / SCALED);
}

} // namespace

size_t signal_nodes(int64_t n_vocab, int64_t n_embd) {
    const int64_t slice = slice_rows(n_vocab, n_embd);
    return static_cast<size_t>((n_vocab + slice - 1) / slice) * 7 + 32;
}

// Three slices: of the embedding's rows, of them transposed, and the hole that the sum of those before leaves.
size_t signal_bytes(int64_t n_vocab, int64_t n_embd, int64_t n_rows) {
    return sizeof(float) * static_cast<size_t>((3 * slice_rows(n_vocab, n_embd) + 2 * n_rows) * n_embd);
}

ggml_tensor *signal_of(ggml_context *ctx, ggml_tensor *embedding, ggml_tensor *copy, ggml_tensor *p,
                       const SampleIo *pins, int64_t n_rows) {
    ggml_tensor *sum = copy ? product_with_copy(ctx, copy, p) : product_in_slices(ctx, embedding, p);
    if (pins) {
        sum = with_pins(ctx, *pins, sum, embedding, n_rows);
    }
    return ggml_scale(ctx, sum, std::sqrt(static_cast<float>(embedding->ne[0])));
}

} // namespace dg
