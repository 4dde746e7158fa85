#include "cpu/tile.h"

#if DG_HAS_TILES
namespace dg {
namespace {

typedef float Four __attribute__((vector_size(4 * sizeof(float))));

// Four vectors of four, mirrored at the diagonal.
void transpose_four(Four (&v)[4]) {
    const Four a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
    const Four b = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    const Four c = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
    const Four d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    v[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    v[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    v[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    v[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

} // namespace

void pack_columns(const float *const *columns, int64_t n, int64_t depth, float *block) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        int64_t k = 0;
        for (; k + 4 <= depth; k += 4) {
            Four v[4];
            for (int i = 0; i < 4; ++i) {
                std::memcpy(&v[i], columns[j + i] + k, sizeof v[i]);
            }
            transpose_four(v);
            for (int i = 0; i < 4; ++i) {
                std::memcpy(block + (k + i) * COLUMNS + j, &v[i], sizeof v[i]);
            }
        }
        for (; k < depth; ++k) {
            for (int i = 0; i < 4; ++i) {
                block[k * COLUMNS + j + i] = columns[j + i][k];
            }
        }
    }
    for (; j < COLUMNS; ++j) {
        for (int64_t k = 0; k < depth; ++k) {
            block[k * COLUMNS + j] = j < n ? columns[j][k] : 0.0f;
        }
    }
}

void unpack_columns(const float *block, int64_t depth, int64_t n, float *const *columns) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        int64_t k = 0;
        for (; k + 4 <= depth; k += 4) {
            Four v[4];
            for (int i = 0; i < 4; ++i) {
                std::memcpy(&v[i], block + (k + i) * COLUMNS + j, sizeof v[i]);
            }
            transpose_four(v);
            for (int i = 0; i < 4; ++i) {
                std::memcpy(columns[j + i] + k, &v[i], sizeof v[i]);
            }
        }
        for (; k < depth; ++k) {
            for (int i = 0; i < 4; ++i) {
                columns[j + i][k] = block[k * COLUMNS + j + i];
            }
        }
    }
    for (; j < n; ++j) {
        for (int64_t k = 0; k < depth; ++k) {
            columns[j][k] = block[k * COLUMNS + j];
        }
    }
}

} // namespace dg
#endif
