#include "cpu/kernels/bfloats.h"

#include <algorithm>

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

#    if DG_HAS_TILES

constexpr int64_t TILE = 16; // rows, pairs and columns of a tile

// What has been written is in memory from here on: GCC takes loads of tiles and of their configuration for code that
// reads nothing, and could put stores behind them.
void settle_memory() { __asm__ volatile("" : : : "memory"); }

// TWO_ROWS, TWO_COLUMNS: 32 instead of 16. Sums are tiles 0 to 3, weights 4 and 5, columns 6 and 7.
template <bool TWO_ROWS, bool TWO_COLUMNS>
void multiply_four_tiles(const BfloatRows &w, int64_t depth, const BfloatPair *x, float *out, bool add) {
    constexpr auto BYTES = static_cast<int64_t>(sizeof(float)); // of a sum, and of a pair
    constexpr int64_t OUT_ROW = COLUMNS * BYTES;
    float *const below = out + TILE * COLUMNS;
    settle_memory();
    if (add) {
        _tile_loadd(0, out, OUT_ROW);
        if (TWO_COLUMNS) {
            _tile_loadd(1, out + TILE, OUT_ROW);
        }
        if (TWO_ROWS) {
            _tile_loadd(2, below, OUT_ROW);
        }
        if (TWO_ROWS && TWO_COLUMNS) {
            _tile_loadd(3, below + TILE, OUT_ROW);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t pair = 0; pair < depth / 2; pair += TILE) {
        _tile_loadd(4, w.at + pair, w.row * BYTES);
        _tile_loadd(6, x + pair * COLUMNS, COLUMNS * BYTES);
        _tile_dpbf16ps(0, 4, 6);
        if (TWO_COLUMNS) {
            _tile_loadd(7, x + pair * COLUMNS + TILE, COLUMNS * BYTES);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (TWO_ROWS) {
            _tile_loadd(5, w.at + TILE * w.row + pair, w.row * BYTES);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (TWO_ROWS && TWO_COLUMNS) {
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, OUT_ROW);
    if (TWO_COLUMNS) {
        _tile_stored(1, out + TILE, OUT_ROW);
    }
    if (TWO_ROWS) {
        _tile_stored(2, below, OUT_ROW);
    }
    if (TWO_ROWS && TWO_COLUMNS) {
        _tile_stored(3, below + TILE, OUT_ROW);
    }
}

void multiply_tiles(BfloatRows w, int64_t rows, int64_t depth, const BfloatPair *x, float *out, bool narrow, bool add) {
    for (; rows >= 2 * TILE; rows -= 2 * TILE, w.at += 2 * TILE * w.row, out += 2 * TILE * COLUMNS) {
        narrow ? multiply_four_tiles<true, false>(w, depth, x, out, add)
               : multiply_four_tiles<true, true>(w, depth, x, out, add);
    }
    for (; rows > 0; rows -= TILE, w.at += TILE * w.row, out += TILE * COLUMNS) {
        float some[TILE * COLUMNS]; // where a tile would reach beyond the last row
        float *to = rows < TILE ? some : out;
        const auto bytes = static_cast<size_t>(std::min(rows, TILE) * COLUMNS) * sizeof(float);
        if (to != out && add) {
            std::memcpy(to, out, bytes);
        }
        narrow ? multiply_four_tiles<false, false>(w, depth, x, to, add)
               : multiply_four_tiles<false, true>(w, depth, x, to, add);
        if (to != out) {
            std::memcpy(out, to, bytes);
        }
    }
}

#    endif

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

void round_row(const float *from, int64_t n, BfloatPair *out) {
    for (int64_t i = 0; i < n; i += 2 * LANES, out += LANES) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(from + i + LANES)),
                                                   reinterpret_cast<__m512>(load(from + i)));
        std::memcpy(out, &pairs, sizeof pairs);
    }
}

#    if DG_HAS_TILES

Tiles::Tiles() {
    // Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, 18.3.2: the palette, the bytes of each
    // tile's rows, how many rows it has.
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = 16;
    }
    settle_memory();
    _tile_loadconfig(config);
}

Tiles::~Tiles() { _tile_release(); }

#    else

Tiles::Tiles() {}
Tiles::~Tiles() {}

#    endif

void multiply_bfloats(const BfloatRows &w, int64_t rows, int64_t depth, const BfloatPair *x, float *out, bool narrow,
                      bool add) {
#    if DG_HAS_TILES
    if (w.step == 1) {
        multiply_tiles(w, rows, depth, x, out, narrow, add);
        return;
    }
#    endif
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
