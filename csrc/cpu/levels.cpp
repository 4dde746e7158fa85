#include "cpu/levels.h"

#include "base/error.h"
#include "cpu/features.h"

#include <cstring>
#include <vector>

// Of each level of its kind of processor the build says whether it was compiled: -DDG_HAS_avx2=1.
#define DG_KERNELS_0(name) nullptr
#define DG_KERNELS_1(name) name::kernels
#define DG_PASTE(a, b) a##b
#define DG_KERNELS(has, name) DG_PASTE(DG_KERNELS_, has)(name)
#define DG_DECLARE(name)                                                                                               \
    namespace name {                                                                                                   \
    const Kernels *kernels();                                                                                          \
    }

namespace dg {

#if defined(DG_HAS_sse4)
DG_DECLARE(sse4)
DG_DECLARE(avx2)
DG_DECLARE(avx_vnni)
DG_DECLARE(avx512)
DG_DECLARE(avx512_bf16)
DG_DECLARE(amx)
#elif defined(DG_HAS_neon)
DG_DECLARE(neon)
DG_DECLARE(dotprod)
DG_DECLARE(i8mm)
#elif defined(DG_HAS_generic)
DG_DECLARE(generic)
#endif

namespace plain { // kernels/logits.cpp alone
LogitSums sum_logits(const float *z, int32_t n, float greatest);
float scale_logits(float *z, int32_t n, float t);
} // namespace plain

namespace {

#if defined(DG_HAS_sse4)
constexpr uint32_t V3 = FEATURE_SSE42 | FEATURE_AVX | FEATURE_AVX2 | FEATURE_FMA | FEATURE_F16C;
constexpr uint32_t V4 = V3 | FEATURE_AVX512 | FEATURE_AVX512_VNNI;
#endif

std::vector<Level> all_levels() {
    return {
#if defined(DG_HAS_sse4)
        {"sse4", "x86-64-v2", FEATURE_SSE42, DG_KERNELS(DG_HAS_sse4, sse4)},
        {"avx2", "x86-64-v3", V3, DG_KERNELS(DG_HAS_avx2, avx2)},
        {"avx_vnni", "x86-64-v3 with AVX-VNNI", V3 | FEATURE_AVX_VNNI, DG_KERNELS(DG_HAS_avx_vnni, avx_vnni)},
        {"avx512", "x86-64-v4 with VNNI", V4, DG_KERNELS(DG_HAS_avx512, avx512)},
        {"avx512_bf16", "x86-64-v4 with VNNI and products of bfloat16", V4 | FEATURE_AVX512_BF16,
         DG_KERNELS(DG_HAS_avx512_bf16, avx512_bf16)},
        {"amx", "the same with tiles of bfloat16", V4 | FEATURE_AVX512_BF16 | FEATURE_AMX_BF16,
         DG_KERNELS(DG_HAS_amx, amx)},
#elif defined(DG_HAS_neon)
        {"neon", "ARMv8.0", 0, DG_KERNELS(DG_HAS_neon, neon)},
        {"dotprod", "with dot products of bytes", FEATURE_DOTPROD, DG_KERNELS(DG_HAS_dotprod, dotprod)},
        {"i8mm", "with dot products and matrices of bytes", FEATURE_DOTPROD | FEATURE_I8MM,
         DG_KERNELS(DG_HAS_i8mm, i8mm)},
#elif defined(DG_HAS_generic)
        {"generic", "what the build was made for", 0, DG_KERNELS(DG_HAS_generic, generic)},
#endif
    };
}

// "avx2, avx512", of those that can be used.
std::string usable_names() {
    std::string names;
    for (const Level &level : levels()) {
        if (level.kernels && is_offered(level)) {
            names += (names.empty() ? "" : ", ") + std::string(level.name);
        }
    }
    return names.empty() ? "none" : names;
}

} // namespace

const std::vector<Level> &levels() {
    static const std::vector<Level> all = all_levels();
    return all;
}

bool is_offered(const Level &level) { return (level.needs & ~processor_features()) == 0; }

void check_processor() {
    if (*missing_features()) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    format("this library was built for a processor with %s, which this one lacks: build it here, or "
                           "for any processor with -DGGML_NATIVE=OFF",
                           missing_features()));
    }
}

const Kernels *choose_kernels(const char *name) {
    check_processor();
    const Level *best = nullptr;
    for (const Level &level : levels()) {
        const bool usable = level.kernels && is_offered(level);
        if (!name || !*name) {
            best = usable ? &level : best;
        } else if (std::strcmp(level.name, name) == 0) {
            if (!usable) {
                throw Error(DG_ERROR_UNSUPPORTED,
                            format("cpu is \"%s\": %s; there are: %s", name,
                                   level.kernels ? "this processor lacks it"
                                                 : "the compiler that built this library could not compile it",
                                   usable_names().c_str()));
            }
            best = &level;
        }
    }
    if (!best && name && *name) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    format("cpu is \"%s\": no such level; there are: %s", name, usable_names().c_str()));
    }
    return best ? best->kernels() : nullptr;
}

const Kernels &logit_kernels(const Kernels *chosen) {
    static const Kernels floor = [] {
        Kernels kernels = {};
        kernels.sum_logits = plain::sum_logits;
        kernels.scale_logits = plain::scale_logits;
        return kernels;
    }();
    static const Kernels *const best = choose_kernels(nullptr);
    return chosen ? *chosen : best ? *best : floor;
}

} // namespace dg
