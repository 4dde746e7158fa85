#include "cpu/kernels/bfloats.h"

#if DG_HAS_BFLOATS
#    include <immintrin.h>
#endif

namespace dg::DG_LEVEL {

#if DG_HAS_BFLOATS
namespace {

typedef BfloatPair PairLanes __attribute__((vector_size(LANES * sizeof(BfloatPair))));

// The nearest bfloat16, halves to even, in the low halves; NaN stays NaN.
PairLanes rounded(Lanes x) {
    return reinterpret_cast<PairLanes>(
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)))));
}

Lanes add_products(Lanes sum, PairLanes weights, PairLanes columns) {
    return reinterpret_cast<Lanes>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(weights),
                                                    reinterpret_cast<__m512bh>(columns)));
}

template <int R, int V, bool ADJACENT>
void multiply_tile_bfloats(const BfloatRows &w, int64_t depth, const BfloatPair *x, float *out, bool add) {
    const int64_t step = ADJACENT ? 1 : w.step;
    const int64_t row = ADJACENT ? w.row : 1;
    Lanes sums[R][V] = {};
    const BfloatPair *at = w.at;
    for (int64_t k = 0; k < depth; k += 2, at += step, x += COLUMNS) {
        PairLanes columns[V];
        for (int v = 0; v < V; ++v) {
            std::memcpy(&columns[v], x + v * LANES, sizeof columns[v]);
        }
        for (int r = 0; r < R; ++r) {
            const PairLanes weights = PairLanes{} + at[r * row];
            for (int v = 0; v < V; ++v) {
                sums[r][v] = add_products(sums[r][v], weights, columns[v]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            float *to = out + r * COLUMNS + v * LANES;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
    }
}

template <int V, bool ADJACENT>
void multiply_rows_bfloats(BfloatRows w, int64_t rows, int64_t depth, const BfloatPair *x, float *out, bool add) {
    const auto some = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; rows >= R; rows -= R, w.at += R * w.row, out += R * COLUMNS) {
            multiply_tile_bfloats<R, V, ADJACENT>(w, depth, x, out, add);
        }
    };
    some(std::integral_constant<int, TILE_ROWS>());
    some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
}

} // namespace

void round_two(const float *first, const float *second, int64_t n, BfloatPair *out) {
    for (int64_t i = 0; i < n; i += LANES) {
        const PairLanes low = rounded(load(first + i));
        const PairLanes pairs = second ? low | rounded(load(second + i)) << 16 : low;
        std::memcpy(out + i, &pairs, sizeof pairs);
    }
}

void round_columns(const float *block, int64_t depth, BfloatPair *out) {
    for (int64_t k = 0; k < depth; k += 2, block += 2 * COLUMNS, out += COLUMNS) {
        round_two(block, k + 1 < depth ? block + COLUMNS : nullptr, COLUMNS, out);
    }
}

void multiply_bfloats(BfloatRows w, int64_t rows, int64_t depth, const BfloatPair *x, float *out, bool narrow,
                      bool add) {
    if (w.step == 1) {
        narrow ? multiply_rows_bfloats<1, true>(w, rows, depth, x, out, add)
               : multiply_rows_bfloats<2, true>(w, rows, depth, x, out, add);
    } else {
        narrow ? multiply_rows_bfloats<1, false>(w, rows, depth, x, out, add)
               : multiply_rows_bfloats<2, false>(w, rows, depth, x, out, add);
    }
}

#endif

} // namespace dg::DG_LEVEL
