#include "cpu/kernels/integers.h"

#include "cpu/kernels/quantized_rows.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#if defined(DG_INT8_VNNI) || defined(DG_INT8_PAIRS)
#    include <immintrin.h>
#elif DG_HAS_INTEGERS
#    include <arm_neon.h>
#endif

namespace dg::DG_LEVEL {

#if DG_HAS_INTEGERS

namespace {

// What a type's quants are, as unpack_quants leaves them.
struct Layout {
    int32_t zero; // the integer that stands for 0
    bool halves;  // 16 values share a scale, not 32
    bool minimum; // minima are subtracted
    int fits;     // sums of four products of which 16 bits hold so many, two and two: 32767 / (2 * 127 * greatest)
};

template <ggml_type TYPE> constexpr Layout layout() {
    switch (TYPE) {
        case GGML_TYPE_Q8_0: return {Q8_ZERO, false, false, 1};
        case GGML_TYPE_Q4_0: return {8, false, false, 8};
        case GGML_TYPE_Q5_0: return {16, false, false, 4};
        case GGML_TYPE_Q6_K: return {32, true, false, 2};
        case GGML_TYPE_Q5_K: return {0, false, true, 4};
        default: return {0, false, true, 8}; // Q4_K
    }
}

// Rows and vectors of columns of a tile, and rows that go through a group together: what the registers hold.
#    if defined(__AVX512F__)
constexpr int MOST_TILE_ROWS = 8;
constexpr int TILE_VECTORS = 2;
constexpr int TOGETHER = 4;
#    elif defined(__aarch64__)
constexpr int MOST_TILE_ROWS = 8;
constexpr int TILE_VECTORS = 2;
constexpr int TOGETHER = 2;
#    elif defined(__AVX2__)
constexpr int MOST_TILE_ROWS = 4;
constexpr int TILE_VECTORS = 2;
constexpr int TOGETHER = 4;
#    else
constexpr int MOST_TILE_ROWS = 3;
constexpr int TILE_VECTORS = 2;
constexpr int TOGETHER = 3;
#    endif

IntLanes load_int(const void *from) {
    IntLanes v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

Lanes to_float(IntLanes x) { return __builtin_convertvector(x, Lanes); }

// The sums of R rows' products with V vectors of columns, over a group's values [first, last), added to `dots`.
// `quants`: of the first row and of the group; `x`: the group's columns, from the first vector's on.
#    if defined(DG_INT8_VNNI) || defined(DG_INT8_DOTS)

IntLanes dot(IntLanes sum, IntLanes weights, IntLanes columns) {
#        if defined(DG_INT8_DOTS)
    return reinterpret_cast<IntLanes>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(weights),
                                                reinterpret_cast<int8x16_t>(columns)));
#        elif defined(__AVX512F__)
    return reinterpret_cast<IntLanes>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(columns)));
#        else
    return reinterpret_cast<IntLanes>(_mm256_dpbusd_avx_epi32(
        reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(columns)));
#        endif
}

template <ggml_type, int R, int V>
void add_dots(IntLanes (&dots)[R][V], const uint8_t *quants, const GroupColumns &x, int64_t column, int first,
              int last) {
    for (int four = first / 4; four < last / 4; ++four) {
        IntLanes columns[V];
        for (int v = 0; v < V; ++v) {
            columns[v] = load_int(x.quants[four][column + v * LANES]);
        }
        for (int r = 0; r < R; ++r) {
            int32_t weights;
            std::memcpy(&weights, quants + r * IntRows::ROW + four * 4, sizeof weights);
            for (int v = 0; v < V; ++v) {
                dots[r][v] = dot(dots[r][v], IntLanes{} + weights, columns[v]);
            }
        }
    }
}

#    elif defined(DG_INT8_PAIRS)

