// One row of logits, read once: softcap, temperature, greatest, sum, entropy, argmax, and a draw from the softmax;
// then, of those tiles of the row that matter, the tokens and probabilities that make up the self-conditioning signal.
//
// What sample_step (csrc/sample/sampler.h) does with a row, for a block of 512 threads. A warp takes a tile of 512
// logits into registers, so a tile's greatest is known before its terms are summed, and the tiles' sums are brought to
// one scale at the end. The draw walks the tiles' sums and computes one tile again. Draws on the host and by operators
// (draw_row, sampler_graph.h) share the rule and no line: there a thread has a row, and an operator has no loop. Tests
// hold the three together.
//
// Floor: 4 bytes a logit, 1.05 MB a row and 268 MB a canvas at the released shape (262,144 logits, 256 rows): 80 us on
// an H100 (3.35 TB/s), 150 us on an RTX 5090 (1.79 TB/s), 266 us on an RTX 4090 (1.01 TB/s). Twice that where the
// processed logits are kept. docs/PERFORMANCE.md has nvcc's registers and shared memory.
#pragma once

#include "base/exponential.h"
#include "base/signal_cut.h"
#include "cuda/block.h"

#include <cmath>
#include <cstdint>

namespace dg::cuda {

constexpr int ROW_THREADS = 512;
constexpr int PER_LANE = 16;          // of a tile; with 24, ptxas spills on sm_120
constexpr int TILE = PER_LANE * WARP; // logits that a warp holds in registers
constexpr int MAX_TILES = 1024;
constexpr int N_GROUPS = MAX_TILES / WARP; // of 32 tiles each
constexpr int32_t MAX_VOCAB = TILE * MAX_TILES;

using RowBlock = Block<ROW_THREADS>;

struct RowInput {
    float *logits;          // [n_vocab]: as the head's product left them when softcap > 0, else softcapped
    int32_t n_vocab;        // at most MAX_VOCAB
    float softcap;          // 0: none
    float temperature;      // > 0
    double u;               // in [0, 1)
    int32_t pinned;         // the row's only id, or -1
    bool wants_logprob;     // whether RowOutput::logprob is computed
    int32_t watched;        // the id of that, or -1: the argmax
    const int32_t *allowed; // [n_allowed], ascending, without repeats: the only ids that the row may take
    int32_t n_allowed;      // 0: any
    bool keeps_logits;      // logits become the processed ones: divided, -inf for what the row may not take
};

// The tokens whose probability is worth adding up, in no particular order: all except some that together are at most
// `lost` of the row.
struct Candidates {
    int32_t *tokens;      // [capacity]
    float *probabilities; // [capacity]
    int32_t *count;       // how many there are; beyond `capacity`, and nothing is written
    int32_t capacity;     // 0: none are wanted
    double lost;
};

struct RowOutput {
    int32_t argmax; // the lowest id among equals
    int32_t draw;   // the first id, ascending, whose cumulative probability exceeds u
    double entropy; // nats
    double logprob; // natural log, at temperature 1, before the rules; 0 on a pinned row
    bool broken;    // a logit is NaN, or the greatest one is not finite; all other members are undefined then
};

// A value and where it stands; the lower place wins among equals.
struct Best {
    float value;
    int32_t at;
};

struct Sums {
    double weight; // sum of exp(x)
    double moment; // sum of x exp(x)
};

// How many of a tile's entries are above each cut, two 16-bit counts in a word.
struct Kept {
    uint32_t pairs[SIGNAL_CUTS / 2];
};
struct Masses {
    float below[SIGNAL_CUTS];
};

struct RowShared {
    Best tile_best[MAX_TILES];
    union {
        Sums tile_sums[MAX_TILES]; // first of x = z - the tile's greatest, then of x = z - the row's
        Kept tile_kept[MAX_TILES]; // in the same place, once a tile's sums are no longer wanted
    };
    union {
        double weight[TILE];           // of the drawn tile's entries
        int32_t tile_count[MAX_TILES]; // candidates; then how many come before the tile's
    };
    RowInput in;   // here and not in registers, which the tiles fill
    RowInput view; // what the pass that is under way takes for the row
    Best warp_best[RowBlock::N_WARPS];
    int32_t group_count[N_GROUPS]; // candidates of 32 tiles each; then how many come before the group's
    Sums group_sums[N_GROUPS];     // of 32 tiles each; then of 32 entries of the drawn tile
    Best best;
    Sums total;
    double target; // the draw's, in units of the sum
    double before; // the cumulative weight before the drawn tile
    int32_t tile;  // the drawn one; -1: u * S rounded up to S
    Masses warp_masses[RowBlock::N_WARPS];
    int cut_index; // of the cut that was chosen
    float cut;
    int32_t n_candidates;
    bool broken;
    RowOutput out;
};

namespace detail {

DG_HD float minus_infinity() { return -INFINITY; }

DG_HD Best better(const Best &a, const Best &b) {
    return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

DG_HD Sums operator+(const Sums &a, const Sums &b) { return {a.weight + b.weight, a.moment + b.moment}; }

// The row's entries: all logits, or those of the ids that it may take.
class Row {
  public:
    DG_HD explicit Row(const RowInput &in) : in_(in) {}

    DG_HD int32_t size() const { return in_.n_allowed > 0 ? in_.n_allowed : in_.n_vocab; }
    DG_HD int32_t n_tiles() const { return (size() + TILE - 1) / TILE; }
    DG_HD int32_t id(int32_t i) const { return in_.n_allowed > 0 ? in_.allowed[i] : i; }
    DG_HD float capped(float z) const {
        // ggml's order: scale, tanh, scale. The head's product leaves logits uncapped for the kernels alone, so that
        // they are read once; elsewhere Ops::multiply caps them (cpu/kernels/product.cpp, pass/ggml_ops.cpp).
        return in_.softcap > 0.0f ? std::tanh(z * (1.0f / in_.softcap)) * in_.softcap : z;
    }
    // After the pass over the row.
    DG_HD float processed(int32_t i) const {
        const float z = in_.logits[id(i)];
        return in_.keeps_logits ? z : capped(z) / in_.temperature;
    }
    DG_HD bool may_take(int32_t id) const {
        int32_t low = 0;
        int32_t high = in_.n_allowed;
        while (low < high) {
            const int32_t middle = low + (high - low) / 2;
            if (in_.allowed[middle] < id) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low < in_.n_allowed && in_.allowed[low] == id;
    }

  private:
    const RowInput &in_;
};

struct Lane {
    float x[PER_LANE];
};

// Sum over a lane's share of a tile. Terms with x = 0 are counted apart: beside a 1, what is below 6e-8 would vanish
// (csrc/sample/sampler.cpp has the measured bias).
DG_HD Sums sum_lane(const float (&values)[PER_LANE], float greatest) {
    float ones = 0.0f;
    float weight = 0.0f;
    float moment = 0.0f;
    DG_UNROLL
    for (int j = 0; j < PER_LANE; ++j) {
        const float x = values[j] - greatest;
        const bool is_greatest = x == 0.0f;
        const float e = x > EXP_FLOOR && !is_greatest ? std::exp(x) : 0.0f;
        ones += is_greatest ? 1.0f : 0.0f;
        weight += e;
        moment += e > 0.0f ? x * e : 0.0f; // -inf * 0 is NaN
    }
    return {static_cast<double>(weight) + static_cast<double>(ones), static_cast<double>(moment)};
}

// The first of `n` groups of 32, and in it the first entry, at which the cumulative weight exceeds `target`. Returns
// its index and adds to `before` what lies before it; -1 when the groups end first.
template <typename Weight>
DG_HD int32_t find(const Sums *groups, int32_t n_entries, double target, double &before, const Weight &weight) {
    for (int32_t g = 0; g * WARP < n_entries; ++g) {
        if (before + groups[g].weight > target) {
            const int32_t end = n_entries < (g + 1) * WARP ? n_entries : (g + 1) * WARP;
            int32_t last = -1;
            double last_before = before;
            for (int32_t i = g * WARP; i < end; ++i) {
                const double w = weight(i);
                if (w > 0.0) {
                    last = i;
                    last_before = before;
                }
                if (before + w > target) {
                    return i;
                }
                before += w;
            }
            before = last_before; // the group's sum rounded up past the target
            return last;
        }
        before += groups[g].weight;
    }
    return -1;
}

// Reads the row and leaves each tile's best and sums in `s`, still on the tile's own scale.
DG_HD void read_row(RowBlock &block, RowShared &s, const RowInput &in) {
    const Row row(in);
    const int32_t n = row.size();
    const int32_t n_tiles = row.n_tiles();
    PerThread<Lane, ROW_THREADS> lanes;
    PerThread<Best, ROW_THREADS> best;
    PerThread<Sums, ROW_THREADS> sums;
    for (int32_t first = 0; first < n_tiles; first += RowBlock::N_WARPS) {
        block.phase([&](int thread) {
            const int32_t start = (first + thread / WARP) * TILE + thread % WARP;
            float *const logits = in.logits;
            const float temperature = in.temperature;
            const bool keeps_logits = in.keeps_logits;
            Lane &lane = lanes[thread];
            // All loads are under way before the first value is used.
            DG_UNROLL
            for (int j = 0; j < PER_LANE; ++j) {
                const int32_t i = start + j * WARP;
                lane.x[j] = i < n ? logits[row.id(i)] : minus_infinity();
            }
            Best own = {minus_infinity(), INT32_MAX};
            bool has_nan = false;
            DG_UNROLL
            for (int j = 0; j < PER_LANE; ++j) {
                const int32_t i = start + j * WARP;
                if (i < n) {
                    const float x = row.capped(lane.x[j]) / temperature;
                    lane.x[j] = x;
                    has_nan = has_nan || x != x;
                    own = better(own, {x, i});
                }
            }
            if (keeps_logits) {
                DG_UNROLL
                for (int j = 0; j < PER_LANE; ++j) {
                    const int32_t i = start + j * WARP;
                    if (i < n) {
                        logits[row.id(i)] = lane.x[j];
                    }
                }
            }
            if (has_nan) {
                s.broken = true; // every thread that writes it writes the same
            }
            best[thread] = own;
        });
        block.reduce_warps(best, better);
        block.local([&](int thread) {
            const float greatest = best[thread].value;
            const bool empty = greatest == minus_infinity();
            sums[thread] = empty ? Sums{0.0, 0.0} : sum_lane(lanes[thread].x, greatest);
        });
        block.reduce_warps(sums, [](const Sums &a, const Sums &b) { return a + b; });
        block.phase([&](int thread) {
            const int32_t tile = first + thread / WARP;
            if (thread % WARP == 0 && tile < n_tiles) {
                s.tile_best[tile] = best[thread];
                s.tile_sums[tile] = sums[thread];
            }
        });
    }
}

// Brings the tiles to the row's scale; the sums of groups of 32 of them, and of all.
DG_HD void combine_tiles(RowBlock &block, RowShared &s, int32_t n_tiles) {
    PerThread<Best, ROW_THREADS> best;
    block.local(
        [&](int thread) { best[thread] = thread < n_tiles ? s.tile_best[thread] : Best{minus_infinity(), INT32_MAX}; });
    block.reduce_warps(best, better);
    block.phase([&](int thread) {
        if (thread % WARP == 0) {
            s.warp_best[thread / WARP] = best[thread];
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            Best whole = s.warp_best[0];
            for (int i = 1; i < RowBlock::N_WARPS; ++i) {
                whole = better(whole, s.warp_best[i]);
            }
            s.best = whole;
        }
    });
    block.phase([&](int thread) {
        for (int32_t i = thread; i < n_tiles; i += ROW_THREADS) {
            const float x = s.tile_best[i].value - s.best.value;
            Sums &sums = s.tile_sums[i];
            if (x > EXP_FLOOR) {
                const double up = static_cast<double>(x);
                const double scale = std::exp(up);
                sums = {sums.weight * scale, scale * (sums.moment + up * sums.weight)};
            } else {
                sums = {0.0, 0.0};
            }
        }
    });
    block.phase([&](int thread) {
        if (thread < N_GROUPS) {
            Sums sum = {0.0, 0.0};
            for (int32_t i = thread * WARP; i < (thread + 1) * WARP && i < n_tiles; ++i) {
                sum = sum + s.tile_sums[i];
            }
            s.group_sums[thread] = sum;
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            Sums sum = {0.0, 0.0};
            for (int i = 0; i < N_GROUPS; ++i) {
                sum = sum + s.group_sums[i];
            }
            s.total = sum;
            s.broken = s.broken || !std::isfinite(s.best.value) || !std::isfinite(sum.weight);
        }
    });
}

// The id whose interval holds u; s.group_sums are those of the tiles.
DG_HD void draw(RowBlock &block, RowShared &s, const RowInput &in) {
    const Row row(in);
    const int32_t n_tiles = row.n_tiles();
    const float greatest = s.best.value;
    const auto weight_of = [&](int32_t i) {
        const float x = row.processed(i) - greatest;
        return x > EXP_FLOOR ? static_cast<double>(std::exp(x)) : 0.0;
    };
    block.phase([&](int thread) {
        if (thread == 0) {
            s.target = in.u * s.total.weight;
            s.before = 0.0;
            s.tile = find(s.group_sums, n_tiles, s.target, s.before, [&](int32_t i) { return s.tile_sums[i].weight; });
            s.out.draw = s.out.argmax; // unless a tile was found
        }
    });
    if (s.tile < 0) {
        return;
    }
    const int32_t start = s.tile * TILE;
    const int32_t end = row.size() < start + TILE ? row.size() : start + TILE;
    static_assert(TILE == ROW_THREADS, "a thread for each entry of the tile");
    const int32_t n = end - start;
    block.phase([&](int thread) {
        if (thread < n) {
            s.weight[thread] = weight_of(start + thread);
        }
    });
    block.phase([&](int thread) {
        if (thread < TILE / WARP) {
            double sum = 0.0;
            for (int32_t i = thread * WARP; i < (thread + 1) * WARP && i < n; ++i) {
                sum += s.weight[i];
            }
            s.group_sums[thread].weight = sum;
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            double before = s.before;
            int32_t i = find(s.group_sums, n, s.target, before, [&](int32_t k) { return s.weight[k]; });
            if (i < 0) { // the tile's sum rounded up past the target: its last id that can be drawn
                i = n - 1;
                while (s.weight[i] <= 0.0) {
                    --i;
                }
            }
            s.out.draw = row.id(start + i);
        }
    });
}

// Each tile's count of candidates becomes that of all tiles before it, s.n_candidates the sum. In two levels: on one
// thread, 512 additions that wait for each other are some 10,000 cycles, where a row's bytes take an H100 140,000.
DG_HD void count_before(RowBlock &block, RowShared &s, int32_t n_tiles) {
    const auto scan = [](int32_t *counts, int32_t n) {
        int32_t before = 0;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t own = counts[i];
            counts[i] = before;
            before += own;
        }
        return before;
    };
    block.phase([&](int thread) {
        if (thread < N_GROUPS) {
            const int32_t first = thread * WARP;
            const int32_t n = n_tiles - first < WARP ? n_tiles - first : WARP;
            s.group_count[thread] = scan(s.tile_count + first, n);
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            s.n_candidates = scan(s.group_count, N_GROUPS);
        }
    });
    block.phase([&](int thread) {
        for (int32_t i = thread; i < n_tiles; i += ROW_THREADS) {
            s.tile_count[i] += s.group_count[i / WARP];
        }
    });
}

// The candidates of a row: those above the first cut below which no more than out.lost of the row is left, as measured.
// First the masses below all cuts and what each tile keeps at each of them, then the tokens where they have room. A
// tile whose greatest is below the last cut is not looked at: its sum is known. Of a confident row's 512 tiles a
// handful are left.
DG_HD void collect(RowBlock &block, RowShared &s, const RowInput &in, const Candidates &out) {
    const Row row(in);
    const int32_t n = row.size();
    const int32_t n_tiles = row.n_tiles();
    const float greatest = s.best.value;
    const float lowest = signal_cut(SIGNAL_CUTS - 1);
    block.phase([&](int thread) {
        if (thread < N_GROUPS) {
            double sum = 0.0;
            for (int32_t i = thread * WARP; i < (thread + 1) * WARP && i < n_tiles; ++i) {
                sum += s.tile_best[i].value - greatest < lowest ? s.tile_sums[i].weight : 0.0;
            }
            s.group_sums[thread].weight = sum;
        }
    });
    PerThread<Masses, ROW_THREADS> masses;
    PerThread<Kept, ROW_THREADS> kept;
    block.local([&](int thread) { masses[thread] = {}; });
    for (int32_t first = 0; first < n_tiles; first += RowBlock::N_WARPS) {
        block.local([&](int thread) {
            const int32_t tile = first + thread / WARP;
            kept[thread] = {};
            if (tile < n_tiles && s.tile_best[tile].value - greatest >= lowest) {
                for (int32_t i = tile * TILE + thread % WARP; i < n && i < (tile + 1) * TILE; i += WARP) {
                    const float x = row.processed(i) - greatest;
                    const float e = x > EXP_FLOOR ? std::exp(x) : 0.0f;
                    DG_UNROLL
                    for (int c = 0; c < SIGNAL_CUTS; ++c) {
                        masses[thread].below[c] += x < signal_cut(c) ? e : 0.0f;
                        kept[thread].pairs[c / 2] += x < signal_cut(c) ? 0u : 1u << (c % 2 * 16);
                    }
                }
            }
        });
        block.reduce_warps(kept, [](const Kept &a, const Kept &b) {
            Kept sum = {};
            for (int i = 0; i < SIGNAL_CUTS / 2; ++i) {
                sum.pairs[i] = a.pairs[i] + b.pairs[i];
            }
            return sum;
        });
        block.phase([&](int thread) {
            const int32_t tile = first + thread / WARP;
            if (thread % WARP == 0 && tile < n_tiles) {
                s.tile_kept[tile] = kept[thread];
            }
        });
    }
    block.reduce_warps(masses, [](const Masses &a, const Masses &b) {
        Masses sum = {};
        for (int c = 0; c < SIGNAL_CUTS; ++c) {
            sum.below[c] = a.below[c] + b.below[c];
        }
        return sum;
    });
    block.phase([&](int thread) {
        if (thread % WARP == 0) {
            s.warp_masses[thread / WARP] = masses[thread];
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            double unseen = 0.0;
            for (int g = 0; g < N_GROUPS; ++g) {
                unseen += s.group_sums[g].weight;
            }
            s.cut_index = SIGNAL_CUTS - 1;
            s.cut = lowest;
            DG_UNROLL
            for (int c = SIGNAL_CUTS - 1; c >= 0; --c) {
                double below = unseen;
                for (int w = 0; w < RowBlock::N_WARPS; ++w) {
                    below += static_cast<double>(s.warp_masses[w].below[c]);
                }
                if (below <= out.lost * s.total.weight) {
                    s.cut_index = c;
                    s.cut = signal_cut(c);
                }
            }
        }
    });
    const float cut = s.cut;
    block.phase([&](int thread) {
        const int chosen = s.cut_index;
        for (int32_t i = thread; i < n_tiles; i += ROW_THREADS) {
            s.tile_count[i] = static_cast<int32_t>(s.tile_kept[i].pairs[chosen / 2] >> (chosen % 2 * 16) & 0xFFFFu);
        }
    });
    count_before(block, s, n_tiles);
    block.phase([&](int thread) {
        if (thread == 0) {
            *out.count = s.n_candidates;
        }
    });
    if (s.n_candidates > out.capacity) {
        return;
    }
    const float share = static_cast<float>(1.0 / s.total.weight);
    PerThread<int32_t, ROW_THREADS> counts;
    for (int32_t first = 0; first < n_tiles; first += RowBlock::N_WARPS) {
        // What lies before a lane's own, of the tile's.
        block.local([&](int thread) {
            const int32_t tile = first + thread / WARP;
            counts[thread] = 0;
            if (tile < n_tiles && s.tile_best[tile].value - greatest >= cut) {
                for (int32_t i = tile * TILE + thread % WARP; i < n && i < (tile + 1) * TILE; i += WARP) {
                    counts[thread] += row.processed(i) - greatest < cut ? 0 : 1;
                }
            }
        });
        block.sum_lanes_before(counts);
        block.local([&](int thread) {
            const int32_t tile = first + thread / WARP;
            if (tile < n_tiles && s.tile_best[tile].value - greatest >= cut) {
                int32_t at = s.tile_count[tile] + counts[thread];
                for (int32_t i = tile * TILE + thread % WARP; i < n && i < (tile + 1) * TILE; i += WARP) {
                    const float x = row.processed(i) - greatest;
                    if (x >= cut) {
                        out.tokens[at] = row.id(i);
                        out.probabilities[at] = std::exp(x) * share;
                        ++at;
                    }
                }
            }
        });
    }
}

// A row that is fixed: one token of probability 1.
DG_HD void pinned_row(RowBlock &block, RowShared &s, const RowInput &in, const Candidates &candidates) {
    block.phase([&](int thread) {
        for (int32_t i = thread; in.keeps_logits && i < in.n_vocab; i += ROW_THREADS) {
            in.logits[i] = i == in.pinned ? 0.0f : minus_infinity();
        }
        if (thread == 0) {
            s.out = {in.pinned, in.pinned, 0.0, 0.0, false};
            if (candidates.capacity > 0) {
                *candidates.count = 1;
                candidates.tokens[0] = in.pinned;
                candidates.probabilities[0] = 1.0f;
            }
        }
    });
}

} // namespace detail

// The whole row; the result is s.out, for every thread.
DG_HD void process_row(RowBlock &block, RowShared &s, const RowInput &input, const Candidates &candidates) {
    if (input.pinned >= 0) {
        detail::pinned_row(block, s, input, candidates);
        return;
    }
    const bool wants_logprob = input.wants_logprob;
    block.phase([&](int thread) {
        if (thread == 0) {
            s.in = input;
            s.view = input;
            s.broken = false;
            s.out.logprob = 0.0;
            if (wants_logprob) {
                s.view.temperature = 1.0f;
                s.view.n_allowed = 0;
                s.view.keeps_logits = false;
            }
        }
    });
    const RowInput &in = s.in;
    const detail::Row row(in);
    // The watched id's log-probability takes a pass of its own, at temperature 1 and before the rules. Only infill asks
    // for it.
    for (int pass = wants_logprob ? 0 : 1; pass < 2; ++pass) {
        detail::read_row(block, s, s.view);
        detail::combine_tiles(block, s, detail::Row(s.view).n_tiles());
        block.phase([&](int thread) {
            if (thread == 0 && pass == 0) {
                const float z = in.watched >= 0 ? row.capped(in.logits[in.watched]) : s.best.value;
                s.out.logprob = static_cast<double>(z - s.best.value) - std::log(s.total.weight);
                s.view = in;
            }
        });
    }
    block.phase([&](int thread) {
        if (thread == 0) {
            s.out.argmax = s.broken ? 0 : row.id(s.best.at);
            // H = log S - (sum x e^x) / S; rounding can leave it a hair below zero on a one-hot row.
            const double entropy = std::log(s.total.weight) - s.total.moment / s.total.weight;
            s.out.entropy = entropy > 0.0 ? entropy : 0.0;
            s.out.broken = s.broken;
        }
    });
    if (s.broken) {
        return;
    }
    detail::draw(block, s, in);
    if (candidates.capacity > 0) {
        detail::collect(block, s, in, candidates);
    }
    if (in.keeps_logits && in.n_allowed > 0) {
        block.phase([&](int thread) {
            for (int32_t i = thread; i < in.n_vocab; i += ROW_THREADS) {
                if (!row.may_take(i)) {
                    in.logits[i] = detail::minus_infinity();
                }
            }
        });
    }
}

} // namespace dg::cuda
