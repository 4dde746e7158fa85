// Products in bfloat16, with sums in float32, where the processor multiplies pairs of them (AVX512-BF16: twice as many
// a cycle as of float32) or tiles of them (AMX: 16 times as many, more than of bytes without it). Weights that the file
// has in bfloat16 stay as they are; activations are rounded to it, which needs no scales. Everything else is as in
// tile.h: column blocks, and sums in a fixed order.
#pragma once

#include "cpu/kernels/tile.h"

#include <cstdint>

#if defined(__AVX512BF16__)
#    define DG_HAS_BFLOATS 1
#else
#    define DG_HAS_BFLOATS 0
#endif
#if defined(__AMX_BF16__)
#    define DG_HAS_TILES 1
#else
#    define DG_HAS_TILES 0
#endif

namespace dg::DG_LEVEL {

#if DG_HAS_BFLOATS

// Two adjacent values of a column, the first in the low half. A block of columns is [depth / 2, COLUMNS] of them, a
// row of weights [depth / 2]: what one instruction multiplies, here and in AMX's tiles.
typedef uint32_t BfloatPair;

// out[i] = {first[i], second[i]}, n a multiple of LANES; `second` null: zeros.
void round_two(const float *first, const float *second, int64_t n, BfloatPair *out);

// [depth, COLUMNS] floats -> pairs; an odd last value has a zero beside it.
void round_columns(const float *block, int64_t depth, BfloatPair *out);

// n floats, n a multiple of 2 * LANES -> n / 2 pairs
void round_row(const float *from, int64_t n, BfloatPair *out);

// While one of these lives, the thread's tiles are configured; needed around multiply_bfloats. Not for longer: a system
// saves tiles that are in use whenever it switches threads.
class Tiles {
  public:
    Tiles();
    ~Tiles();
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
};

// out [rows, COLUMNS] = w times one block of columns (or is added to). Pair i of row r is at[r * row + i * step].
// `narrow`: only the first LANES columns count. Where there are tiles and step is 1, depth is a multiple of 32, and the
// rows up to the next multiple of 16 may be read.
struct BfloatRows {
    const BfloatPair *at;
    int64_t row;
    int64_t step;
};
void multiply_bfloats(const BfloatRows &w, int64_t rows, int64_t depth, const BfloatPair *x, float *out, bool narrow,
                      bool add);

#endif

} // namespace dg::DG_LEVEL
