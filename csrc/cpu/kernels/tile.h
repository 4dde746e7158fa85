// The inner loop of every matrix product here: a few rows of weights times a block of columns, in float32.
//
// Activations stand in column blocks: COLUMNS columns side by side, so that a row of a block is two vectors and a
// weight is broadcast to them. Block b of a matrix [depth, n] begins at b * depth * COLUMNS; its element (k, j) stands
// at k * COLUMNS + j. Each sum runs over k in order, whatever the number of rows, columns and threads: an output has
// the same bits alone and among others.
#pragma once

#include "base/exponential.h"
#include "cpu/kernels.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

// Vectors are a language extension of Clang and GCC (from 9 on with conversions); with other compilers there are no
// kernels, and ggml's own operators do the work.

namespace dg::DG_LEVEL {

// Rows times vectors are what the registers hold besides two vectors of x and a broadcast weight.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
constexpr int TILE_ROWS = 12;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
constexpr int TILE_ROWS = 6;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4;
constexpr int TILE_ROWS = 12;
#else
constexpr int64_t LANES = 4;
constexpr int TILE_ROWS = 6;
#endif
constexpr int64_t COLUMNS = 2 * LANES;

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(LANES * sizeof(int32_t))));

inline int64_t column_blocks(int64_t n) { return (n + COLUMNS - 1) / COLUMNS; }

inline Lanes load(const float *from) {
    Lanes v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float *to, Lanes v) { std::memcpy(to, &v, sizeof v); }

// Rows of numbers to multiply with: element (r, k) is at[r * row + k * step].
struct Rows {
    const float *at;
    int64_t row;
    int64_t step;
};

template <int R, int V, bool ADJACENT>
void multiply_tile(const Rows &w, int64_t depth, const float *x, float *out, int64_t out_row, bool add) {
    const int64_t step = ADJACENT ? 1 : w.step;
    const int64_t row = ADJACENT ? w.row : 1;
    Lanes sums[R][V] = {};
    const float *at = w.at;
    for (int64_t k = 0; k < depth; ++k, at += step, x += COLUMNS) {
        Lanes columns[V];
        for (int v = 0; v < V; ++v) {
            columns[v] = load(x + v * LANES);
        }
        for (int r = 0; r < R; ++r) {
            const float weight = at[r * row];
            for (int v = 0; v < V; ++v) {
                sums[r][v] += weight * columns[v];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            float *to = out + r * out_row + v * LANES;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
    }
}

// out [rows, COLUMNS] = w [rows, depth] times one block of columns (or is added to). `narrow`: only the first LANES
// columns count. Adjacent: w.step is 1; else w.row is.
template <bool ADJACENT>
void multiply_block(Rows w, int64_t rows, int64_t depth, const float *x, float *out, int64_t out_row, bool narrow,
                    bool add) {
    const auto some = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; rows >= R; rows -= R) {
            if (narrow) {
                multiply_tile<R, 1, ADJACENT>(w, depth, x, out, out_row, add);
            } else {
                multiply_tile<R, 2, ADJACENT>(w, depth, x, out, out_row, add);
            }
            w.at += R * w.row;
            out += R * out_row;
        }
    };
    some(std::integral_constant<int, TILE_ROWS>());
    some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
}

// block[k * COLUMNS + j] = columns[j][k] for j < n <= COLUMNS; the other columns become 0.
void pack_columns(const float *const *columns, int64_t n, int64_t depth, float *block);
// The way back: columns[j][k] = block[k * COLUMNS + j].
void unpack_columns(const float *block, int64_t depth, int64_t n, float *const *columns);

// What exp_lanes may be asked for; NaN stays NaN, which a maximum would lose.
inline Lanes not_below_floor(Lanes x) { return x < EXP_FLOOR ? Lanes{} + EXP_FLOOR : x; }

// exp(x) for EXP_FLOOR <= x <= 0, a vector at a time: exp_negative's numbers, whose step from k to 2^k has no form that
// serves floats and vectors. NaN gives NaN.
inline Lanes exp_lanes(Lanes x) {
    const auto [k, p] = exp_parts(x);
    const IntLanes bits = (__builtin_convertvector(k, IntLanes) + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

} // namespace dg::DG_LEVEL
