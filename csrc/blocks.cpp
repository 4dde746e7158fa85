#include "blocks.h"

#include "ggml-cpu.h"

#include <cstring>

#if defined(__F16C__)
#    include <immintrin.h>
#endif

namespace dg {
namespace {

float half(const uint8_t *at) {
    uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    return ggml_fp16_to_fp32(bits);
#endif
}

constexpr int64_t SMALL = 32;  // values of a Q4_0, Q5_0 or Q8_0 block
constexpr int64_t SUPER = 256; // of a K type's

// scale, 32 int8
void decode_q8_0(const uint8_t *block, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += SMALL, block += 2 + SMALL, out += SMALL) {
        const float d = half(block);
        const auto *q = reinterpret_cast<const int8_t *>(block + 2);
        for (int j = 0; j < SMALL; ++j) {
            out[j] = d * static_cast<float>(q[j]);
        }
    }
}

// scale, 16 bytes: low nibbles are values 0..15, high ones 16..31
void decode_q4_0(const uint8_t *block, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += SMALL, block += 2 + SMALL / 2, out += SMALL) {
        const float d = half(block);
        const uint8_t *q = block + 2;
        for (int j = 0; j < 16; ++j) {
            out[j] = d * static_cast<float>((q[j] & 15) - 8);
        }
        for (int j = 0; j < 16; ++j) {
            out[j + 16] = d * static_cast<float>((q[j] >> 4) - 8);
        }
    }
}

// scale, 32 high bits, 16 bytes as Q4_0's
void decode_q5_0(const uint8_t *block, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += SMALL, block += 6 + SMALL / 2, out += SMALL) {
        const float d = half(block);
        uint32_t high;
        std::memcpy(&high, block + 2, sizeof high);
        const uint8_t *q = block + 6;
        for (int j = 0; j < 16; ++j) {
            const auto low = static_cast<int32_t>((q[j] & 15) | (((high >> j) & 1) << 4));
            out[j] = d * static_cast<float>(low - 16);
        }
        for (int j = 0; j < 16; ++j) {
            const auto low = static_cast<int32_t>((q[j] >> 4) | (((high >> (j + 16)) & 1) << 4));
            out[j + 16] = d * static_cast<float>(low - 16);
        }
    }
}

// The 6-bit scale and minimum of sub-block j (of 8) in the 12 bytes of a Q4_K or Q5_K block: the first four lie whole
// in the low bits, the others in a nibble and the two high bits of one of the first.
void scale_and_minimum(const uint8_t *packed, int j, float &scale, float &minimum) {
    int s = packed[j] & 63;
    int m = packed[j + 4] & 63;
    if (j >= 4) {
        s = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        m = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
    }
    scale = static_cast<float>(s);
    minimum = static_cast<float>(m);
}

// d, dmin, 12 bytes of scales, [32 bytes of fifth bits], 128 bytes: sub-blocks 2i in the low nibbles of 32 bytes, 2i +
// 1 in the high ones
template <bool FIVE> void decode_q45_k(const uint8_t *block, int64_t n, float *out) {
    constexpr int64_t HEAD = 16 + (FIVE ? 32 : 0);
    for (int64_t i = 0; i < n; i += SUPER, block += HEAD + SUPER / 2) {
        const float d = half(block);
        const float dmin = half(block + 2);
        for (int j = 0; j < 8; ++j, out += 32) {
            float scale;
            float minimum;
            scale_and_minimum(block + 4, j, scale, minimum);
            scale *= d;
            minimum *= dmin;
            const uint8_t *q = block + HEAD + j / 2 * 32;
            const int shift = j % 2 * 4;
            for (int l = 0; l < 32; ++l) {
                int value = (q[l] >> shift) & 15;
                if (FIVE) {
                    value |= ((block[16 + l] >> j) & 1) << 4;
                }
                out[l] = scale * static_cast<float>(value) - minimum;
            }
        }
    }
}

// 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, d; in two halves of 128 values
void decode_q6_k(const uint8_t *block, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += SUPER, block += 210) {
        const float d = half(block + 208);
        for (int h = 0; h < 2; ++h) {
            const uint8_t *low = block + h * 64;
            const uint8_t *high = block + 128 + h * 32;
            const auto *scales = reinterpret_cast<const int8_t *>(block + 192 + h * 8);
            for (int part = 0; part < 8; ++part, out += 16) { // 16 values that share a scale
                const float scale = d * static_cast<float>(scales[part]);
                const uint8_t *l = low + part % 4 * 16;
                const uint8_t *u = high + part % 2 * 16;
                const int nibble = part / 4 * 4;
                const int pair = part / 2 * 2;
                for (int j = 0; j < 16; ++j) {
                    const int value = ((l[j] >> nibble) & 15) | (((u[j] >> pair) & 3) << 4);
                    out[j] = scale * static_cast<float>(value - 32);
                }
            }
        }
    }
}

