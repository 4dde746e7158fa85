// What the custom operators have in common: tasks that threads take, one after the other, and rows of tensors.
#pragma once

#include "base/part.h"

#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace dg {

// What a custom operator needs besides its tensors. Threads take tasks from `next`. Both are as here when a graph
// begins.
struct Work {
    std::atomic<int32_t> next{0};
    std::atomic<bool> unsound{false}; // it met NaN or infinity where they would vanish
    virtual ~Work() = default;
};
using WorkList = std::vector<std::unique_ptr<Work>>;

// Calls body(first, rows) for tasks of `n` items, `most` at a time, on whatever thread comes next.
template <typename Body> void take_tasks(Work &work, int64_t n, int64_t most, const Body &body) {
    for (;;) {
        const int64_t first = int64_t{work.next.fetch_add(1, std::memory_order_relaxed)} * most;
        if (first >= n) {
            return;
        }
        body(first, std::min(most, n - first));
    }
}

inline const float *row_of(const ggml_tensor *x, int64_t row) {
    return reinterpret_cast<const float *>(static_cast<const char *>(x->data) + static_cast<size_t>(row) * x->nb[1]);
}

inline float *row_of(ggml_tensor *x, int64_t row) {
    return reinterpret_cast<float *>(static_cast<char *>(x->data) + static_cast<size_t>(row) * x->nb[1]);
}

template <typename W> W *add_work(WorkList &list) {
    list.push_back(std::make_unique<W>());
    return static_cast<W *>(list.back().get());
}

inline ggml_tensor *custom(ggml_context *ctx, Part part, ggml_type type, int64_t ne0, int64_t ne1,
                           std::vector<ggml_tensor *> args, ggml_custom_op_t run, Work *work) {
    return mark(ggml_custom_4d(ctx, type, ne0, ne1, 1, 1, args.data(), static_cast<int>(args.size()), run,
                               GGML_N_TASKS_MAX, work),
                part);
}

} // namespace dg
