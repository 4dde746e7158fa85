#include "cpu/kernels/quantized_rows.h"

#include <cstring>

#if defined(__F16C__)
#    include <immintrin.h>
#elif defined(__aarch64__)
#    include <arm_neon.h>
#endif

namespace dg::DG_LEVEL {
namespace {

float half(const uint8_t *at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#elif defined(__aarch64__)
    __fp16 value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#else
    // A float's exponent is biased by 112 more: moved into its place, a half is 2^112 times too small.
    uint32_t wide = (bits & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    value *= 0x1p112f;
    std::memcpy(&wide, &value, sizeof wide);
    wide |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u; // infinity and NaN
    wide |= (bits & 0x8000u) << 16;
    std::memcpy(&value, &wide, sizeof value);
    return value;
#endif
}

void decode_f16(const uint8_t *__restrict from, int64_t n, float *__restrict out) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 2 * i))));
    }
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4) {
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from + 2 * i))));
    }
#endif
    for (; i < n; ++i) {
        out[i] = half(from + 2 * i);
    }
}

void decode_bf16(const uint8_t *__restrict from, int64_t n, float *__restrict out) {
    for (int64_t i = 0; i < n; ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, sizeof bits);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        std::memcpy(out + i, &wide, sizeof wide);
    }
}

// Quants and what they become are told apart for the compiler: bytes may alias everything, and loops over them are then
// not vectorized (Q6_K: 0.64 ns a weight instead of 0.06).

constexpr int64_t SMALL = 32;  // values of a Q4_0, Q5_0 or Q8_0 block
constexpr int64_t SUPER = 256; // of a K type's

// scale, 32 int8
void decode_q8_0(const uint8_t *__restrict block, int64_t n, float *__restrict out) {
    for (int64_t i = 0; i < n; i += SMALL, block += 2 + SMALL, out += SMALL) {
        const float d = half(block);
        const auto *q = reinterpret_cast<const int8_t *>(block + 2);
        for (int j = 0; j < SMALL; ++j) {
            out[j] = d * static_cast<float>(q[j]);
        }
    }
}

typedef uint8_t Sixteen __attribute__((vector_size(16)));
typedef uint64_t TwoWords __attribute__((vector_size(16)));

// The 32 quants of a Q4_0 or Q5_0 block: values 0..15 in the low nibbles of 16 bytes, 16..31 in the high ones; 32 fifth
// bits before them. As vectors that never leave registers: GCC unrolls loops over 16 bytes instead of vectorizing them,
// and words that are stored before a vector of them is loaded make the load wait (Q4_0: 0.3 ns a weight, now 0.03).
template <bool FIVE> void quants_q45_0(const uint8_t *__restrict block, uint8_t *__restrict quants) {
    Sixteen nibbles;
    std::memcpy(&nibbles, block + (FIVE ? 6 : 2), sizeof nibbles);
    Sixteen values[2] = {nibbles & 15, nibbles >> 4};
#if defined(__AVX2__)
    if (FIVE) {
        int32_t bits;
        std::memcpy(&bits, block + 2, sizeof bits);
        const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
        const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), bytes), bit);
        const __m256i fifth = _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16));
        values[0] |= reinterpret_cast<Sixteen>(_mm256_castsi256_si128(fifth));
        values[1] |= reinterpret_cast<Sixteen>(_mm256_extracti128_si256(fifth, 1));
    }
#else
    for (int i = 0; FIVE && i < 2; ++i) { // eight bits become eight bytes by one multiplication
        constexpr uint64_t EIGHT_TIMES = 0x0101010101010101ull;
        const TwoWords bits = {block[2 + 2 * i] * EIGHT_TIMES, block[3 + 2 * i] * EIGHT_TIMES};
        values[i] |= reinterpret_cast<Sixteen>(reinterpret_cast<Sixteen>(bits & 0x8040201008040201ull) != 0) & 16;
    }
#endif
    std::memcpy(quants, &values[0], 16);
    std::memcpy(quants + 16, &values[1], 16);
}

// scale, [32 fifth bits], 16 bytes
template <bool FIVE> void decode_q45_0(const uint8_t *__restrict block, int64_t n, float *__restrict out) {
    for (int64_t i = 0; i < n; i += SMALL, block += FIVE ? 22 : 18, out += SMALL) {
        uint8_t quants[SMALL];
        const float d = half(block);
        quants_q45_0<FIVE>(block, quants);
        for (int j = 0; j < SMALL; ++j) {
            out[j] = d * static_cast<float>(quants[j] - (FIVE ? 16 : 8));
        }
    }
}

