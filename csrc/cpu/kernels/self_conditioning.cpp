#include "base/signal_cut.h"
#include "cpu/kernels/bfloats.h"
#include "cpu/kernels/quantized_rows.h"
#include "cpu/kernels/table.h"
#include "cpu/kernels/tile.h"

#include <cmath>
#include <limits>

namespace dg::DG_LEVEL {
namespace {

constexpr int64_t DECODED = 128; // rows of the embedding that are decoded at a time
constexpr int64_t SLICE = 256;   // of their width
constexpr int64_t DECODED_ROW = SLICE + 16;
// A row of the signal costs n_vocab * n_embd multiplications when it is flat; to gather a token costs n_embd, but its
// decoding and their memory are not shared with other rows: 1/16 of the vocabulary takes as long (Q8_0, 256 rows).
constexpr int64_t FLAT_SHARE = 16;
constexpr int CUTS = SIGNAL_CUTS;

RowState *states(const ggml_tensor *t) { return static_cast<RowState *>(t->data); }

Lanes weights_of(const float *z, float greatest) {
    const Lanes x = load(z) - greatest;
    return x <= EXP_FLOOR ? Lanes{} : exp_lanes(not_below_floor(x)); // NaN stays
}

// The sum of a row's weights exp(z - greatest), and the sums of those below each cut, with how many are not below it.
struct Masses {
    double sum = 0.0;
    double below[CUTS] = {};
    int64_t kept[CUTS] = {};
};

Masses measure(const float *z, int64_t n_vocab, float greatest) {
    constexpr int64_t BLOCK = 1024; // float sums no longer than that
    Masses masses;
    for (int64_t first = 0; first < n_vocab; first += BLOCK) {
        const int64_t end = std::min(first + BLOCK, n_vocab);
        Lanes sum = {};
        Lanes below[CUTS] = {};
        IntLanes above[CUTS] = {};
        const auto take = [&](const float *at) {
            const Lanes x = load(at) - greatest;
            const Lanes e = weights_of(at, greatest);
            sum += e;
            for (int c = 0; c < CUTS; ++c) {
                const IntLanes under = x < Lanes{} + signal_cut(c);
                below[c] += under ? e : Lanes{};
                above[c] += 1 + under;
            }
        };
        int64_t i = first;
        for (; i + LANES <= end; i += LANES) {
            take(z + i);
        }
        if (i < end) { // lanes without a logit hold -inf: they weigh nothing and are below every cut
            float rest[LANES];
            std::fill(rest, rest + LANES, -std::numeric_limits<float>::infinity());
            std::copy(z + i, z + end, rest);
            take(rest);
        }
        for (int64_t lane = 0; lane < LANES; ++lane) {
            masses.sum += static_cast<double>(sum[lane]);
            for (int c = 0; c < CUTS; ++c) {
                masses.below[c] += static_cast<double>(below[c][lane]);
                masses.kept[c] += above[c][lane];
            }
        }
    }
    return masses;
}

float greatest_of(const float *z, int64_t n) {
    Lanes greatest = Lanes{} - std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Lanes x = load(z + i);
        greatest = x > greatest ? x : greatest;
    }
    float result = -std::numeric_limits<float>::infinity();
    for (int64_t lane = 0; lane < LANES; ++lane) {
        result = std::max(result, greatest[lane]);
    }
    for (; i < n; ++i) {
        result = std::max(result, z[i]);
    }
    return result;
}

// The tokens at or above the cut, in ascending order of id, into `out`: their embeddings times their weights. `row` has
// room for one embedding.
void gather(const float *z, int64_t n_vocab, float greatest, float cut, const ggml_tensor *embedding, float *row,
            float *out) {
    const int64_t n_embd = embedding->ne[0];
    std::fill(out, out + n_embd, 0.0f);
    for (int64_t id = 0; id < n_vocab; ++id) {
        const float x = z[id] - greatest;
        if (x < cut) {
            continue;
        }
        const float weight = exp_lanes(Lanes{} + x)[0];
        decode(embedding->type, static_cast<const char *>(embedding->data) + static_cast<size_t>(id) * embedding->nb[1],
               n_embd, row);
        for (int64_t i = 0; i < n_embd; ++i) {
            out[i] += weight * row[i];
        }
    }
}

} // namespace

