#include "cpu/kernels/bfloats.h"
#include "cpu/kernels/integers.h"
#include "cpu/kernels/quantized_rows.h"
#include "cpu/kernels/table.h"

#include <algorithm>
#include <cmath>

namespace dg::DG_LEVEL {

Form form_for(ggml_type type) {
    switch (type) {
        case GGML_TYPE_BF16: return DG_HAS_BFLOATS ? Form::BFLOATS : Form::FLOATS;
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K:
#if DG_HAS_TILES
            return Form::BFLOATS;
#elif DG_HAS_INTEGERS
            return type == GGML_TYPE_Q8_0 ? Q8_FORM : Form::BYTES;
#endif
        default: return Form::FLOATS;
    }
}

int64_t block_floats(int64_t depth, Form form) {
    switch (form) {
        case Form::FLOATS: return depth * COLUMNS;
        case Form::BFLOATS: return depth / 2 * COLUMNS;
        default:
#if DG_HAS_INTEGERS
            return depth / GROUP * group_floats(form);
#else
            return 0;
#endif
    }
}

namespace {

// Weights of a row that are decoded at a time; a multiple of every type's block. 48 rows of them stay in the second
// level's cache with the columns that they meet.
constexpr int64_t DEPTH = 512;
constexpr int64_t MOST_ROWS = 48;
// Rows of decoded weights lie so far apart that they do not fall into the same cache sets.
constexpr int64_t DECODED_ROW = DEPTH + 16;
// Columns that a tile of outputs holds; weights are decoded once for so many.
constexpr int64_t MOST_COLUMNS = 512;

// A thread's decoded weights, as floats or as something shorter; bytes are a row's worth of twice as many. And the
// values of columns that are packed before they are converted.
#if DG_HAS_INTEGERS
constexpr int64_t BYTES_AT_ONCE = IntRows::DEPTH;
constexpr int64_t DECODED = std::max(MOST_ROWS * DECODED_ROW, IntRows::floats(MOST_ROWS));
constexpr int64_t MOST_PACKED = Q8_FORM == Form::WORDS ? DEPTH : GROUP;
static_assert(GroupWords::RUN * GROUP == DEPTH, "what meets a piece of a row shares a scale");
#else
constexpr int64_t MOST_PACKED = GROUP;
constexpr int64_t BYTES_AT_ONCE = DEPTH;
constexpr int64_t DECODED = MOST_ROWS * DECODED_ROW;
#endif
constexpr int64_t TILE = MOST_ROWS * MOST_COLUMNS;

struct Scratch {
    float *decoded; // [MOST_ROWS, DECODED_ROW]
    float *tile;    // column blocks of MOST_ROWS rows
    float *x;       // an expert's columns
    float *hidden;  // what its gate and up make of them
};

Scratch scratch_of(ggml_tensor *scratch, int thread) {
    float *at = row_of(scratch, thread);
    return {at, at + DECODED, at + DECODED + TILE, nullptr};
}

// A matrix of weights, [depth, rows] in ggml's order.
struct Matrix {
    ggml_type type;
    const char *data;
    size_t row_bytes;
    int64_t depth;