void unpack_q8_0(const uint8_t *block, int64_t n, uint8_t *quants, float *scales) {
    for (int64_t i = 0; i < n; i += SMALL, block += 2 + SMALL, quants += SMALL) {
        *scales++ = half(block);
        for (int j = 0; j < SMALL; ++j) {
            quants[j] = block[2 + j] ^ 128;
        }
    }
}

template <bool FIVE> void unpack_q45_0(const uint8_t *block, int64_t n, uint8_t *quants, float *scales) {
    constexpr int64_t HEAD = FIVE ? 6 : 2;
    for (int64_t i = 0; i < n; i += SMALL, block += HEAD + SMALL / 2, quants += SMALL) {
        *scales++ = half(block);
        uint32_t high = 0;
        if (FIVE) {
            std::memcpy(&high, block + 2, sizeof high);
        }
        const uint8_t *q = block + HEAD;
        for (int j = 0; j < 16; ++j) {
            quants[j] = static_cast<uint8_t>((q[j] & 15) | (((high >> j) & 1) << 4));
            quants[j + 16] = static_cast<uint8_t>((q[j] >> 4) | (((high >> (j + 16)) & 1) << 4));
        }
    }
}

template <bool FIVE> void unpack_q45_k(const uint8_t *block, int64_t n, uint8_t *quants, float *scales, float *minima) {
    constexpr int64_t HEAD = 16 + (FIVE ? 32 : 0);
    for (int64_t i = 0; i < n; i += SUPER, block += HEAD + SUPER / 2) {
        const float d = half(block);
        const float dmin = half(block + 2);
        for (int j = 0; j < 8; ++j, quants += 32) {
            scale_and_minimum(block + 4, j, *scales, *minima);
            *scales++ *= d;
            *minima++ *= dmin;
            const uint8_t *q = block + HEAD + j / 2 * 32;
            const int shift = j % 2 * 4;
            for (int l = 0; l < 32; ++l) {
                int value = (q[l] >> shift) & 15;
                if (FIVE) {
                    value |= ((block[16 + l] >> j) & 1) << 4;
                }
                quants[l] = static_cast<uint8_t>(value);
            }
        }
    }
}

void unpack_q6_k(const uint8_t *block, int64_t n, uint8_t *quants, float *scales) {
    for (int64_t i = 0; i < n; i += SUPER, block += 210) {
        const float d = half(block + 208);
        for (int h = 0; h < 2; ++h) {
            for (int part = 0; part < 8; ++part, quants += 16) {
                *scales++ = d * static_cast<float>(reinterpret_cast<const int8_t *>(block + 192)[h * 8 + part]);
                const uint8_t *l = block + h * 64 + part % 4 * 16;
                const uint8_t *u = block + 128 + h * 32 + part % 2 * 16;
                const int nibble = part / 4 * 4;
                const int pair = part / 2 * 2;
                for (int j = 0; j < 16; ++j) {
                    quants[j] = static_cast<uint8_t>(((l[j] >> nibble) & 15) | (((u[j] >> pair) & 3) << 4));
                }
            }
        }
    }
}

} // namespace

void decode(ggml_type type, const void *data, int64_t n, float *out) {
    const auto *bytes = static_cast<const uint8_t *>(data);
    switch (type) {
        case GGML_TYPE_F32: std::memcpy(out, data, static_cast<size_t>(n) * sizeof *out); return;
        case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32(static_cast<const ggml_fp16_t *>(data), out, n); return;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32(static_cast<const ggml_bf16_t *>(data), out, n); return;
        case GGML_TYPE_Q8_0: decode_q8_0(bytes, n, out); return;
        case GGML_TYPE_Q4_0: decode_q4_0(bytes, n, out); return;
        case GGML_TYPE_Q5_0: decode_q5_0(bytes, n, out); return;
        case GGML_TYPE_Q4_K: decode_q45_k<false>(bytes, n, out); return;
        case GGML_TYPE_Q5_K: decode_q45_k<true>(bytes, n, out); return;
        case GGML_TYPE_Q6_K: decode_q6_k(bytes, n, out); return;
        default: ggml_get_type_traits(type)->to_float(data, out, n); return;
    }
}

void unpack_quants(ggml_type type, const void *data, int64_t n, uint8_t *quants, float *scales, float *minima) {
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

} // namespace dg
