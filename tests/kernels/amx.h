// AMX's instructions that the kernels use, written out: what is left of them can then run on any AVX512-BF16. Tiles are
// those of the thread, of 16 rows of 64 bytes, as the kernels configure them.
#pragma once

#include <immintrin.h>

#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_configure
#define _tile_release amx_release
#define _tile_zero(tile) std::memset(amx_tiles[tile], 0, sizeof amx_tiles[tile])
#define _tile_loadd(tile, base, stride) amx_copy(amx_tiles[tile], 64, base, stride)
#define _tile_stored(tile, base, stride) amx_copy(base, stride, amx_tiles[tile], 64)
#define _tile_dpbf16ps amx_multiply

static thread_local unsigned char amx_tiles[8][16][64];
static thread_local bool amx_configured = false;

static inline void amx_configure(const void *config) {
    unsigned char bytes[64];
    std::memcpy(bytes, config, sizeof bytes);
    amx_configured = bytes[0] == 1; // the palette
    for (int tile = 0; tile < 8; ++tile) {
        unsigned short width;
        std::memcpy(&width, bytes + 16 + 2 * tile, sizeof width);
        amx_configured = amx_configured && width == 64 && bytes[48 + tile] == 16;
    }
    std::memset(amx_tiles, 0, sizeof amx_tiles);
}

static inline void amx_release() { amx_configured = false; }

static inline void amx_copy(void *to, long to_stride, const void *from, long from_stride) {
    if (!amx_configured) {
        __builtin_trap(); // the processor would raise an exception as well
    }
    for (int row = 0; row < 16; ++row) {
        std::memcpy(static_cast<char *>(to) + row * to_stride, static_cast<const char *>(from) + row * from_stride, 64);
    }
}

static inline float amx_float(const unsigned char *bfloat) {
    const unsigned bits = static_cast<unsigned>(bfloat[0]) << 16 | static_cast<unsigned>(bfloat[1]) << 24;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2D, TDPBF16PS.
static inline void amx_multiply(int sums, int a, int b) {
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            float sum;
            std::memcpy(&sum, amx_tiles[sums][m] + 4 * n, sizeof sum);
            for (int k = 0; k < 16; ++k) {
                for (int i = 0; i < 4; i += 2) {
                    sum += amx_float(amx_tiles[a][m] + 4 * k + i) * amx_float(amx_tiles[b][k] + 4 * n + i);
                }
            }
            std::memcpy(amx_tiles[sums][m] + 4 * n, &sum, sizeof sum);
        }
    }
}
