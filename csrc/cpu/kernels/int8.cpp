#include "cpu/kernels/int8.h"

#include "cpu/kernels/quantized_rows.h"

#include <cmath>
#include <type_traits>

#if DG_HAS_INT8
#    include <immintrin.h>
#endif

namespace dg::DG_LEVEL {

bool has_int8_product(ggml_type type) {
#if DG_HAS_INT8
    switch (type) {
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K: return true;
        default: return false;
    }
#else
    (void)type;
    return false;
#endif
}

#if DG_HAS_INT8
namespace {

// What a type's quants are, seen as integers from 0 on.
struct Layout {
    int32_t zero; // the integer that stands for 0
    bool halves;  // 16 values share a scale, not 32
    bool minimum; // minima are subtracted
};

template <ggml_type TYPE> constexpr Layout layout() {
    switch (TYPE) {
        case GGML_TYPE_Q8_0: return {128, false, false};
        case GGML_TYPE_Q4_0: return {8, false, false};
        case GGML_TYPE_Q5_0: return {16, false, false};
        case GGML_TYPE_Q6_K: return {32, true, false};
        default: return {0, false, true}; // Q4_K, Q5_K
    }
}

__m512i load_int(const void *from) { return _mm512_loadu_si512(from); }

// R rows (even) and V vectors of columns.
template <ggml_type TYPE, int R, int V>
void multiply_tile_int8(const IntRows &rows, int64_t first, int64_t depth, const GroupColumns *x, float *out,
                        bool add) {
    constexpr Layout L = layout<TYPE>();
    constexpr int PAIR = R >= 2 ? 2 : 1;
    constexpr int PARTS = L.halves ? 2 : 1; // of a group, each with a scale of its own
    constexpr int FOURS = GROUP / 4 / PARTS;
    __m512 sums[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            sums[r][v] = _mm512_setzero_ps();
        }
    }
    const uint8_t *quants = rows.quants + first * IntRows::ROW;
    const float *scales = rows.scales + first * IntRows::SCALES;
    const float *minima = rows.minima + first * IntRows::SCALES;
    for (int64_t g = 0; g < depth / GROUP; ++g, ++x) {
        __m512 scale[V];
        __m512 low[V];           // what a minimum of 1 takes away
        __m512i start[PARTS][V]; // what the integers' distance from the quants comes to
        for (int v = 0; v < V; ++v) {
            scale[v] = _mm512_loadu_ps(x->scale + v * LANES);
            const __m512i sum[2] = {load_int(x->sum[0] + v * LANES), load_int(x->sum[1] + v * LANES)};
            if (L.minimum) {
                low[v] = _mm512_mul_ps(scale[v], _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], sum[1])));
            }
            for (int part = 0; part < PARTS; ++part) {
                start[part][v] = _mm512_mullo_epi32(PARTS == 2 ? sum[part] : _mm512_add_epi32(sum[0], sum[1]),
                                                    _mm512_set1_epi32(-L.zero));
            }
        }
        for (int r = 0; r < R; r += PAIR) {
            for (int part = 0; part < PARTS; ++part) {
                __m512i dots[PAIR][V];
                for (int i = 0; i < PAIR; ++i) {
                    for (int v = 0; v < V; ++v) {
                        dots[i][v] = start[part][v];
                    }
                }
                for (int four = part * FOURS; four < (part + 1) * FOURS; ++four) {
                    __m512i columns[V];
                    for (int v = 0; v < V; ++v) {
                        columns[v] = load_int(x->quants[four][v * LANES]);
                    }
                    for (int i = 0; i < PAIR; ++i) {
                        int32_t weights;
                        std::memcpy(&weights, quants + (r + i) * IntRows::ROW + g * GROUP + four * 4, sizeof weights);
                        for (int v = 0; v < V; ++v) {
                            dots[i][v] = _mm512_dpbusd_epi32(dots[i][v], _mm512_set1_epi32(weights), columns[v]);
                        }
                    }
                }
                for (int i = 0; i < PAIR; ++i) {
                    const float *row_scales = scales + (r + i) * IntRows::SCALES;
                    const __m512 factor = _mm512_set1_ps(row_scales[g * PARTS + part]);
                    for (int v = 0; v < V; ++v) {
                        const __m512 dot = _mm512_cvtepi32_ps(dots[i][v]);
                        sums[r + i][v] = _mm512_fmadd_ps(dot, _mm512_mul_ps(factor, scale[v]), sums[r + i][v]);
                    }
                }
            }
            for (int i = 0; L.minimum && i < PAIR; ++i) {
                const __m512 minimum = _mm512_set1_ps(minima[(r + i) * IntRows::SCALES + g]);
                for (int v = 0; v < V; ++v) {
                    sums[r + i][v] = _mm512_fnmadd_ps(minimum, low[v], sums[r + i][v]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            float *to = out + r * COLUMNS + v * LANES;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sums[r][v]) : sums[r][v]);
        }
    }
}