    Matrix(const ggml_tensor *t, int64_t plane = 0, int64_t first_row = 0)
        : type(t->type), data(static_cast<const char *>(t->data) + static_cast<size_t>(plane) * t->nb[2] +
                              static_cast<size_t>(first_row) * t->nb[1]),
          row_bytes(t->nb[1]), depth(t->ne[0]) {}
};

struct Columns {
    const float *at; // block b at b * block_floats
    int64_t n;
    Form form;
};

// Values k .. k + depth - 1 of a row of w -> row r of the decoded rows, in the form that meets columns of `form`.
void decode_row(const Matrix &w, int64_t row, int64_t k, int64_t depth, Form form, float *decoded, int64_t r) {
    const char *at = w.data + static_cast<size_t>(row) * w.row_bytes + ggml_row_size(w.type, k);
    switch (form) {
        case Form::FLOATS: decode(w.type, at, depth, decoded + r * DECODED_ROW); return;
        case Form::BFLOATS:
#if DG_HAS_BFLOATS
            if (w.type != GGML_TYPE_BF16) {
                float floats[DEPTH];
                decode(w.type, at, depth, floats);
                round_row(floats, depth, reinterpret_cast<BfloatPair *>(decoded + r * DECODED_ROW));
                return;
            }
            std::memcpy(decoded + r * DECODED_ROW, at, static_cast<size_t>(depth) * sizeof(uint16_t));
#endif
            return;
        default:
#if DG_HAS_INTEGERS
            unpack_row(w.type, at, depth, IntRows(decoded, MOST_ROWS), r);
#endif
            return;
    }
}

// Asks for what will be decoded next in a row's place, the values from k on or, where there are none, those of the row
// `rows` further: pieces of rows are no pattern that the processor would load ahead of by itself. Experts of 16 rows
// wait for memory: 1.1 to 1.25 times as fast with it. What is beyond the last row is not loaded, or not used.
void prefetch_next(const Matrix &w, int64_t row, int64_t k, int64_t depth, int64_t rows) {
    const bool ended = k >= w.depth;
    const int64_t from = ended ? 0 : k;
    const char *at = w.data + static_cast<size_t>(ended ? row + rows : row) * w.row_bytes + ggml_row_size(w.type, from);
    const size_t bytes = ggml_row_size(w.type, std::min(depth, w.depth - from));
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(at + i, 0, 2);
    }
}

// `rows` decoded rows times a block of columns -> out, or added to it.
void multiply_decoded(ggml_type type, const float *decoded, int64_t rows, int64_t depth, Form form, const float *x,
                      float *out, bool narrow, bool add) {
    switch (form) {
        case Form::FLOATS:
            multiply_block<true>({decoded, DECODED_ROW, 1}, rows, depth, x, out, COLUMNS, narrow, add);
            return;
        case Form::BFLOATS:
#if DG_HAS_BFLOATS
            multiply_bfloats({reinterpret_cast<const BfloatPair *>(decoded), DECODED_ROW, 1}, rows, depth,
                             reinterpret_cast<const BfloatPair *>(x), out, narrow, add);
#endif
            return;
        default:
#if DG_HAS_INTEGERS
            multiply_integers(type, IntRows(const_cast<float *>(decoded), MOST_ROWS), rows, depth, x, out, narrow, add);
#else
            (void)type;
#endif
            return;
    }
}

// Rows first .. first + rows - 1 of w times the columns -> out: block b [rows, COLUMNS] at b * out_block. rows: at most
// MOST_ROWS. `add`: to what is there.
void multiply_rows(const Matrix &w, int64_t first, int64_t rows, const Columns &x, float *decoded, float *out,
                   int64_t out_block, bool add = false) {
    const int64_t x_block = block_floats(w.depth, x.form);
    const int64_t depth_at_once = x.form == Form::BYTES ? BYTES_AT_ONCE : DEPTH;
#if DG_HAS_BFLOATS
    const Tiles tiles;
#endif
    for (int64_t k = 0; k < w.depth; k += depth_at_once) {
        const int64_t depth = std::min(depth_at_once, w.depth - k);
        for (int64_t r = 0; r < rows; ++r) {
            decode_row(w, first + r, k, depth, x.form, decoded, r);
            prefetch_next(w, first + r, k + depth, depth_at_once, rows);
        }
        for (int64_t b = 0; b * COLUMNS < x.n; ++b) {
            multiply_decoded(w.type, decoded, rows, depth, x.form, x.at + b * x_block + block_floats(k, x.form),
                             out + b * out_block, x.n - b * COLUMNS <= LANES, add || k > 0);
        }
    }
}

// What a low-rank pair adds to rows of a product: B times the column blocks that A made. Nothing without a B.
struct LowRows {
    const ggml_tensor *b = nullptr;
    const float *t = nullptr;
    int64_t n = 0;         // columns
    int64_t plane = 0;     // the expert
    int64_t first_row = 0; // of B