// The eight 6-bit scales and minima in the 12 bytes of a Q4_K or Q5_K block, times d and dmin. The first four of each
// lie in the low bits of bytes 0..3 and 4..7; the others in the nibbles of bytes 8..11 and the two high bits of those.
// Four bytes at a time: one by one they cost as much as all the block's quants. cuda/dequantize.h has the form for one
// weight; tests hold both against gguf's own dequantization.
void scales_and_minima(const uint8_t *__restrict block, float *__restrict scales, float *__restrict minima) {
    const float d = half(block);
    const float dmin = half(block + 2);
    uint32_t words[3];
    std::memcpy(words, block + 4, sizeof words);
    const uint32_t packed[4] = {words[0] & 0x3f3f3f3fu, (words[2] & 0x0f0f0f0fu) | ((words[0] >> 6 & 0x03030303u) << 4),
                                words[1] & 0x3f3f3f3fu,
                                (words[2] >> 4 & 0x0f0f0f0fu) | ((words[1] >> 6 & 0x03030303u) << 4)};
    uint8_t bytes[16];
    std::memcpy(bytes, packed, sizeof bytes);
    for (int j = 0; j < 8; ++j) {
        scales[j] = d * static_cast<float>(bytes[j]);
        minima[j] = dmin * static_cast<float>(bytes[j + 8]);
    }
}

// The 256 quants of a Q4_K or Q5_K block: sub-blocks 2 i lie in the low nibbles of 32 bytes, 2 i + 1 in the high ones;
// bit j of 32 further bytes is the fifth bit of sub-block j.
template <bool FIVE> void quants_q45_k(const uint8_t *__restrict block, uint8_t *__restrict quants) {
    const uint8_t *q = block + (FIVE ? 48 : 16);
    const uint8_t *high = block + 16;
    for (int j = 0; j < 8; j += 2, q += 32, quants += 64) {
        for (int l = 0; l < 32; ++l) {
            quants[l] = q[l] & 15;
            quants[l + 32] = q[l] >> 4;
        }
        for (int l = 0; FIVE && l < 32; ++l) {
            quants[l] = static_cast<uint8_t>(quants[l] | ((high[l] >> j & 1) << 4));
            quants[l + 32] = static_cast<uint8_t>(quants[l + 32] | ((high[l] >> (j + 1) & 1) << 4));
        }
    }
}

// The 256 quants of a Q6_K block, in two halves of 128: low nibbles in 64 bytes, two high bits each in 32.
void quants_q6_k(const uint8_t *__restrict block, uint8_t *__restrict quants) {
    for (int h = 0; h < 2; ++h, quants += 128) {
        const uint8_t *low = block + h * 64;
        const uint8_t *high = block + 128 + h * 32;
        for (int l = 0; l < 32; ++l) {
            quants[l] = static_cast<uint8_t>((low[l] & 15) | ((high[l] & 3) << 4));
            quants[l + 32] = static_cast<uint8_t>((low[l + 32] & 15) | ((high[l] >> 2 & 3) << 4));
            quants[l + 64] = static_cast<uint8_t>((low[l] >> 4) | ((high[l] >> 4 & 3) << 4));
            quants[l + 96] = static_cast<uint8_t>((low[l + 32] >> 4) | ((high[l] >> 6) << 4));
        }
    }
}

template <bool FIVE> void decode_q45_k(const uint8_t *__restrict block, int64_t n, float *__restrict out) {
    for (int64_t i = 0; i < n; i += SUPER, block += FIVE ? 176 : 144) {
        float scales[8];
        float minima[8];
        uint8_t quants[SUPER];
        scales_and_minima(block, scales, minima);
        quants_q45_k<FIVE>(block, quants);
        for (int j = 0; j < 8; ++j, out += 32) {
            for (int l = 0; l < 32; ++l) {
                out[l] = scales[j] * static_cast<float>(quants[j * 32 + l]) - minima[j];
            }
        }
    }
}

// 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d: the scales times d
void scales_q6_k(const uint8_t *__restrict block, float *__restrict scales) {
    const float d = half(block + 208);
    for (int part = 0; part < 16; ++part) {
        scales[part] = d * static_cast<float>(static_cast<int8_t>(block[192 + part]));
    }
}

void decode_q6_k(const uint8_t *__restrict block, int64_t n, float *__restrict out) {
    for (int64_t i = 0; i < n; i += SUPER, block += 210) {
        uint8_t quants[SUPER];
        float scales[16];
        quants_q6_k(block, quants);
        scales_q6_k(block, scales);
        for (int part = 0; part < 16; ++part, out += 16) {
            for (int l = 0; l < 16; ++l) {
                out[l] = scales[part] * static_cast<float>(quants[part * 16 + l] - 32);
            }
        }
    }
}