template <ggml_type TYPE, int V>
void multiply_rows_int8(const IntRows &rows, int64_t n_rows, int64_t depth, const GroupColumns *x, float *out,
                        bool add) {
    int64_t r = 0;
    for (; r + 8 <= n_rows; r += 8) {
        multiply_tile_int8<TYPE, 8, V>(rows, r, depth, x, out + r * COLUMNS, add);
    }
    for (; r + 2 <= n_rows; r += 2) {
        multiply_tile_int8<TYPE, 2, V>(rows, r, depth, x, out + r * COLUMNS, add);
    }
    for (; r < n_rows; ++r) {
        multiply_tile_int8<TYPE, 1, V>(rows, r, depth, x, out + r * COLUMNS, add);
    }
}

} // namespace

void quantize_columns(const float *block, int64_t depth, GroupColumns *out) {
    for (int64_t k = 0; k < depth; k += GROUP, block += GROUP * COLUMNS, ++out) {
        for (int half = 0; half < 2; ++half) {
            const float *at = block + half * LANES;
            // As integers, magnitudes of floats have the same order, with NaN above infinity: neither is lost.
            __m512i magnitude = _mm512_setzero_si512();
            for (int i = 0; i < GROUP; ++i) {
                const __m512i bits = load_int(at + i * COLUMNS);
                magnitude = _mm512_max_epi32(magnitude, _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MAX)));
            }
            const __m512 most = _mm512_castsi512_ps(magnitude);
            const __m512 poison = _mm512_sub_ps(most, most); // 0, or NaN
            const __m512 scale = _mm512_fmadd_ps(most, _mm512_set1_ps(1.0f / 127.0f), poison);
            const __mmask16 nonzero = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
            const __m512 inverse = _mm512_maskz_div_ps(nonzero, _mm512_set1_ps(127.0f), most);
            __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int four = 0; four < GROUP / 4; ++four) {
                __m512i bytes = _mm512_setzero_si512();
                for (int i = 0; i < 4; ++i) {
                    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(at + (four * 4 + i) * COLUMNS), inverse);
                    const __m512i q = _mm512_cvtps_epi32(x); // to the nearest
                    sum[four / 4] = _mm512_add_epi32(sum[four / 4], q);
                    const __m512i byte = _mm512_and_si512(q, _mm512_set1_epi32(255));
                    bytes = _mm512_or_si512(bytes, _mm512_slli_epi32(byte, static_cast<unsigned>(8 * i)));
                }
                _mm512_storeu_si512(out->quants[four][half * LANES], bytes);
            }
            _mm512_storeu_ps(out->scale + half * LANES, scale);
            for (int part = 0; part < 2; ++part) {
                _mm512_storeu_si512(out->sum[part] + half * LANES, sum[part]);
            }
        }
    }
}

void unpack_row(ggml_type type, const void *data, int64_t n, const IntRows &rows, int64_t row) {
    unpack_quants(type, data, n, rows.quants + row * IntRows::ROW, rows.scales + row * IntRows::SCALES,
                  rows.minima + row * IntRows::SCALES);
}

void multiply_int8(ggml_type type, const IntRows &rows, int64_t n_rows, int64_t depth, const GroupColumns *x,
                   float *out, bool narrow, bool add) {
    const auto run = [&](auto tag) {
        constexpr ggml_type TYPE = decltype(tag)::value;
        if (narrow) {
            multiply_rows_int8<TYPE, 1>(rows, n_rows, depth, x, out, add);
        } else {
            multiply_rows_int8<TYPE, 2>(rows, n_rows, depth, x, out, add);
        }
    };
    switch (type) {
        case GGML_TYPE_Q8_0: run(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>()); return;
        case GGML_TYPE_Q4_0: run(std::integral_constant<ggml_type, GGML_TYPE_Q4_0>()); return;
        case GGML_TYPE_Q5_0: run(std::integral_constant<ggml_type, GGML_TYPE_Q5_0>()); return;
        case GGML_TYPE_Q6_K: run(std::integral_constant<ggml_type, GGML_TYPE_Q6_K>()); return;
        default: run(std::integral_constant<ggml_type, GGML_TYPE_Q4_K>()); return; // and Q5_K
    }
}

#endif

} // namespace dg::DG_LEVEL
