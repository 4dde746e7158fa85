// Products of quantized weights in integers, where the processor multiplies them faster than floats. Weights keep the
// quants that they have in the file; of activations each 32 values of a column share a scale, as in Q8_0.
// Everything else is as in tile.h: column blocks, and sums in a fixed order.
//
// Four products of bytes are one instruction (AVX-512 VNNI, AVX-VNNI, ARM's dot products), or eight (ARM's matrices of
// bytes), or pairs of them are summed in 16 bits (SSSE3, AVX2), where the quants of 4 to 6 bits leave room for the sums
// of several. Those of 8 bits leave none: there both factors are words, of which one instruction multiplies and sums
// pairs, and activations are rounded to 16 bits instead of 8, with a scale for 512 values.
#pragma once

#include "cpu/kernels/bfloats.h"
#include "cpu/kernels/tile.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>

#if DG_HAS_TILES
#    define DG_HAS_INTEGERS 0 // tiles of bfloat16 are faster, and closer
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#    define DG_HAS_INTEGERS 1
#    define DG_INT8_VNNI 1
#elif defined(__SSSE3__)
#    define DG_HAS_INTEGERS 1
#    define DG_INT8_PAIRS 1
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#    define DG_HAS_INTEGERS 1
#    define DG_INT8_MATRICES 1
#elif defined(__ARM_FEATURE_DOTPROD)
#    define DG_HAS_INTEGERS 1
#    define DG_INT8_DOTS 1
#else
#    define DG_HAS_INTEGERS 0
#endif

namespace dg::DG_LEVEL {

#if DG_HAS_INTEGERS

// What the quants of Q8_0 are multiplied by; those of fewer bits: BYTES.
#    if defined(DG_INT8_PAIRS)
constexpr Form Q8_FORM = Form::WORDS;
#    else
constexpr Form Q8_FORM = Form::BYTES;
#    endif

// Values of a column that are side by side.
#    if defined(DG_INT8_MATRICES)
constexpr int ADJACENT_VALUES = 8;
#    else
constexpr int ADJACENT_VALUES = 4;
#    endif

// GROUP values of each column of a block.
struct GroupColumns {
    static constexpr int64_t RUN = 1; // groups that share a scale

    int8_t quants[GROUP / ADJACENT_VALUES][COLUMNS][ADJACENT_VALUES];
    float scale[COLUMNS];    // NaN where a value is NaN or infinite
    int32_t sum[2][COLUMNS]; // of the quants of each half
};

// The same as words. What meets a piece of a row (product.cpp) shares a scale: an outlier takes digits from the other
// 511, but a sum that it is part of is as exact as before.
struct GroupWords {
    static constexpr int64_t RUN = 16;

    int16_t quants[GROUP / 2][COLUMNS][2];
    float scale[COLUMNS];
};

// Floats of memory that GROUP values of a block's columns take.
int64_t group_floats(Form form);

// [depth, COLUMNS] floats, depth a multiple of GROUP -> depth / GROUP groups of the form
void quantize_columns(const float *block, int64_t depth, Form form, float *out);

// Weights of a few rows, as integers.
struct IntRows {
    static constexpr int64_t DEPTH = 1024;             // bytes of a row at a time, or half as many words
    static constexpr int64_t ROW = DEPTH + 64;         // bytes between rows
    static constexpr int64_t SCALES = DEPTH / 16 + 16; // floats between rows

    uint8_t *quants; // [rows, ROW]
    float *scales;   // [rows, SCALES]: one for each `step` values
    float *minima;   // [rows, SCALES]: what each GROUP values are lowered by; only where the type has them

    static constexpr int64_t floats(int64_t rows) { return rows * (ROW / 4 + 2 * SCALES); }
    IntRows(float *memory, int64_t rows)
        : quants(reinterpret_cast<uint8_t *>(memory)), scales(memory + rows * (ROW / 4)),
          minima(scales + rows * SCALES) {}
};

// n values (at most DEPTH bytes) of a row that begins at `data` -> row `row` of `rows`.
void unpack_row(ggml_type type, const void *data, int64_t n, const IntRows &rows, int64_t row);

// out [n_rows, COLUMNS] = rows times a block of columns (or is added to), over `depth` values. `x`: groups of the form
// that the type wants. `narrow`: only the first LANES columns count.
void multiply_integers(ggml_type type, const IntRows &rows, int64_t n_rows, int64_t depth, const float *x, float *out,
                       bool narrow, bool add);

#endif

} // namespace dg::DG_LEVEL