    void add(int64_t first, int64_t rows, float *decoded, float *out, int64_t out_block) const {
        if (b) {
            multiply_rows(Matrix(b, plane, first_row), first, rows, {t, n, Form::FLOATS}, decoded, out, out_block,
                          true);
        }
    }
};

// `blocks`: t for all columns, of which `n` from `column` on count.
LowRows low_rows(const ggml_tensor *b, const ggml_tensor *blocks, int64_t column, int64_t n) {
    return b ? LowRows{b, row_of(blocks, column / COLUMNS), n, 0, 0} : LowRows{};
}

// scales * (A x) for one column block of `n` columns -> out [rank, COLUMNS]; rows first .. first + rows - 1.
void low_block(const Matrix &a, int64_t first, int64_t rows, const float *x, int64_t n, const float *scales,
               float *decoded, float *out) {
    multiply_rows(a, first, rows, {x, n, Form::FLOATS}, decoded, out + first * COLUMNS, 0);
    for (int64_t r = first; r < first + rows; ++r) {
        for (int64_t j = 0; j < COLUMNS; ++j) {
            out[r * COLUMNS + j] *= scales[r];
        }
    }
}

// Block b of what an expert's A makes of its columns.
void low_expert(const LowRank &low, int64_t expert, const float *x, int64_t n, float *decoded, float *t, int64_t b) {
    const int64_t rank = low.a->ne[1];
    for (int64_t first = 0; first < rank; first += MOST_ROWS) {
        low_block(Matrix(low.a, expert), first, std::min(MOST_ROWS, rank - first), x, n,
                  static_cast<const float *>(low.scales->data), decoded, t + b * rank * COLUMNS);
    }
}

// A column block of floats, of which depth is a multiple of GROUP -> the same in another form.
void convert_block(const float *floats, int64_t depth, Form form, float *out) {
    if (form == Form::BFLOATS) {
#if DG_HAS_BFLOATS
        round_columns(floats, depth, reinterpret_cast<BfloatPair *>(out));
#endif
        return;
    }
#if DG_HAS_INTEGERS
    quantize_columns(floats, depth, form, out);
#else
    (void)floats;
    (void)depth;
    (void)out;
#endif
}

// Columns that lie anywhere -> a column block in the form that a product wants.
void make_block(const float *const *columns, int64_t n, int64_t depth, Form form, float *block) {
    if (form == Form::FLOATS) {
        pack_columns(columns, n, depth, block);
        return;
    }
    const int64_t at_once = form == Form::WORDS ? MOST_PACKED : GROUP;
    for (int64_t k = 0; k < depth; k += at_once) {
        const float *parts[COLUMNS];
        float floats[MOST_PACKED * COLUMNS];
        const int64_t some = std::min(at_once, depth - k);
        for (int64_t j = 0; j < n; ++j) {
            parts[j] = columns[j] + k;
        }
        pack_columns(parts, n, some, floats);
        convert_block(floats, some, form, block + block_floats(k, form));
    }
}

// exp(-|x|)
Lanes exp_minus_abs(Lanes x) {
    const Lanes negative = x < 0.0f ? x : -x;
    return exp_lanes(not_below_floor(negative));
}

// gate[i] = gelu_tanh(gate[i]) * up[i], in float32: gelu_tanh(g) = g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)). As
// operators of a graph in pass/ggml_ops.cpp, as is the softcap; tests/test_operators.py holds the two together.
void gelu_mul(float *gate, const float *up, int64_t n) {
    const float a = 2.0f * std::sqrt(2.0f / 3.14159265358979f);
    for (int64_t i = 0; i < n; i += LANES) {
        const Lanes g = load(gate + i);
        const Lanes z = g * (a + (a * 0.044715f) * (g * g));
        const Lanes e = exp_minus_abs(z);
        const Lanes sigmoid = (z < 0.0f ? e : Lanes{} + 1.0f) / (1.0f + e);
        store(gate + i, g * sigmoid * load(up + i));
    }
}

// x[i] = cap * tanh(x[i] / cap). Near 0 by the series, whose first term left out is below half an ulp there; elsewhere
// (1 - e) / (1 + e) with e = exp(-2 |x| / cap), where 1 - e would lose bits near 0. Infinity becomes NaN, not the cap:
// nothing after this could tell it from a logit.
void apply_softcap(float *x, int64_t n, float cap) {
    for (int64_t i = 0; i < n; i += LANES) {
        const Lanes y = load(x + i) / cap;
        const Lanes e = exp_minus_abs(2.0f * y);
        const Lanes far = (1.0f - e) / (1.0f + e);
        const Lanes s = y * y;
        Lanes p = s * -8.8632355e-3f + 2.1869488e-2f;
        p = p * s - 5.3968254e-2f;
        p = p * s + 1.3333334e-1f;
        p = p * s - 3.3333334e-1f;
        const Lanes near = y + y * (s * p);
        const Lanes tanh = s < 0.09f ? near : (y < 0.0f ? -far : far);
        store(x + i, cap * tanh + (y - y));
    }
}

// Rows that a thread takes at a time: few enough that all threads end at about the same time.
int64_t rows_of_task(int64_t n_rows, int n_threads) {
    const int64_t share = n_rows / (3 * n_threads) / TILE_ROWS * TILE_ROWS;
    return std::clamp<int64_t>(share, TILE_ROWS, MOST_ROWS / TILE_ROWS * TILE_ROWS);
}

} // namespace

