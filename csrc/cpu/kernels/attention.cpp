#include "cpu/kernels/table.h"
#include "cpu/kernels/tile.h"

#include "base/positions.h"
#include "cpu/kernels/quantized_rows.h"

#include <cmath>
#include <limits>

namespace dg::DG_LEVEL {
namespace {

constexpr int64_t KEYS = 64; // decoded at a time
// Heads that share keys and are computed together, so that keys and values are decoded once for all of them.
constexpr int64_t MOST_HEADS = 4;
constexpr int64_t PAD = 16; // floats between decoded rows, against cache sets that all of them would share

struct Scratch {
    float *k;       // [KEYS, head_dim + PAD]
    float *v;       // [KEYS, head_dim + PAD]
    float *scores;  // [KEYS, COLUMNS]
    float *q;       // of each head [head_dim, COLUMNS]
    float *out;     // of each head [head_dim, COLUMNS]
    float *highest; // of each head [COLUMNS]: the running maximum
    float *sum;     // of each head [COLUMNS]
};

Scratch scratch_of(ggml_tensor *scratch, int thread, int64_t head_dim) {
    float *at = row_of(scratch, thread);
    const auto take = [&at](int64_t n) {
        float *taken = at;
        at += n;
        return taken;
    };
    Scratch s = {};
    s.k = take(KEYS * (head_dim + PAD));
    s.v = take(KEYS * (head_dim + PAD));
    s.scores = take(KEYS * COLUMNS);
    s.q = take(MOST_HEADS * head_dim * COLUMNS);
    s.out = take(MOST_HEADS * head_dim * COLUMNS);
    s.highest = take(MOST_HEADS * COLUMNS);
    s.sum = take(MOST_HEADS * COLUMNS);
    return s;
}

constexpr float NEVER = -std::numeric_limits<float>::infinity();

Lanes greater(Lanes a, Lanes b) { return a > b ? a : b; }

// What the columns of a task see: positions from oldest to newest.
struct Bounds {
    IntLanes oldest[2];
    IntLanes newest[2];
    int32_t least_oldest, greatest_oldest, least_newest, greatest_newest;
};

Bounds bounds_of(const Visible &v, int32_t first_row, int32_t n) {
    Bounds b = {};
    for (int32_t j = 0; j < COLUMNS; ++j) {
        const int32_t position = v.first + first_row + std::min(j, n - 1); // columns beyond the last row repeat it
        const auto [oldest, newest] = seen_by(position, v.causal, v.n_past, v.end, v.window);
        b.oldest[j / LANES][j % LANES] = oldest;
        b.newest[j / LANES][j % LANES] = newest;
        b.least_oldest = j == 0 ? oldest : std::min(b.least_oldest, oldest);
        b.greatest_oldest = j == 0 ? oldest : std::max(b.greatest_oldest, oldest);
        b.least_newest = j == 0 ? newest : std::min(b.least_newest, newest);
        b.greatest_newest = j == 0 ? newest : std::max(b.greatest_newest, newest);
    }
    return b;
}

// Positions of slots first .. first + n - 1.
void positions_of(const Visible &v, int64_t first, int64_t n, int32_t *positions) {
    for (int64_t i = 0; i < n; ++i) {
        positions[i] = position_in_slot(static_cast<int32_t>(first + i), v.slots, v.end);
    }
}

// Scores [n keys, COLUMNS] -> weights, with the running maximum and sum of each column brought up to date and the
// output so far scaled to the new maximum.
void soften(float *scores, int64_t n, float *highest, float *sum, float *out, int64_t head_dim, int halves) {
    for (int half = 0; half < halves; ++half) {
        float *s = scores + half * LANES;
        const Lanes before = load(highest + half * LANES);
        Lanes now = before;
        for (int64_t k = 0; k < n; ++k) {
            now = greater(now, load(s + k * COLUMNS));
        }
        // A column that has seen nothing yet stays at -inf; its differences are taken from 0 instead.
        const Lanes from = now == NEVER ? Lanes{} : now;
        Lanes total = {};
        for (int64_t k = 0; k < n; ++k) {
            const Lanes x = load(s + k * COLUMNS) - from;
            const Lanes e = exp_lanes(not_below_floor(x));
            const Lanes weight = x <= EXP_FLOOR ? Lanes{} : e; // NaN stays
            store(s + k * COLUMNS, weight);
            total += weight;
        }
        const Lanes fall = before - from;
        const Lanes kept = fall > EXP_FLOOR ? exp_lanes(greater(fall, Lanes{} + EXP_FLOOR)) : Lanes{};
        store(sum + half * LANES, load(sum + half * LANES) * kept + total);
        store(highest + half * LANES, now);
        const IntLanes changed = kept != 1.0f;
        bool any = false;
        for (int64_t j = 0; j < LANES; ++j) {
            any = any || changed[j] != 0;
        }
        for (int64_t d = 0; any && d < head_dim; ++d) {
            float *at = out + d * COLUMNS + half * LANES;
            store(at, load(at) * kept);
        }
    }
}

} // namespace

void run_attention(ggml_tensor *dst, int thread, int, void *userdata) {
    auto &work = *static_cast<AttentionWork *>(userdata);
    const Visible &visible = work.visible;
    const ggml_tensor *q = dst->src[0];
    const ggml_tensor *k = dst->src[1];
    const ggml_tensor *v = dst->src[2];
    const int64_t head_dim = q->ne[0];
    const int64_t n_head = q->ne[1];
    const int64_t n_rows = q->ne[2];
    const int64_t sharing = n_head / work.n_head_kv;
    const int64_t groups = (sharing + MOST_HEADS - 1) / MOST_HEADS; // of heads that share keys
    const int64_t n_slots = std::min(visible.end, visible.slots);
    const int64_t row = head_dim + PAD;
    const Scratch s = scratch_of(dst->src[3], thread, head_dim);
    // Later rows of a causal pass see more: they come first, so that the threads end at about the same time.
    const int64_t n_blocks = column_blocks(n_rows);
    take_tasks(work, n_blocks * work.n_head_kv * groups, 1, [&](int64_t task, int64_t) {
        const int64_t block = n_blocks - 1 - task / (work.n_head_kv * groups);
        const int64_t head_kv = task / groups % work.n_head_kv;
        const int64_t first_head = head_kv * sharing + task % groups * MOST_HEADS;
        const int64_t n_heads = std::min(MOST_HEADS, (head_kv + 1) * sharing - first_head);
        const int64_t first_row = block * COLUMNS;
        const int64_t n = std::min(COLUMNS, n_rows - first_row);
        const bool narrow = n <= LANES;
        const int halves = narrow ? 1 : 2;
        const Bounds bounds = bounds_of(visible, static_cast<int32_t>(first_row), static_cast<int32_t>(n));
        for (int64_t h = 0; h < n_heads; ++h) {
            const float *columns[COLUMNS];
            for (int64_t j = 0; j < n; ++j) {
                columns[j] = reinterpret_cast<const float *>(static_cast<const char *>(q->data) +
                                                             static_cast<size_t>(first_row + j) * q->nb[2] +
                                                             static_cast<size_t>(first_head + h) * q->nb[1]);
            }
            pack_columns(columns, n, head_dim, s.q + h * head_dim * COLUMNS);
        }
        std::fill(s.out, s.out + n_heads * head_dim * COLUMNS, 0.0f);
        std::fill(s.highest, s.highest + n_heads * COLUMNS, NEVER);
        std::fill(s.sum, s.sum + n_heads * COLUMNS, 0.0f);
        const size_t at_head = ggml_row_size(k->type, head_kv * head_dim);
        for (int64_t slot = 0; slot < n_slots; slot += KEYS) {
            const int64_t n_keys = std::min(KEYS, n_slots - slot);
            int32_t positions[KEYS];
            positions_of(visible, slot, n_keys, positions);
            const int32_t least = *std::min_element(positions, positions + n_keys);
            const int32_t greatest = *std::max_element(positions, positions + n_keys);
            if (greatest < bounds.least_oldest || least > bounds.greatest_newest) {
                continue;
            }
            const bool all = least >= bounds.greatest_oldest && greatest <= bounds.least_newest;
            for (int64_t i = 0; i < n_keys; ++i) {
                const auto offset = static_cast<size_t>(slot + i);
                decode(k->type, static_cast<const char *>(k->data) + offset * k->nb[1] + at_head, head_dim,
                       s.k + i * row);
                decode(v->type, static_cast<const char *>(v->data) + offset * v->nb[1] + at_head, head_dim,
                       s.v + i * row);
            }
            for (int64_t h = 0; h < n_heads; ++h) {
                multiply_block<true>({s.k, row, 1}, n_keys, head_dim, s.q + h * head_dim * COLUMNS, s.scores, COLUMNS,
                                     narrow, false);
                for (int64_t i = 0; !all && i < n_keys; ++i) {
                    for (int half = 0; half < halves; ++half) {
                        float *at = s.scores + i * COLUMNS + half * LANES;
                        const IntLanes seen =
                            (bounds.oldest[half] <= positions[i]) & (bounds.newest[half] >= positions[i]);
                        store(at, seen ? load(at) : Lanes{} + NEVER);
                    }
                }
                float *out = s.out + h * head_dim * COLUMNS;
                soften(s.scores, n_keys, s.highest + h * COLUMNS, s.sum + h * COLUMNS, out, head_dim, halves);
                // out [head_dim, COLUMNS] += v^T weights
                multiply_block<false>({s.v, 1, row}, head_dim, n_keys, s.scores, out, COLUMNS, narrow, true);
            }
        }
        for (int64_t h = 0; h < n_heads; ++h) {
            float *out = s.out + h * head_dim * COLUMNS;
            for (int half = 0; half < halves; ++half) {
                const Lanes sum = load(s.sum + h * COLUMNS + half * LANES);
                for (int64_t d = 0; d < head_dim; ++d) {
                    float *at = out + d * COLUMNS + half * LANES;
                    store(at, load(at) / sum);
                }
            }
            float *columns[COLUMNS];
            for (int64_t j = 0; j < n; ++j) {
                columns[j] = row_of(dst, first_row + j) + (first_head + h) * head_dim;
            }
            unpack_columns(out, head_dim, n, columns);
        }
    });
}

int64_t attention_scratch(int64_t head_dim) {
    return 2 * KEYS * (head_dim + PAD) + KEYS * COLUMNS + MOST_HEADS * (2 * head_dim + 2) * COLUMNS;
}

} // namespace dg::DG_LEVEL