#        if defined(__AVX2__)
typedef __m256i Bytes;
Bytes products(Bytes a, Bytes b) { return _mm256_maddubs_epi16(a, b); }
Bytes add_pairs(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
Bytes word_products(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
Bytes sum_pairs(Bytes a) { return word_products(a, _mm256_set1_epi16(1)); }
#        else
typedef __m128i Bytes;
Bytes products(Bytes a, Bytes b) { return _mm_maddubs_epi16(a, b); }
Bytes add_pairs(Bytes a, Bytes b) { return _mm_add_epi16(a, b); }
Bytes word_products(Bytes a, Bytes b) { return _mm_madd_epi16(a, b); }
Bytes sum_pairs(Bytes a) { return word_products(a, _mm_set1_epi16(1)); }
#        endif

// Keeps the compiler from summing in another order than is written: it would load all of a group's columns first, sum
// products as a tree, and run out of registers (60 of 130 instructions moved something to or from the stack).
template <typename V> void settle(V &x) { __asm__("" : "+x"(x)); }

template <ggml_type TYPE, int R, int V>
void add_dots(IntLanes (&dots)[R][V], const uint8_t *quants, const GroupColumns &x, int64_t column, int first,
              int last) {
    constexpr int FITS = layout<TYPE>().fits;
    for (int four = first / 4; four < last / 4; four += FITS) {
        Bytes pairs[R][V];
        for (int i = 0; i < FITS; ++i) {
            Bytes columns[V];
            for (int v = 0; v < V; ++v) {
                columns[v] = reinterpret_cast<Bytes>(load_int(x.quants[four + i][column + v * LANES]));
                settle(columns[v]);
            }
            for (int r = 0; r < R; ++r) {
                int32_t four_weights;
                std::memcpy(&four_weights, quants + r * IntRows::ROW + (four + i) * 4, sizeof four_weights);
                const auto weights = reinterpret_cast<Bytes>(IntLanes{} + four_weights);
                for (int v = 0; v < V; ++v) {
                    const Bytes both = products(weights, columns[v]);
                    pairs[r][v] = i == 0 ? both : add_pairs(pairs[r][v], both);
                    settle(pairs[r][v]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                dots[r][v] += reinterpret_cast<IntLanes>(sum_pairs(pairs[r][v]));
            }
        }
    }
}

// The products of a pair of words, or added to `dots`. Inlined before anything else is: what GCC inlines later keeps
// its arrays in memory.
template <bool BEGINS, int R, int V>
__attribute__((always_inline)) inline void add_pair(IntLanes (&dots)[R][V], const uint8_t *quants,
                                                    const int16_t (*x)[2]) {
    Bytes columns[V];
    for (int v = 0; v < V; ++v) {
        columns[v] = reinterpret_cast<Bytes>(load_int(x + v * LANES));
        settle(columns[v]);
    }
    for (int r = 0; r < R; ++r) {
        int32_t two_weights;
        std::memcpy(&two_weights, quants + r * IntRows::ROW, sizeof two_weights);
        const auto weights = reinterpret_cast<Bytes>(IntLanes{} + two_weights);
        for (int v = 0; v < V; ++v) {
            const auto both = reinterpret_cast<IntLanes>(word_products(weights, columns[v]));
            dots[r][v] = BEGINS ? both : dots[r][v] + both;
            settle(dots[r][v]);
        }
    }
}

template <bool BEGINS, int R, int V>
__attribute__((always_inline)) inline void add_four_pairs(IntLanes (&dots)[R][V], const uint8_t *quants,
                                                          const int16_t (*x)[2]) {
    constexpr int PAIR = 2 * sizeof(int16_t);
    add_pair<BEGINS>(dots, quants, x);
    add_pair<false>(dots, quants + PAIR, x + COLUMNS);
    add_pair<false>(dots, quants + 2 * PAIR, x + 2 * COLUMNS);
    add_pair<false>(dots, quants + 3 * PAIR, x + 3 * COLUMNS);
}

// The sums of R rows' products with V vectors of columns, over a group of words. As a loop: with sixteen pairs in a row
// GCC computes an address for each of them and runs out of registers.
template <int R, int V>
__attribute__((always_inline)) inline void word_dots(IntLanes (&dots)[R][V], const uint8_t *quants,
                                                     const int16_t (*x)[2]) {
    add_four_pairs<true>(dots, quants, x);
#        pragma GCC unroll 1
    for (int pair = 4; pair < GROUP / 2; pair += 4) {
        quants += 4 * 2 * sizeof(int16_t);
        x += 4 * COLUMNS;
        __asm__("" : "+r"(x), "+r"(quants));
        add_four_pairs<false>(dots, quants, x);
    }
}

#    else // matrices: two rows of eight values times two columns of eight values

template <ggml_type, int R, int V>
void add_dots(IntLanes (&dots)[R][V], const uint8_t *quants, const GroupColumns &x, int64_t column, int first,
              int last) {
    for (int r = 0; r < R; r += 2) {
        const int second = r + 1 < R ? r + 1 : r;
        int32x4_t sums[V][2] = {}; // row r with columns 0 and 1, row r + 1 with them; the same of columns 2 and 3
        for (int eight = first / 8; eight < last / 8; ++eight) {
            const auto *at = reinterpret_cast<const int8_t *>(quants) + eight * 8;
            const int8x16_t weights = vcombine_s8(vld1_s8(at + r * IntRows::ROW), vld1_s8(at + second * IntRows::ROW));
            for (int v = 0; v < V; ++v) {
                for (int half = 0; half < 2; ++half) {
                    sums[v][half] =
                        vmmlaq_s32(sums[v][half], weights, vld1q_s8(x.quants[eight][column + v * LANES + half * 2]));
                }
            }
        }
        for (int v = 0; v < V; ++v) {
            const int64x2_t left = vreinterpretq_s64_s32(sums[v][0]);
            const int64x2_t right = vreinterpretq_s64_s32(sums[v][1]);
            dots[r][v] += reinterpret_cast<IntLanes>(vzip1q_s64(left, right));
            if (second > r) {
                dots[second][v] += reinterpret_cast<IntLanes>(vzip2q_s64(left, right));
            }
        }
    }
}

#    endif

// The columns' groups that a type's quants are multiplied with, and the bytes that its quants take.
template <ggml_type TYPE>
using Group = std::conditional_t<TYPE == GGML_TYPE_Q8_0 && Q8_FORM == Form::WORDS, GroupWords, GroupColumns>;

// R rows and V vectors of columns, the first at `column`.
template <ggml_type TYPE, int R, int V>
void multiply_tile_integers(const IntRows &rows, int64_t first, int64_t depth, const GroupColumns *x, int64_t column,
                            float *out, bool add) {
    constexpr Layout L = layout<TYPE>();
    constexpr int SOME = R % TOGETHER == 0 ? TOGETHER : 1;
    constexpr int PARTS = L.halves ? 2 : 1; // of a group, each with a scale of its own
    constexpr int PART = static_cast<int>(GROUP) / PARTS;
    Lanes sums[R][V] = {};
    const uint8_t *quants = rows.quants + first * IntRows::ROW;
    const float *scales = rows.scales + first * IntRows::SCALES;
    const float *minima = rows.minima + first * IntRows::SCALES;
    for (int64_t g = 0; g < depth / GROUP; ++g, ++x) {
        Lanes scale[V];
        Lanes low[V];             // what a minimum of 1 takes away
        IntLanes start[PARTS][V]; // what the integers' distance from the quants comes to
        for (int v = 0; v < V; ++v) {
            scale[v] = load(x->scale + column + v * LANES);
            const IntLanes sum[2] = {load_int(x->sum[0] + column + v * LANES),
                                     load_int(x->sum[1] + column + v * LANES)};
            if (L.minimum) {
                low[v] = scale[v] * to_float(sum[0] + sum[1]);
            }
            for (int part = 0; part < PARTS; ++part) {
                start[part][v] = L.zero == 0 ? IntLanes{} : (PARTS == 2 ? sum[part] : sum[0] + sum[1]) * -L.zero;
            }
        }
        for (int r = 0; r < R; r += SOME) {
            for (int part = 0; part < PARTS; ++part) {
                IntLanes dots[SOME][V];
                for (int i = 0; i < SOME; ++i) {
                    for (int v = 0; v < V; ++v) {
                        dots[i][v] = start[part][v];
                    }
                }
                add_dots<TYPE>(dots, quants + r * IntRows::ROW + g * GROUP, *x, column, part * PART, (part + 1) * PART);
                for (int i = 0; i < SOME; ++i) {
                    const float factor = scales[(r + i) * IntRows::SCALES + g * PARTS + part];
                    for (int v = 0; v < V; ++v) {
                        sums[r + i][v] += to_float(dots[i][v]) * (factor * scale[v]);
                    }
                }
            }
            for (int i = 0; L.minimum && i < SOME; ++i) {
                const float minimum = minima[(r + i) * IntRows::SCALES + g];
                for (int v = 0; v < V; ++v) {
                    sums[r + i][v] -= minimum * low[v];
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            float *to = out + r * COLUMNS + column + v * LANES;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
    }
}

#    if defined(DG_INT8_PAIRS)

// The same of words. All their groups share the columns' scales, so a group costs a multiplication less.
template <ggml_type, int R, int V>
void multiply_tile_integers(const IntRows &rows, int64_t first, int64_t depth, const GroupWords *x, int64_t column,
                            float *out, bool add) {
    const uint8_t *quants = rows.quants + first * IntRows::ROW;
    const float *scales = rows.scales + first * IntRows::SCALES;
    const float *scale = x->scale + column;
    Lanes sums[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            sums[r][v] = Lanes{};
        }
    }
    for (const GroupWords *end = x + depth / GROUP; x < end; ++x, ++scales) {
        IntLanes dots[R][V];
        word_dots(dots, quants, x->quants[0] + column);
        quants += GROUP * sizeof(int16_t);
        for (int r = 0; r < R; ++r) {
            const float factor = scales[r * IntRows::SCALES];
            for (int v = 0; v < V; ++v) {
                sums[r][v] += to_float(dots[r][v]) * factor;
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) {
            float *to = out + r * COLUMNS + column + v * LANES;
            Lanes sum = sums[r][v] * load(scale + v * LANES);
            settle(sum); // else some tiles would round it before it is added and others not: bits by number of threads
            store(to, add ? load(to) + sum : sum);
        }
    }
}

#    endif

template <ggml_type TYPE, int V>
void multiply_rows_integers(const IntRows &rows, int64_t n_rows, int64_t depth, const Group<TYPE> *x, int64_t column,
                            float *out, bool add) {
    int64_t r = 0;
    const auto some = [&](auto count) {
        constexpr int R = decltype(count)::value;
        for (; r + R <= n_rows; r += R) {
            multiply_tile_integers<TYPE, R, V>(rows, r, depth, x, column, out + r * COLUMNS, add);
        }
    };
    if constexpr (V == 1 && std::is_same_v<Group<TYPE>, GroupWords>) { // a vector less a row leaves registers for them
        some(std::integral_constant<int, 2 * MOST_TILE_ROWS>());
    }
    some(std::integral_constant<int, MOST_TILE_ROWS>());
    some(std::integral_constant<int, TOGETHER>());
    some(std::integral_constant<int, 1>());
}

// The integer nearest to x, |x| < 2^22: a float of 1.5 * 2^23 has it in its last bits.
IntLanes nearest(Lanes x) {
    const Lanes shifted = x + 12582912.0f;
    IntLanes bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4b400000;
}

// Four integers of each of LANES columns, the first of value i, and what groups add to that.
void store_integers(const IntLanes (&q)[4], int i, int64_t lane, GroupColumns &out) {
    const IntLanes bytes = (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | q[3] << 24;
    if (ADJACENT_VALUES == 4) {
        std::memcpy(out.quants[i / 4][lane], &bytes, sizeof bytes);
    } else {
        for (int64_t c = 0; c < LANES; ++c) {
            const int32_t word = bytes[c];
            std::memcpy(out.quants[i / 8][lane + c] + i % 8, &word, sizeof word);
        }
    }
}

void store_integers(const IntLanes (&q)[4], int i, int64_t lane, GroupWords &out) {
    for (int pair = 0; pair < 2; ++pair) {
        const IntLanes words = (q[2 * pair] & 0xffff) | q[2 * pair + 1] << 16;
        std::memcpy(out.quants[i / 2 + pair][lane], &words, sizeof words);
    }
}

// `MOST`: the greatest integer.
template <int MOST, typename G> void quantize_groups(const float *block, int64_t depth, G *out) {
    constexpr auto STEPS = static_cast<float>(MOST);
    constexpr int64_t VALUES = G::RUN * GROUP;
    for (int64_t k = 0; k < depth; k += VALUES, block += VALUES * COLUMNS, out += G::RUN) {
        const int64_t n = std::min(VALUES, depth - k);
        for (int half = 0; half < 2; ++half) {
            const int64_t lane = half * LANES;
            // As integers, magnitudes of floats have the same order, with NaN above infinity: neither is lost.
            IntLanes magnitude = {};
            for (int64_t i = 0; i < n; ++i) {
                const IntLanes bits = load_int(block + i * COLUMNS + lane) & INT32_MAX;
                magnitude = bits > magnitude ? bits : magnitude;
            }
            Lanes most;
            std::memcpy(&most, &magnitude, sizeof most);
            const Lanes scale = most * (1.0f / STEPS) + (most - most); // NaN, not infinity
            const Lanes inverse = scale > 0.0f ? STEPS / most : Lanes{};
            // Else zeros: what NaN, or a magnitude too small for its inverse, becomes as an integer overflows the sums.
            const IntLanes usable = (scale > 0.0f) & (inverse < 3e38f);
            const float *values = block + lane;
            for (G *group = out; group < out + n / GROUP; ++group, values += GROUP * COLUMNS) {
                IntLanes sum[2] = {};
                for (int i = 0; i < GROUP; i += 4) {
                    IntLanes q[4];
                    for (int j = 0; j < 4; ++j) {
                        q[j] = nearest(load(values + (i + j) * COLUMNS) * inverse) & usable;
                        sum[i / (GROUP / 2)] += q[j];
                    }
                    store_integers(q, i, lane, *group);
                }
                store(group->scale + lane, scale);
                if constexpr (std::is_same_v<G, GroupColumns>) {
                    for (int part = 0; part < 2; ++part) {
                        std::memcpy(group->sum[part] + lane, &sum[part], sizeof sum[part]);
                    }
                }
            }
        }
    }
}

} // namespace

int64_t group_floats(Form form) {
    return static_cast<int64_t>((form == Form::WORDS ? sizeof(GroupWords) : sizeof(GroupColumns)) / sizeof(float));
}

void quantize_columns(const float *block, int64_t depth, Form form, float *out) {
    if (form == Form::WORDS) {
        quantize_groups<32767>(block, depth, reinterpret_cast<GroupWords *>(out));
    } else {
        quantize_groups<127>(block, depth, reinterpret_cast<GroupColumns *>(out));
    }
}

void unpack_row(ggml_type type, const void *data, int64_t n, const IntRows &rows, int64_t row) {
    if (type == GGML_TYPE_Q8_0 && Q8_FORM == Form::WORDS) {
        unpack_words(data, n, reinterpret_cast<int16_t *>(rows.quants + row * IntRows::ROW),
                     rows.scales + row * IntRows::SCALES);
        return;
    }
    unpack_quants(type, data, n, rows.quants + row * IntRows::ROW, rows.scales + row * IntRows::SCALES,
                  rows.minima + row * IntRows::SCALES);
}

void multiply_integers(ggml_type type, const IntRows &rows, int64_t n_rows, int64_t depth, const float *x, float *out,
                       bool narrow, bool add) {
    const auto run = [&](auto tag) {
        constexpr ggml_type TYPE = decltype(tag)::value;
        const auto *groups = reinterpret_cast<const Group<TYPE> *>(x);
        if (TILE_VECTORS == 2 && !narrow) {
            multiply_rows_integers<TYPE, TILE_VECTORS>(rows, n_rows, depth, groups, 0, out, add);
            return;
        }
        for (int64_t column = 0; column < (narrow ? LANES : COLUMNS); column += LANES) {
            multiply_rows_integers<TYPE, 1>(rows, n_rows, depth, groups, column, out, add);
        }
    };
    switch (type) {
        case GGML_TYPE_Q8_0: run(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>()); return;
        case GGML_TYPE_Q4_0: run(std::integral_constant<ggml_type, GGML_TYPE_Q4_0>()); return;
        case GGML_TYPE_Q5_0: run(std::integral_constant<ggml_type, GGML_TYPE_Q5_0>()); return;
        case GGML_TYPE_Q5_K: run(std::integral_constant<ggml_type, GGML_TYPE_Q5_K>()); return;
        case GGML_TYPE_Q6_K: run(std::integral_constant<ggml_type, GGML_TYPE_Q6_K>()); return;
        default: run(std::integral_constant<ggml_type, GGML_TYPE_Q4_K>()); return;
    }
}

#endif

} // namespace dg::DG_LEVEL