void run_pack(ggml_tensor *dst, int, int, void *userdata) {
    auto &work = *static_cast<PackWork *>(userdata);
    const ggml_tensor *x = dst->src[0];
    take_tasks(work, dst->ne[1], 1, [&](int64_t block, int64_t) {
        const float *columns[COLUMNS];
        const int64_t n = std::min(COLUMNS, x->ne[1] - block * COLUMNS);
        for (int64_t j = 0; j < n; ++j) {
            columns[j] = row_of(x, block * COLUMNS + j);
        }
        make_block(columns, n, x->ne[0], work.form, row_of(dst, block));
    });
}

// Column blocks of floats -> the same in another form.
void run_quantize(ggml_tensor *dst, int, int, void *userdata) {
    auto &work = *static_cast<PackWork *>(userdata);
    const ggml_tensor *x = dst->src[0];
    take_tasks(work, dst->ne[1], 1, [&](int64_t block, int64_t) {
        convert_block(row_of(x, block), x->ne[0] / COLUMNS, work.form, row_of(dst, block));
    });
}

void run_multiply(ggml_tensor *dst, int thread, int n_threads, void *userdata) {
    auto &work = *static_cast<MultiplyWork *>(userdata);
    const Matrix w(dst->src[0]);
    const ggml_tensor *x = dst->src[1];
    const Scratch scratch = scratch_of(dst->src[2], thread);
    take_tasks(work, dst->ne[0], rows_of_task(dst->ne[0], n_threads), [&](int64_t first, int64_t rows) {
        for (int64_t column = 0; column < dst->ne[1]; column += MOST_COLUMNS) {
            const int64_t n = std::min(MOST_COLUMNS, dst->ne[1] - column);
            const int64_t tile_block = rows * COLUMNS;
            multiply_rows(w, first, rows, {row_of(x, column / COLUMNS), n, work.form}, scratch.decoded, scratch.tile,
                          tile_block);
            low_rows(dst->src[3], dst->src[4], column, n).add(first, rows, scratch.decoded, scratch.tile, tile_block);
            if (work.softcap > 0.0f) {
                apply_softcap(scratch.tile, column_blocks(n) * tile_block, work.softcap);
            }
            for (int64_t b = 0; b * COLUMNS < n; ++b) {
                float *columns[COLUMNS];
                const int64_t in_block = std::min(COLUMNS, n - b * COLUMNS);
                for (int64_t j = 0; j < in_block; ++j) {
                    columns[j] = row_of(dst, column + b * COLUMNS + j) + first;
                }
                unpack_columns(scratch.tile + b * tile_block, rows, in_block, columns);
            }
        }
    });
}

