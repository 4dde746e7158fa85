// Rows of weights of any ggml type -> float32.
#pragma once

#include "ggml.h"

#include <cstdint>

namespace dg::DG_LEVEL {

// What Q8_0's signed quants are raised by, where the instructions that multiply bytes (integers.h) want unsigned
// weights.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr uint8_t Q8_ZERO = 128;
#else
constexpr uint8_t Q8_ZERO = 0;
#endif

// `n` values (a multiple of the type's block) of a row that begins at `data`. The types that big tensors have are
// decoded here, the others by ggml, whose own code is built for no particular processor.
void decode(ggml_type type, const void *data, int64_t n, float *out);

// The same values of a Q8_0, Q4_0, Q5_0, Q4_K, Q5_K or Q6_K row as bytes. A value is scale * (byte - zero) or scale *
// byte - minimum, with zero Q8_ZERO (Q8_0), 8, 16 (Q5_0), 32 (Q6_K). scales: one for each 32 values, 16
// for Q6_K. minima: one for each 32, of Q4_K and Q5_K.
void unpack_quants(ggml_type type, const void *data, int64_t n, uint8_t *quants, float *scales, float *minima);

// A Q8_0 row as words, and its scales.
void unpack_words(const void *data, int64_t n, int16_t *quants, float *scales);

} // namespace dg::DG_LEVEL
