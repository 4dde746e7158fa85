// What the library was compiled for. Compiled with the flags of everything outside of kernels/; a function that returns
// a constant runs on any processor.
#include "cpu/features.h"

namespace dg {

uint32_t floor_features() {
    uint32_t features = 0;
#if defined(__SSE4_2__)
    features |= FEATURE_SSE42;
#endif
#if defined(__AVX__)
    features |= FEATURE_AVX;
#endif
#if defined(__AVX2__)
    features |= FEATURE_AVX2;
#endif
#if defined(__FMA__)
    features |= FEATURE_FMA;
#endif
#if defined(__F16C__)
    features |= FEATURE_F16C;
#endif
#if defined(__AVXVNNI__)
    features |= FEATURE_AVX_VNNI;
#endif
#if defined(__AVX512F__)
    features |= FEATURE_AVX512;
#endif
#if defined(__AVX512VBMI__)
    features |= FEATURE_AVX512_VBMI;
#endif
#if defined(__AVX512VNNI__)
    features |= FEATURE_AVX512_VNNI;
#endif
#if defined(__AVX512BF16__)
    features |= FEATURE_AVX512_BF16;
#endif
#if defined(__AVX512VBMI2__)
    features |= FEATURE_AVX512_NEW;
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    features |= FEATURE_DOTPROD;
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    features |= FEATURE_I8MM;
#endif
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
    features |= FEATURE_FP16;
#endif
#if defined(__ARM_FEATURE_SVE)
    features |= FEATURE_SVE;
#endif
    return features;
}

} // namespace dg