namespace {

// Rows first .. of gelu_tanh(gate x) * (up x) -> out, column blocks.
void gated_rows(const Matrix &gate, const Matrix &up, int64_t first, int64_t rows, const Columns &x,
                const LowRows &low_gate, const LowRows &low_up, const Scratch &scratch, float *out, int64_t out_block) {
    const int64_t tile_block = rows * COLUMNS;
    multiply_rows(gate, first, rows, x, scratch.decoded, out, out_block);
    low_gate.add(first, rows, scratch.decoded, out, out_block);
    multiply_rows(up, first, rows, x, scratch.decoded, scratch.tile, tile_block);
    low_up.add(first, rows, scratch.decoded, scratch.tile, tile_block);
    for (int64_t b = 0; b * COLUMNS < x.n; ++b) {
        gelu_mul(out + b * out_block, scratch.tile + b * tile_block, tile_block);
    }
}

} // namespace

void run_gated(ggml_tensor *dst, int thread, int n_threads, void *userdata) {
    const Matrix gate(dst->src[0]);
    const Matrix up(dst->src[1]);
    const ggml_tensor *x = dst->src[2];
    const Scratch scratch = scratch_of(dst->src[3], thread);
    const int64_t n_ff = dst->ne[0] / COLUMNS;
    auto &work = *static_cast<MultiplyWork *>(userdata);
    take_tasks(work, n_ff, rows_of_task(n_ff, n_threads), [&](int64_t first, int64_t rows) {
        for (int64_t column = 0; column < work.n; column += MOST_COLUMNS) {
            const int64_t n = std::min(MOST_COLUMNS, work.n - column);
            gated_rows(gate, up, first, rows, {row_of(x, column / COLUMNS), n, work.form},
                       low_rows(dst->src[4], dst->src[5], column, n), low_rows(dst->src[6], dst->src[7], column, n),
                       scratch, row_of(dst, column / COLUMNS) + first * COLUMNS, dst->ne[0]);
        }
    });
}

// What a low-rank pair's A makes of x, times its scales: column blocks.
void run_low(ggml_tensor *dst, int thread, int, void *userdata) {
    auto &work = *static_cast<LowWork *>(userdata);
    const Matrix a(dst->src[0]);
    const ggml_tensor *x = dst->src[1];
    const Scratch scratch = scratch_of(dst->src[2], thread);
    const int64_t rank = dst->ne[0] / COLUMNS;
    const int64_t pieces = (rank + MOST_ROWS - 1) / MOST_ROWS;
    take_tasks(work, dst->ne[1] * pieces, 1, [&](int64_t task, int64_t) {
        const int64_t block = task / pieces;
        const int64_t first = task % pieces * MOST_ROWS;
        low_block(a, first, std::min(MOST_ROWS, rank - first), row_of(x, block),
                  std::min(COLUMNS, work.n - block * COLUMNS), static_cast<const float *>(work.scales->data),
                  scratch.decoded, row_of(dst, block));
    });
}

// ----------------------------------------------------------------------------------------------------- experts

