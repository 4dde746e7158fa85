// What this processor offers, as far as its operating system lets it be used: CPUID and XCR0 on x86, what the kernel
// tells on ARM.
#pragma once

#include <cstdint>

namespace dg {

// Bits of a set of features. On x86 AVX and above count only where the system saves the registers.
enum Feature : uint32_t {
    FEATURE_SSE42 = 1u << 0, // with SSSE3, SSE4.1 and POPCNT: x86-64-v2
    FEATURE_AVX = 1u << 1,
    FEATURE_AVX2 = 1u << 2, // with BMI1, BMI2 and LZCNT
    FEATURE_FMA = 1u << 3,
    FEATURE_F16C = 1u << 4,
    FEATURE_AVX_VNNI = 1u << 5,
    FEATURE_AVX512 = 1u << 6, // F, BW, CD, DQ and VL: x86-64-v4
    FEATURE_AVX512_VBMI = 1u << 7,
    FEATURE_AVX512_VNNI = 1u << 8,
    FEATURE_AVX512_BF16 = 1u << 9,
    FEATURE_AVX512_NEW = 1u << 10, // VBMI2, BITALG, VPOPCNTDQ, as Ice Lake and Zen 4 have them
    FEATURE_DOTPROD = 1u << 11,
    FEATURE_I8MM = 1u << 12,
    FEATURE_FP16 = 1u << 13, // arithmetic
    FEATURE_SVE = 1u << 14,
    FEATURE_AMX_BF16 = 1u << 15, // where the system lets this process use tiles
};

// Asks the processor. Runs before anything else may: it is compiled for the oldest processor of its kind.
uint32_t processor_features();

// What the library, besides kernels/, was compiled for.
uint32_t floor_features();

// What it needs and this processor lacks, as names with commas between; "" if nothing.
const char *missing_features();

// The names of a set's features, with commas between, cut to `size` bytes with the final 0.
void name_features(uint32_t features, char *text, unsigned size);

} // namespace dg