RowState look_at(const float *z, const ggml_tensor *embedding, float longest, int64_t n_most, float *row,
                 float *signal) {
    const int64_t n_embd = embedding->ne[0];
    const int64_t n_vocab = embedding->ne[1];
    const double error = signal_error(ggml_is_quantized(embedding->type));
    RowState state = {};
    state.greatest = greatest_of(z, n_vocab);
    const Masses masses = measure(z, n_vocab, state.greatest);
    state.scale = static_cast<float>(std::sqrt(static_cast<double>(n_embd)) / masses.sum);
    state.flat = 1;
    for (int c = 0; c < CUTS && state.flat; ++c) {
        const double lost = masses.below[c] * static_cast<double>(longest);
        // The signal is no longer than the longest row times the sum of the weights: most cuts are refused unseen.
        if (lost > error * masses.sum * static_cast<double>(longest)) {
            continue;
        }
        if (masses.kept[c] > n_most) {
            break;
        }
        gather(z, n_vocab, state.greatest, signal_cut(c), embedding, row, signal);
        if (lost <= error * vector_length(signal, n_embd)) {
            state.flat = 0;
            for (int64_t i = 0; i < n_embd; ++i) {
                signal[i] *= state.scale;
            }
        }
    }
    return state;
}

// Every row's first look: peaked rows are done with it, flat ones are marked.
void run_look(ggml_tensor *dst, int thread, int, void *userdata) {
    auto &work = *static_cast<SelfConditioningWork *>(userdata);
    const ggml_tensor *logits = dst->src[0];
    const ggml_tensor *embedding = dst->src[1];
    ggml_tensor *signal = dst->src[2];
    float *row = row_of(dst->src[3], thread);
    take_tasks(work, logits->ne[1], 1, [&](int64_t index, int64_t) {
        states(dst)[index] = look_at(row_of(logits, index), embedding, *work.longest, logits->ne[0] / FLAT_SHARE, row,
                                     row_of(signal, index));
    });
}

// The flat rows' weights of a chunk of the vocabulary, as column blocks of VOCABULARY_CHUNK rows.
void run_weigh(ggml_tensor *dst, int, int, void *userdata) {
    auto &work = *static_cast<SelfConditioningWork *>(userdata);
    const ggml_tensor *logits = dst->src[0];
    const RowState *rows = states(dst->src[1]);
    const auto *list = static_cast<const int32_t *>(dst->src[2]->data);
    const int64_t n = std::min(VOCABULARY_CHUNK, logits->ne[0] - work.first);
    constexpr int64_t PART = 256; // of the vocabulary, so that one block of columns is work for several threads
    const int64_t parts = (n + PART - 1) / PART;
    take_tasks(work, column_blocks(list[0]) * parts, 1, [&](int64_t task, int64_t) {
        const int64_t block = task / parts;
        const int64_t first = task % parts * PART;
        const int64_t length = std::min(PART, n - first);
        const int64_t in_block = std::min<int64_t>(COLUMNS, list[0] - block * COLUMNS);
        float weights[4][PART + LANES];
        float *out = row_of(dst, block) + first * COLUMNS;
        for (int64_t j = 0; j < COLUMNS; j += 4) {
            for (int64_t i = 0; i < 4; ++i) {
                if (j + i < in_block) {
                    const int32_t row = list[1 + block * COLUMNS + j + i];
                    const float *z = row_of(logits, row) + work.first + first;
                    int64_t k = 0;
                    for (; k + LANES <= length; k += LANES) {
                        store(weights[i] + k, weights_of(z + k, rows[row].greatest));
                    }
                    for (; k < length; ++k) {
                        const float x = z[k] - rows[row].greatest;
                        weights[i][k] = x <= EXP_FLOOR ? 0.0f : exp_lanes(Lanes{} + x)[0];
                    }
                } else {
                    std::fill(weights[i], weights[i] + length, 0.0f);
                }
            }
            for (int64_t k = 0; k < length; ++k) {
                for (int64_t i = 0; i < 4; ++i) {
                    out[k * COLUMNS + j + i] = weights[i][k];
                }
            }
        }
    });
}

