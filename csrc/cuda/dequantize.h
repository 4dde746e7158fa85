// One weight of a quantized row, for kernels that want few rows of a matrix and no copy of it. The block layouts are
// ggml's (ggml-common.h); the tests hold each against gguf's own dequantization, bit for bit.
#pragma once

#include "cuda/block.h"

#include <cstdint>
#include <cstring>

namespace dg::cuda {

// The types of token_embd that are gathered here; other files take the generic path.
enum class RowType : int32_t { F32, F16, BF16, Q8_0, Q4_K, Q5_K, Q6_K };

namespace detail {

template <typename T> DG_HD T load(const uint8_t *at) {
    T value;
    memcpy(&value, at, sizeof value);
    return value;
}

DG_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Exact for all halves, subnormal ones included: their exponent is that of a float with 2^112 taken off.
DG_HD float half_at(const uint8_t *at) {
    const uint32_t bits = load<uint16_t>(at);
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t rest = (bits & 0x7FFFu) << 13;
    if ((bits & 0x7C00u) == 0x7C00u) {
        return float_of(sign | rest | 0x7F800000u);
    }
    const float magnitude = float_of(rest) * float_of(0x77800000u); // 2^112
    return sign ? -magnitude : magnitude;
}

constexpr int32_t SUPER = 256; // weights in a block of a K-quant

// The 6-bit scale and minimum of sub-block `j` (of 8) in the 12 bytes of Q4_K and Q5_K: of one, where
// cpu/kernels/quantized_rows.cpp wants all eight and takes four bytes at a time.
DG_HD void scale_and_min(const uint8_t *packed, int32_t j, int32_t &scale, int32_t &minimum) {
    if (j < 4) {
        scale = packed[j] & 63;
        minimum = packed[j + 4] & 63;
    } else {
        scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
    }
}

} // namespace detail

// Bytes of a row of `n` weights; n is a multiple of the type's block.
DG_HD int64_t row_bytes(RowType type, int64_t n) {
    switch (type) {
        case RowType::F32: return n * 4;
        case RowType::F16:
        case RowType::BF16: return n * 2;
        case RowType::Q8_0: return n / 32 * 34;
        case RowType::Q4_K: return n / detail::SUPER * 144;
        case RowType::Q5_K: return n / detail::SUPER * 176;
        case RowType::Q6_K: return n / detail::SUPER * 210;
    }
    return 0;
}

// Weight `i` of the row at `row`.
template <RowType TYPE> DG_HD float weight_at(const uint8_t *row, int32_t i) {
    using namespace detail;
    if constexpr (TYPE == RowType::F32) {
        return load<float>(row + int64_t{i} * 4);
    } else if constexpr (TYPE == RowType::F16) {
        return half_at(row + int64_t{i} * 2);
    } else if constexpr (TYPE == RowType::BF16) {
        return float_of(uint32_t{load<uint16_t>(row + int64_t{i} * 2)} << 16);
    } else if constexpr (TYPE == RowType::Q8_0) {
        const uint8_t *b = row + int64_t{i / 32} * 34; // d, 32 x int8
        return half_at(b) * static_cast<float>(load<int8_t>(b + 2 + i % 32));
    } else if constexpr (TYPE == RowType::Q6_K) {
        const uint8_t *b = row + int64_t{i / SUPER} * 210; // 128 x low 4 bits, 64 x high 2 bits, 16 x int8 scale, d
        const int32_t k = i % SUPER;
        const int32_t half = k / 128; // each half has 64 low bytes and 32 high ones
        const int32_t quarter = k % 128 / 32;
        const int32_t at = k % 32;
        const int32_t low = b[half * 64 + quarter % 2 * 32 + at] >> (quarter / 2 * 4) & 15;
        const int32_t high = b[128 + half * 32 + at] >> (quarter * 2) & 3;
        const auto scale = static_cast<float>(load<int8_t>(b + 192 + k / 16));
        return half_at(b + 208) * scale * static_cast<float>((low | high << 4) - 32);
    } else {
        static_assert(TYPE == RowType::Q4_K || TYPE == RowType::Q5_K, "every type has its case");
        constexpr bool FIVE = TYPE == RowType::Q5_K;
        // d, dmin, 12 bytes of scales; Q5_K: 32 x high bits; 128 x low 4 bits
        const uint8_t *b = row + int64_t{i / SUPER} * (FIVE ? 176 : 144);
        const int32_t k = i % SUPER;
        const int32_t j = k / 32;
        int32_t scale = 0;
        int32_t minimum = 0;
        scale_and_min(b + 4, j, scale, minimum);
        const uint8_t *low = b + (FIVE ? 48 : 16);
        int32_t q = low[j / 2 * 32 + k % 32] >> (j % 2 * 4) & 15;
        if constexpr (FIVE) {
            q |= (b[16 + k % 32] >> j & 1) << 4;
        }
        return half_at(b) * static_cast<float>(scale) * static_cast<float>(q) -
               half_at(b + 2) * static_cast<float>(minimum);
    }
}

} // namespace dg::cuda