void unpack_q8_0(const uint8_t *__restrict block, int64_t n, uint8_t *__restrict quants, float *__restrict scales) {
    for (int64_t i = 0; i < n; i += SMALL, block += 2 + SMALL, quants += SMALL) {
        *scales++ = half(block);
        for (int j = 0; j < SMALL; ++j) {
            quants[j] = static_cast<uint8_t>(block[2 + j] ^ Q8_ZERO);
        }
    }
}

template <bool FIVE>
void unpack_q45_0(const uint8_t *__restrict block, int64_t n, uint8_t *__restrict quants, float *__restrict scales) {
    for (int64_t i = 0; i < n; i += SMALL, block += FIVE ? 22 : 18, quants += SMALL) {
        *scales++ = half(block);
        quants_q45_0<FIVE>(block, quants);
    }
}

template <bool FIVE>
void unpack_q45_k(const uint8_t *__restrict block, int64_t n, uint8_t *__restrict quants, float *__restrict scales,
                  float *__restrict minima) {
    for (int64_t i = 0; i < n; i += SUPER, block += FIVE ? 176 : 144, quants += SUPER, scales += 8, minima += 8) {
        scales_and_minima(block, scales, minima);
        quants_q45_k<FIVE>(block, quants);
    }
}

void unpack_q6_k(const uint8_t *__restrict block, int64_t n, uint8_t *__restrict quants, float *__restrict scales) {
    for (int64_t i = 0; i < n; i += SUPER, block += 210, quants += SUPER, scales += 16) {
        quants_q6_k(block, quants);
        scales_q6_k(block, scales);
    }
}

} // namespace

void decode(ggml_type type, const void *data, int64_t n, float *__restrict out) {
    const auto *bytes = static_cast<const uint8_t *>(data);
    switch (type) {
        case GGML_TYPE_F32: std::memcpy(out, data, static_cast<size_t>(n) * sizeof *out); return;
        case GGML_TYPE_F16: decode_f16(bytes, n, out); return;
        case GGML_TYPE_BF16: decode_bf16(bytes, n, out); return;
        case GGML_TYPE_Q8_0: decode_q8_0(bytes, n, out); return;
        case GGML_TYPE_Q4_0: decode_q45_0<false>(bytes, n, out); return;
        case GGML_TYPE_Q5_0: decode_q45_0<true>(bytes, n, out); return;
        case GGML_TYPE_Q4_K: decode_q45_k<false>(bytes, n, out); return;
        case GGML_TYPE_Q5_K: decode_q45_k<true>(bytes, n, out); return;
        case GGML_TYPE_Q6_K: decode_q6_k(bytes, n, out); return;
        default: ggml_get_type_traits(type)->to_float(data, out, n); return;
    }
}

void unpack_words(const void *data, int64_t n, int16_t *__restrict quants, float *__restrict scales) {
    const auto *__restrict block = static_cast<const uint8_t *>(data);
    for (int64_t i = 0; i < n; i += SMALL, block += 2 + SMALL, quants += SMALL) {
        *scales++ = half(block);
#if defined(__AVX2__)
        for (int j = 0; j < SMALL; j += 16) { // GCC would load 32 bytes and take them apart
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(block + 2 + j));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(quants + j), _mm256_cvtepi8_epi16(bytes));
        }
#else
        for (int j = 0; j < SMALL; ++j) {
            quants[j] = static_cast<int8_t>(block[2 + j]);
        }
#endif
    }
}

void unpack_quants(ggml_type type, const void *data, int64_t n, uint8_t *__restrict quants, float *__restrict scales,
                   float *__restrict minima) {
    const auto *bytes = static_cast<const uint8_t *>(data);
    switch (type) {
        case GGML_TYPE_Q8_0: unpack_q8_0(bytes, n, quants, scales); return;
        case GGML_TYPE_Q4_0: unpack_q45_0<false>(bytes, n, quants, scales); return;
        case GGML_TYPE_Q5_0: unpack_q45_0<true>(bytes, n, quants, scales); return;
        case GGML_TYPE_Q4_K: unpack_q45_k<false>(bytes, n, quants, scales, minima); return;
        case GGML_TYPE_Q5_K: unpack_q45_k<true>(bytes, n, quants, scales, minima); return;
        case GGML_TYPE_Q6_K: unpack_q6_k(bytes, n, quants, scales); return;
        default: return;
    }
}

} // namespace dg::DG_LEVEL
