#include "cpu/finite.h"

#include <cstring>

namespace dg {
namespace {

// Rows in one task: 64 KB at a width of 1,024.
constexpr int64_t ROWS = 16;

// As integers, magnitudes of floats have the same order, with infinity and NaN last.
bool is_finite(const char *row, int64_t n) {
    constexpr int32_t MAGNITUDE = 0x7fffffff;
    constexpr int32_t INFINITE = 0x7f800000;
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, row + static_cast<size_t>(i) * sizeof bits, sizeof bits);
        most = std::max(most, bits & MAGNITUDE);
    }
    return most < INFINITE;
}

void run_finite(ggml_tensor *dst, int, int, void *userdata) {
    auto &work = *static_cast<Work *>(userdata);
    const ggml_tensor *x = dst->src[0];
    take_tasks(work, ggml_nrows(x), ROWS, [&](int64_t first, int64_t n) {
        for (int64_t row = first; row < first + n; ++row) {
            const auto i1 = static_cast<size_t>(row % x->ne[1]);
            const auto i2 = static_cast<size_t>(row / x->ne[1] % x->ne[2]);
            const auto i3 = static_cast<size_t>(row / x->ne[1] / x->ne[2]);
            const char *at = static_cast<const char *>(x->data) + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3];
            if (!is_finite(at, x->ne[0])) {
                work.unsound.store(true, std::memory_order_relaxed);
            }
        }
    });
}

} // namespace

void finite_op(ggml_context *ctx, ggml_cgraph *graph, WorkList &list, ggml_tensor *x) {
    ggml_build_forward_expand(graph,
                              custom(ctx, Part::OTHER, GGML_TYPE_F32, 1, 1, {x}, run_finite, add_work<Work>(list)));
}

} // namespace dg
