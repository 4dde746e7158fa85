// How fast the CPU's operators multiply, at every level that this processor has, beside ggml's and beside what its
// instructions reach without memory: one thread, giga-operations (a multiplication and an addition are two) a second of
// processor time, best of several runs. From a build of the library in BUILD (build/editable after `pip install -e .`):
//
//     g++ -std=c++17 -O2 -Icsrc -Ivendor/ggml/include benchmarks/kernels.cpp BUILD/libdiffgguf.a
//         $(find BUILD/vendor -name "*.a") $(find BUILD/vendor -name "*.a") -fopenmp -lpthread -ldl -o kernels
//     ./kernels [runs] [kind of matrix or part of it]
#include "cpu/features.h"
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

#if defined(__x86_64__)
// Twelve of an instruction that do not wait for each other, `times` over.
#    define DG_TWELVE(instruction)                                                                                     \
        instruction "0\n\t" instruction "1\n\t" instruction "2\n\t" instruction "3\n\t" instruction                    \
                    "4\n\t" instruction "5\n\t" instruction "6\n\t" instruction "7\n\t" instruction                    \
                    "8\n\t" instruction "9\n\t" instruction "10\n\t" instruction "11\n\t"
#    define DG_PEAK(name, feature, operations, instruction)                                                            \
        if ((dg::processor_features() & (feature)) != 0) {                                                             \
            double best = 1e9;                                                                                         \
            for (int run = 0; run < 40; ++run) {                                                                       \
                const double start = seconds();                                                                        \
                for (int i = 0; i < 100000; ++i) {                                                                     \
                    __asm__ volatile(DG_TWELVE(instruction)                                                            \
                                     :                                                                                 \
                                     :                                                                                 \
                                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                                       "xmm10", "xmm11");                                                              \
                }                                                                                                      \
                best = std::min(best, seconds() - start);                                                              \
            }                                                                                                          \
            std::printf("%-38s %6.1f\n", name, 12e-4 * (operations) / best);                                           \
        }
#else
#    define DG_PEAK(name, feature, operations, instruction)
#endif

double seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Giga-operations a second. `level` nullptr: ggml's operators.
double rate(const Shape &s, ggml_type type, const char *level, int runs) {
    ggml_init_params params = {size_t{1} << 20, nullptr, true};
    ggml_context_ptr context(ggml_init(params));
    ggml_context *ctx = context.get();
    const int64_t n_used = s.experts ? s.used : 1;
    ggml_tensor *x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.depth, s.columns);
    ggml_tensor *w = s.experts ? ggml_new_tensor_3d(ctx, type, s.depth, s.rows, s.experts)
                               : ggml_new_tensor_2d(ctx, type, s.depth, s.rows);
    ggml_tensor *down = nullptr;
    ggml_tensor *selected = nullptr;
    ggml_tensor *weights = nullptr;
    if (s.experts) {
        down = ggml_new_tensor_3d(ctx, type, s.rows / 2, s.depth, s.experts);
        selected = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, s.columns);
        weights = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_used, s.columns);
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
        out = s.experts ? ops.experts(x, selected, weights, w, nullptr, nullptr, down, nullptr, nullptr)
                        : ops.multiply(w, operand);
    } else if (s.experts) {
        ggml_tensor *both = ggml_mul_mat_id(ctx, w, ggml_reshape_3d(ctx, x, s.depth, 1, s.columns), selected);
        ggml_tensor *gate = ggml_view_3d(ctx, both, s.rows / 2, n_used, s.columns, both->nb[1], both->nb[2], 0);
        out = ggml_mul_mat_id(ctx, down, ggml_cont(ctx, gate), selected);
    } else {
        out = ggml_mul_mat(ctx, w, x);
    }
    ggml_build_forward_expand(graph, out);
    // As aligned as a session's tensors are.
    const ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
    for (ggml_tensor *t : {x, w, down}) {
        if (t) {
            fill(t);
        }
    }
    for (int64_t i = 0; selected && i < n_used * s.columns; ++i) {
        static_cast<int32_t *>(selected->data)[i] = static_cast<int32_t>(i % s.experts);
        static_cast<float *>(weights->data)[i] = 1.0f / static_cast<float>(n_used);
    }
    const ggml_backend_ptr cpu(ggml_backend_cpu_init());
    ggml_backend_cpu_set_n_threads(cpu.get(), 1);
    double best = 1e9;
    for (int i = 0; i < runs; ++i) {
        for (auto &each : work) {
            each->next = 0;
        }
        const double start = seconds();
        ggml_backend_graph_compute(cpu.get(), graph);
        best = std::min(best, seconds() - start);
    }
    const double one = static_cast<double>(s.depth * s.rows * s.columns * n_used);
    return 2e-9 * one * (s.experts ? 1.5 : 1.0) / best;
}

} // namespace

int main(int argc, char **argv) {
    const int runs = argc > 1 ? std::atoi(argv[1]) : 20;
    DG_PEAK("float32, 256 bits", dg::FEATURE_FMA, 16, "vfmadd231ps %%ymm15, %%ymm14, %%ymm")
    DG_PEAK("words, 256 bits, without their additions", dg::FEATURE_AVX2, 32, "vpmaddwd %%ymm15, %%ymm14, %%ymm")
    DG_PEAK("bytes, 256 bits, without their additions", dg::FEATURE_AVX2, 64, "vpmaddubsw %%ymm15, %%ymm14, %%ymm")
    DG_PEAK("float32, 512 bits", dg::FEATURE_AVX512, 32, "vfmadd231ps %%zmm15, %%zmm14, %%zmm")
    DG_PEAK("bfloat16, 512 bits", dg::FEATURE_AVX512_BF16, 64, "vdpbf16ps %%zmm15, %%zmm14, %%zmm")
    DG_PEAK("bytes, 512 bits", dg::FEATURE_AVX512_VNNI, 128, "vpdpbusd %%zmm15, %%zmm14, %%zmm")
    const Shape shapes[] = {
        {"dense, 256 columns", 2816, 768, 0, 0, 256},
        {"experts, 16 rows each", 2816, 1408, 8, 2, 64},
        {"experts, 32 rows each", 2816, 1408, 8, 2, 128},
        {"experts, 64 rows each", 2816, 1408, 8, 2, 256},
    };
    const ggml_type types[] = {GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,
                               GGML_TYPE_Q5_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K};
    for (const Shape &shape : shapes) {
        if (argc > 2 && !std::strstr(shape.name, argv[2])) {
            continue;
        }
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