// One expert at a time, from its rows' inputs to their outputs: dst [n_embd, n_used * n].
void run_experts(ggml_tensor *dst, int thread, int, void *userdata) {
    auto &work = *static_cast<ExpertsWork *>(userdata);
    const ggml_tensor *x = dst->src[0];
    const ggml_tensor *gate = dst->src[2];
    const ggml_tensor *up = dst->src[3];
    const ggml_tensor *down = dst->src[4];
    const int64_t n_embd = x->ne[0];
    const int64_t n_assigned = work.n_assigned;
    const int64_t n_used = n_assigned / x->ne[1];
    const Routes routes(dst->src[1], work.n_expert, n_assigned);
    float *low_x = row_of(dst, n_assigned) + thread * work.low_floats;
    float *low_t = low_x + n_embd * COLUMNS;
    Scratch scratch = scratch_of(dst->src[5], thread);
    scratch.hidden = scratch.x + std::max(n_embd, work.n_ff) * EXPERT_COLUMNS;
    take_tasks(work, *routes.n_tasks, 1, [&](int64_t index, int64_t) {
        const int32_t expert = routes.tasks[3 * index];
        const int32_t *order = routes.order + routes.tasks[3 * index + 1];
        const int64_t n = routes.tasks[3 * index + 2];
        for (int64_t b = 0; b * COLUMNS < n; ++b) {
            const float *columns[COLUMNS];
            const int64_t in_block = std::min(COLUMNS, n - b * COLUMNS);
            for (int64_t j = 0; j < in_block; ++j) {
                columns[j] = row_of(x, order[b * COLUMNS + j] / n_used);
            }
            make_block(columns, in_block, n_embd, work.form, scratch.x + b * block_floats(n_embd, work.form));
            if (work.gate_up.a) {
                pack_columns(columns, in_block, n_embd, low_x);
                low_expert(work.gate_up, expert, low_x, in_block, scratch.decoded, low_t, b);
            }
        }
        const LowRows low_gate = {work.gate_up.b, low_t, n, expert, 0};
        const LowRows low_up = {work.gate_up.b, low_t, n, expert, work.n_ff};
        const LowRows low_down = {work.down.b, low_t, n, expert, 0};
        const Matrix expert_gate(gate, expert);
        const Matrix expert_up(up, expert, gate == up ? work.n_ff : 0);
        const Matrix expert_down(down, expert);
        for (int64_t first = 0; first < work.n_ff; first += MOST_ROWS) {
            gated_rows(expert_gate, expert_up, first, std::min(MOST_ROWS, work.n_ff - first), {scratch.x, n, work.form},
                       low_gate, low_up, scratch, scratch.hidden + first * COLUMNS, work.n_ff * COLUMNS);
        }
        for (int64_t b = 0; work.down.a && b * COLUMNS < n; ++b) {
            low_expert(work.down, expert, scratch.hidden + b * work.n_ff * COLUMNS, std::min(COLUMNS, n - b * COLUMNS),
                       scratch.decoded, low_t, b);
        }
        Columns hidden = {scratch.hidden, n, work.form_down};
        const bool shorter = work.form_down != Form::FLOATS;
        for (int64_t b = 0; shorter && b * COLUMNS < n; ++b) { // in place of x, which is used up
            hidden.at = scratch.x;
            convert_block(scratch.hidden + b * work.n_ff * COLUMNS, work.n_ff, work.form_down,
                          scratch.x + b * block_floats(work.n_ff, work.form_down));
        }
        for (int64_t first = 0; first < n_embd; first += MOST_ROWS) {
            const int64_t rows = std::min(MOST_ROWS, n_embd - first);
            multiply_rows(expert_down, first, rows, hidden, scratch.decoded, scratch.tile, rows * COLUMNS);
            low_down.add(first, rows, scratch.decoded, scratch.tile, rows * COLUMNS);
            for (int64_t b = 0; b * COLUMNS < n; ++b) {
                float *columns[COLUMNS];
                const int64_t in_block = std::min(COLUMNS, n - b * COLUMNS);
                for (int64_t j = 0; j < in_block; ++j) {
                    columns[j] = row_of(dst, order[b * COLUMNS + j]) + first;
                }
                unpack_columns(scratch.tile + b * rows * COLUMNS, rows, in_block, columns);
            }
        }
    });
}

// dst [n_embd, n]: the outputs of each row's experts, in the order of their rank, times their weights.
void run_combine(ggml_tensor *dst, int, int, void *userdata) {
    const ggml_tensor *outputs = dst->src[0];
    const ggml_tensor *weights = dst->src[1];
    const int64_t n_used = weights->ne[0];
    take_tasks(*static_cast<Work *>(userdata), dst->ne[1], 8, [&](int64_t first, int64_t n) {
        for (int64_t row = first; row < first + n; ++row) {
            float *sum = row_of(dst, row);
            for (int64_t i = 0; i < n_used; ++i) {
                const float weight = row_of(weights, row)[i];
                const float *output = row_of(outputs, row * n_used + i);
                for (int64_t k = 0; k < dst->ne[0]; ++k) {
                    sum[k] = i == 0 ? weight * output[k] : sum[k] + weight * output[k];
                }
            }
        }
    });
}

int64_t product_scratch(int64_t n_embd, int64_t n_ff_exp) {
    return DECODED + TILE + (std::max(n_embd, n_ff_exp) + n_ff_exp) * EXPERT_COLUMNS;
}

} // namespace dg::DG_LEVEL
