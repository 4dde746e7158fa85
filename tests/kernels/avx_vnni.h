// AVX-VNNI's one instruction that the kernels use, written out: what is left of them can then run on any AVX2.
#pragma once

#include <immintrin.h>

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 written_out

static inline __m256i written_out(__m256i sum, __m256i weights, __m256i columns) {
    int values[8];
    unsigned char unsigned_bytes[32];
    signed char signed_bytes[32];
    _mm256_storeu_si256((__m256i *)values, sum);
    _mm256_storeu_si256((__m256i *)unsigned_bytes, weights);
    _mm256_storeu_si256((__m256i *)signed_bytes, columns);
    for (int i = 0; i < 32; ++i) {
        values[i / 4] += unsigned_bytes[i] * signed_bytes[i];
    }
    return _mm256_loadu_si256((const __m256i *)values);
}
