// What happens to a canvas once its rows are drawn: accept, renoise, pin, and the decision to stop; and what of a
// canvas lives on the device from step to step. What accept_rows, mean_entropy, StabilityHistory
// (csrc/sample/sampler.h) and CanvasLoop (csrc/session/loop.h) do, in one block.
//
// Floor: some 10 KB are read and written; what is left is the launch and two chains of additions on one thread, 256
// float64 additions at most each. They run in the order of csrc/sample/sampler.cpp: what is accepted depends on their
// last bits.
#pragma once

#include "base/random.h"
#include "cuda/block.h"
#include "sample/sampling.h"

#include <cstdint>

namespace dg::cuda {

constexpr int CANVAS_THREADS = 256;
constexpr int MAX_ROWS = 1024; // of a canvas

using CanvasBlock = Block<CANVAS_THREADS>;

// A canvas on the device. A step reads nothing that the host writes between steps, its number included: that is what a
// captured graph of launches wants.
struct Canvas {
    // Options, as in dg_canvas_options and dg_sampling (csrc/diffgguf.h).
    uint64_t seed;
    double t_min;
    double t_max;
    double entropy_bound;
    double confidence_threshold;
    uint32_t canvas_index;
    int32_t steps;   // N of the schedule
    int32_t n_steps; // that are made at most
    int32_t stability_threshold;
    int32_t n_rows;    // at most MAX_ROWS
    int32_t first_row; // its rows in the logits
    int32_t n_vocab;
    // Rules, [n_rows] each, or null (RowRules in csrc/sample/sampler.h).
    const int32_t *pinned;
    const int32_t *watched;
    const int32_t *allowed_ends;
    const int32_t *allowed_ids; // each row's ascending and once: draws go by id
    // Draws that replace Philox's, [n_rows] each, or null.
    const double *uniform;
    const int32_t *renoise;
    // What a step leaves, [n_rows] each. `ids` is the next pass's input.
    int32_t *ids;
    int32_t *argmax;
    int32_t *last_argmax;
    int32_t *draws;
    uint8_t *accepted;
    double *entropy;
    double *logprob; // null unless watched
    // From step to step.
    int32_t step;    // how many were made
    int32_t n_equal; // how many argmax canvases in a row, before the last one, equalled it
    // The decision: what the host reads of a step.
    struct Decision {
        double mean_entropy; // of the free rows
        int32_t converged;
        int32_t finished;
        int32_t broken; // a row of logits holds NaN or has no finite maximum; nothing else is defined then
        int32_t flat;   // a row has more candidates than there is room for: its signal is made of processed logits
    } decision;
};

DG_HD bool is_pinned(const Canvas &c, int32_t row) { return c.pinned && c.pinned[row] >= 0; }

// Where the ids of a row begin, and how many there are, from the ends of all rows.
DG_HD int32_t range_start(const int32_t *ends, int32_t row) { return ends && row > 0 ? ends[row - 1] : 0; }
DG_HD int32_t range_size(const int32_t *ends, int32_t row) { return ends ? ends[row] - range_start(ends, row) : 0; }

// Of the step that is under way.
DG_HD double temperature(const Canvas &c) { return dg::temperature(c.t_min, c.t_max, c.steps, c.step); }

DG_HD double uniform(const Canvas &c, int32_t row) {
    return c.uniform ? c.uniform[row]
                     : draw_uniform(c.seed, c.canvas_index, static_cast<uint32_t>(c.step), static_cast<uint32_t>(row));
}

// The id of a row that is not accepted: RowRules::noise in csrc/sample/sampler.h.
DG_HD int32_t renoise(const Canvas &c, int32_t row) {
    if (is_pinned(c, row)) {
        return c.pinned[row];
    }
    const int32_t id = c.renoise ? c.renoise[row]
                                 : draw_id(c.seed, c.canvas_index, static_cast<uint32_t>(c.step),
                                           static_cast<uint32_t>(row), Stream::RENOISE, c.n_vocab);
    return range_size(c.allowed_ends, row) == 1 ? c.allowed_ids[range_start(c.allowed_ends, row)] : id;
}

static_assert(sizeof(Canvas) == 208, "what crosses to the host for each step");

struct CanvasShared {
    double entropy[MAX_ROWS];
    int32_t order[MAX_ROWS]; // free rows by entropy
    bool pinned[MAX_ROWS];
    int32_t n_free;
    int32_t n_accepted;
    double mean_entropy;
    bool same; // the argmax canvas as the last one
    bool broken;
    bool flat;
};

// After process_row of every row: one step of the canvas is complete, and the next one's ids stand ready. n_candidates:
// those of the canvas's rows, or null.
DG_HD void finish_step(CanvasBlock &block, CanvasShared &s, Canvas &c, const int32_t *n_candidates, int32_t capacity) {
    // A flag is written by every thread that finds its reason, with the same value.
    block.phase([&](int thread) {
        if (thread == 0) {
            s.same = c.step > 0;
            s.broken = false;
            s.flat = false;
        }
    });
    block.phase([&](int thread) {
        for (int32_t i = thread; i < c.n_rows; i += CANVAS_THREADS) {
            s.entropy[i] = c.entropy[i];
            s.pinned[i] = is_pinned(c, i);
            if (c.step > 0 && c.argmax[i] != c.last_argmax[i]) {
                s.same = false;
            }
            if (c.argmax[i] < 0) {
                s.broken = true;
            }
            if (n_candidates && n_candidates[i] > capacity) {
                s.flat = true;
            }
        }
    });
    // A row's place is the number of rows before it: 65,536 comparisons at 256 rows, instead of a sort.
    block.phase([&](int thread) {
        for (int32_t i = thread; i < c.n_rows; i += CANVAS_THREADS) {
            int32_t place = 0;
            for (int32_t j = 0; j < c.n_rows && !s.pinned[i]; ++j) {
                const bool before = s.entropy[j] < s.entropy[i] || (s.entropy[j] == s.entropy[i] && j < i);
                place += before && !s.pinned[j] ? 1 : 0;
            }
            if (!s.pinned[i]) {
                s.order[place] = i;
            }
        }
        if (thread == 0) {
            double sum = 0.0;
            int32_t n = 0;
            for (int32_t i = 0; i < c.n_rows; ++i) {
                sum += s.pinned[i] ? 0.0 : s.entropy[i];
                n += s.pinned[i] ? 0 : 1;
            }
            s.n_free = n;
            s.mean_entropy = n > 0 ? sum / n : 0.0;
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            double before = 0.0;
            int32_t n = 0;
            while (n < s.n_free && !(before > c.entropy_bound)) {
                before += s.entropy[s.order[n]];
                ++n;
            }
            s.n_accepted = n;
        }
    });
    block.phase([&](int thread) {
        for (int32_t i = thread; i < c.n_rows; i += CANVAS_THREADS) {
            c.last_argmax[i] = c.argmax[i];
            if (s.pinned[i]) {
                c.accepted[i] = 0;
                c.ids[i] = c.pinned[i];
            }
        }
        for (int32_t k = thread; k < s.n_free; k += CANVAS_THREADS) {
            const int32_t row = s.order[k];
            c.accepted[row] = k < s.n_accepted ? 1 : 0;
            c.ids[row] = k < s.n_accepted ? c.draws[row] : renoise(c, row);
        }
    });
    block.phase([&](int thread) {
        if (thread == 0) {
            c.n_equal = s.same ? c.n_equal + 1 : 0;
            const bool stable = c.n_equal >= c.stability_threshold;
            c.decision.mean_entropy = s.mean_entropy;
            c.decision.converged = stable && s.mean_entropy < c.confidence_threshold ? 1 : 0;
            ++c.step;
            c.decision.finished = c.decision.converged || c.step == c.n_steps ? 1 : 0;
            c.decision.broken = s.broken ? 1 : 0;
            c.decision.flat = s.flat ? 1 : 0;
        }
    });
}

} // namespace dg::cuda