// sums (column blocks of n_embd rows) += embedding^T times the weights of a chunk
void run_add(ggml_tensor *dst, int thread, int, void *userdata) {
    auto &work = *static_cast<SelfConditioningWork *>(userdata);
    const ggml_tensor *embedding = dst->src[1];
    const ggml_tensor *weights = dst->src[2];
    const int64_t n_flat = static_cast<const int32_t *>(dst->src[3]->data)[0];
    float *decoded = row_of(dst->src[4], thread);
    const int64_t n_embd = embedding->ne[0];
    const int64_t n = std::min(VOCABULARY_CHUNK, embedding->ne[1] - work.first);
#if DG_HAS_BFLOATS
    // Where the products behind this round their activations anyway: half the time, for 1e-3 of the signal beside their
    // own 1e-3 to 5e-3.
    const bool shorter = form_for(embedding->type) != Form::FLOATS;
#endif
    take_tasks(work, n_flat > 0 ? n_embd : 0, SLICE, [&](int64_t slice, int64_t width) {
        const size_t offset = ggml_row_size(embedding->type, slice);
        const auto decode_slice = [&](int64_t row, float *out) {
            const auto id = static_cast<size_t>(work.first + row);
            decode(embedding->type, static_cast<const char *>(embedding->data) + id * embedding->nb[1] + offset, width,
                   out);
        };
        for (int64_t k = 0; k < n; k += DECODED) {
            const int64_t depth = std::min(DECODED, n - k);
#if DG_HAS_BFLOATS
            if (shorter && width % LANES == 0) {
                auto *pairs = reinterpret_cast<BfloatPair *>(decoded);
                for (int64_t i = 0; i < depth; i += 2) {
                    float two[2][SLICE];
                    const bool both = i + 1 < depth;
                    decode_slice(k + i, two[0]);
                    if (both) {
                        decode_slice(k + i + 1, two[1]);
                    }
                    round_two(two[0], both ? two[1] : nullptr, width, pairs + i / 2 * DECODED_ROW);
                }
                for (int64_t b = 0; b * COLUMNS < n_flat; ++b) {
                    BfloatPair columns[DECODED / 2 * COLUMNS];
                    round_columns(row_of(weights, b) + k * COLUMNS, depth, columns);
                    multiply_bfloats({pairs, 1, DECODED_ROW}, width, depth, columns, row_of(dst, b) + slice * COLUMNS,
                                     n_flat - b * COLUMNS <= LANES, work.first + k > 0);
                }
                continue;
            }
#endif
            for (int64_t i = 0; i < depth; ++i) {
                decode_slice(k + i, decoded + i * DECODED_ROW);
            }
            for (int64_t b = 0; b * COLUMNS < n_flat; ++b) {
                multiply_block<false>({decoded, 1, DECODED_ROW}, width, depth, row_of(weights, b) + k * COLUMNS,
                                      row_of(dst, b) + slice * COLUMNS, COLUMNS, n_flat - b * COLUMNS <= LANES,
                                      work.first + k > 0);
            }
        }
    });
}

// The sums of the flat rows -> their signal.
void run_finish(ggml_tensor *dst, int, int, void *userdata) {
    const ggml_tensor *sums = dst->src[1];
    const RowState *rows = states(dst->src[2]);
    const auto *list = static_cast<const int32_t *>(dst->src[3]->data);
    take_tasks(*static_cast<SelfConditioningWork *>(userdata), list[0], COLUMNS, [&](int64_t first, int64_t n) {
        float *columns[COLUMNS];
        for (int64_t j = 0; j < n; ++j) {
            columns[j] = row_of(dst, list[1 + first + j]);
        }
        unpack_columns(row_of(sums, first / COLUMNS), dst->ne[0], n, columns);
        for (int64_t j = 0; j < n; ++j) {
            const float scale = rows[list[1 + first + j]].scale;
            for (int64_t i = 0; i < dst->ne[0]; ++i) {
                columns[j][i] *= scale;
            }
        }
    });
}

int64_t self_conditioning_scratch(int64_t n_embd) { return std::max(DECODED * DECODED_ROW, n_embd); }

} // namespace dg::DG_LEVEL
