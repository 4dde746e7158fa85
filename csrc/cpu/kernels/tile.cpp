#include "cpu/kernels/tile.h"

namespace dg::DG_LEVEL {
namespace {

typedef float Four __attribute__((vector_size(4 * sizeof(float))));
typedef int32_t IntFour __attribute__((vector_size(4 * sizeof(int32_t))));

// Lanes of two vectors, by number: those of b are 4 to 7. GCC has Clang's builtin from version 12 on only.
template <int A, int B, int C, int D> Four shuffle(Four a, Four b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, A, B, C, D);
#else
    return __builtin_shuffle(a, b, IntFour{A, B, C, D});
#endif
}

// Four vectors of four, mirrored at the diagonal.
void transpose_four(Four (&v)[4]) {
    const Four a = shuffle<0, 4, 1, 5>(v[0], v[1]);
    const Four b = shuffle<2, 6, 3, 7>(v[0], v[1]);
    const Four c = shuffle<0, 4, 1, 5>(v[2], v[3]);
    const Four d = shuffle<2, 6, 3, 7>(v[2], v[3]);
    v[0] = shuffle<0, 1, 4, 5>(a, c);
    v[1] = shuffle<2, 3, 6, 7>(a, c);
    v[2] = shuffle<0, 1, 4, 5>(b, d);
    v[3] = shuffle<2, 3, 6, 7>(b, d);
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

} // namespace dg::DG_LEVEL
