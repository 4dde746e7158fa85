// How fast the CPU's operators multiply, at every level that this processor has, beside ggml's: one thread, operations
// (a multiplication and an addition) a second, best of several runs. Built and run by kernels.py.
#include "cpu/levels.h"
#include "cpu/product.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct Shape {
    const char *name;
    int64_t depth, rows, experts, used, columns; // experts 0: one dense matrix
};

// Weights as ggml quantizes random numbers.
void fill(ggml_tensor *t) {
    std::vector<float> row(static_cast<size_t>(t->ne[0]));
    uint32_t state = 7;
    for (int64_t r = 0; r < ggml_nrows(t); ++r) {
        for (float &x : row) {
            state = state * 1664525u + 1013904223u;
            x = static_cast<float>(static_cast<int32_t>(state)) * 4e-11f;
        }
        ggml_quantize_chunk(t->type, row.data(), static_cast<char *>(t->data) + static_cast<size_t>(r) * t->nb[1], 0, 1,
                            t->ne[0], nullptr);
    }
}

double seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Giga-operations a second. `level` nullptr: ggml's operators.
double rate(const Shape &s, ggml_type type, const char *level, int runs) {
    ggml_init_params params = {size_t{1} << 30, nullptr, false};
    ggml_context_ptr context(ggml_init(params));
    ggml_context *ctx = context.get();
    const int64_t n_used = s.experts ? s.used : 1;
    ggml_tensor *x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.depth, s.columns);
    fill(x);
    ggml_tensor *w = s.experts ? ggml_new_tensor_3d(ctx, type, s.depth, s.rows, s.experts)
                               : ggml_new_tensor_2d(ctx, type, s.depth, s.rows);
    fill(w);
    ggml_tensor *down = nullptr;
    ggml_tensor *selected = nullptr;
    ggml_tensor *weights = nullptr;
    if (s.experts) {
        down = ggml_new_tensor_3d(ctx, type, s.rows / 2, s.depth, s.experts);
        fill(down);
        selected = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, s.columns);
        weights = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_used, s.columns);
        for (int64_t i = 0; i < n_used * s.columns; ++i) {
            static_cast<int32_t *>(selected->data)[i] = static_cast<int32_t>(i % s.experts);
            static_cast<float *>(weights->data)[i] = 1.0f / static_cast<float>(n_used);
        }
    }
    ggml_cgraph *graph = ggml_new_graph(ctx);
    dg::WorkList work;
    ggml_tensor *out = nullptr;
    if (level) {
        const dg::Kernels &kernels = *dg::choose_kernels(level);
        const int64_t floats = kernels.product_scratch(s.depth, s.rows);
        ggml_tensor *scratch = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (floats + 15) / 16 * 16, 1);
        const dg::ProductOps ops(ctx, kernels, work, scratch);
        dg::Operand operand = {x, s.columns, {}};
        out = s.experts ? ops.experts(x, selected, weights, w, nullptr, nullptr, down) : ops.multiply(w, operand);
    } else if (s.experts) {
        ggml_tensor *both = ggml_mul_mat_id(ctx, w, ggml_reshape_3d(ctx, x, s.depth, 1, s.columns), selected);
        ggml_tensor *gate = ggml_view_3d(ctx, both, s.rows / 2, n_used, s.columns, both->nb[1], both->nb[2], 0);
        out = ggml_mul_mat_id(ctx, down, ggml_cont(ctx, gate), selected);
    } else {
        out = ggml_mul_mat(ctx, w, x);
    }
    ggml_build_forward_expand(graph, out);
    double best = 1e9;
    for (int i = 0; i < runs; ++i) {
        for (auto &each : work) {
            each->next = 0;
        }
        const double start = seconds();
        ggml_graph_compute_with_ctx(ctx, graph, 1);
        best = std::min(best, seconds() - start);
    }
    const double one = static_cast<double>(s.depth * s.rows * s.columns * n_used);
    return 2e-9 * one * (s.experts ? 1.5 : 1.0) / best;
}

} // namespace

int main(int argc, char **argv) {
    const int runs = argc > 1 ? std::atoi(argv[1]) : 20;
    const Shape shapes[] = {
        {"dense, 256 columns", 2816, 768, 0, 0, 256},
        {"experts, 16 rows each", 2816, 1408, 8, 2, 64},
        {"experts, 32 rows each", 2816, 1408, 8, 2, 128},
        {"experts, 64 rows each", 2816, 1408, 8, 2, 256},
    };
    const ggml_type types[] = {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K};
    for (const Shape &shape : shapes) {
        for (const ggml_type type : types) {
            if (shape.experts && ggml_blck_size(type) == 256) {
                continue; // rows of 704 are no multiple of its 256
            }
            std::printf("%-22s %-5s", shape.name, ggml_type_name(type));
            for (const dg::Level &level : dg::levels()) {
                if (level.kernels && dg::is_offered(level)) {
                    std::printf("  %s %6.1f", level.name, rate(shape, type, level.name, runs));
                }
            }
            std::printf("  ggml %6.1f\n", rate(shape, type, nullptr, std::max(2, runs / 5)));
            std::fflush(stdout);
        }
    }
}
