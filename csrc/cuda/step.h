// A denoise step behind the forward pass, as three launches: every row (row.h), every canvas (canvas.h), every row of
// the next pass's self-conditioning signal (gather.h). Here a launch's block finds what it works on; the bodies are
// theirs.
#pragma once

#include "cuda/canvas.h"
#include "cuda/gather.h"
#include "cuda/row.h"

#include <cstdint>

namespace dg::cuda {

// Room for candidates that serves: 17 MB for a canvas of 256 rows. Were every row full, the gather would read 4.8 GB at
// the released shape, where the generic signal moves 13.2 GB whatever the rows look like.
constexpr int32_t CAPACITY = 8192;

// Device pointers, and sizes. The same from step to step, until a canvas leaves.
struct Step {
    Canvas *canvases; // [n_canvases], first_row ascending
    int32_t n_canvases;
    int32_t n_rows; // of all of them
    int32_t n_vocab;
    float softcap;         // 0: the logits are softcapped already
    bool keeps_logits;     // they become the processed ones, for the generic signal
    float *logits;         // [n_rows, n_vocab]
    const int32_t *places; // [n_rows]: where in them a row's are; below 0: a pinned row has none. Null: at its number
    int32_t *tokens;       // [n_rows, capacity]: candidates (row.h)
    float *probabilities;  // [n_rows, capacity]
    int32_t *counts;       // [n_rows]
    int32_t capacity;      // 0: no candidates, no gather
    double lost;           // of a row that is gathered, at most (row.h)
    const uint8_t *embedding;
    RowType embedding_type;
    int32_t n_embd;
    float embedding_scale; // sqrt(n_embd)
    float *signal;         // [n_rows, n_embd]
};

// The blocks of each launch.
DG_HD int32_t row_blocks(const Step &step) { return step.n_rows; }
DG_HD int32_t canvas_blocks(const Step &step) { return step.n_canvases; }
DG_HD int32_t gather_slices(const Step &step) { return (step.n_embd + GATHER_THREADS - 1) / GATHER_THREADS; }
DG_HD int32_t gather_blocks(const Step &step) { return step.capacity > 0 ? step.n_rows * gather_slices(step) : 0; }

DG_HD void step_row(RowBlock &block, RowShared &s, const Step &step, int32_t index) {
    int32_t k = 0;
    while (k + 1 < step.n_canvases && step.canvases[k + 1].first_row <= index) {
        ++k;
    }
    const Canvas &c = step.canvases[k];
    const int32_t row = index - c.first_row;
    const int32_t at = step.places ? step.places[index] : index;
    RowInput in;
    in.logits = step.logits + int64_t{at < 0 ? 0 : at} * step.n_vocab;
    in.n_vocab = step.n_vocab;
    in.softcap = step.softcap;
    in.temperature = static_cast<float>(temperature(c));
    in.u = uniform(c, row);
    in.pinned = is_pinned(c, row) ? c.pinned[row] : -1;
    in.wants_logprob = c.logprob != nullptr;
    in.watched = c.watched ? c.watched[row] : -1;
    in.n_allowed = range_size(c.allowed_ends, row);
    in.allowed = c.allowed_ids + range_start(c.allowed_ends, row);
    in.keeps_logits = step.keeps_logits && at >= 0;
    const int64_t place = int64_t{index} * step.capacity;
    process_row(block, s, in,
                {step.tokens + place, step.probabilities + place, step.counts + index, step.capacity, step.lost});
    block.phase([&](int thread) {
        if (thread == 0) {
            c.argmax[row] = s.out.broken ? -1 : s.out.argmax;
            c.draws[row] = s.out.draw;
            c.entropy[row] = s.out.entropy;
            if (c.logprob) {
                c.logprob[row] = s.out.logprob;
            }
        }
    });
}

DG_HD void step_canvas(CanvasBlock &block, CanvasShared &s, const Step &step, int32_t index) {
    Canvas &c = step.canvases[index];
    finish_step(block, s, c, step.capacity > 0 ? step.counts + c.first_row : nullptr, step.capacity);
}

// A flat row, which has more candidates than there is room for, is left alone: Canvas::Decision::flat tells the host.
template <RowType TYPE> DG_HD void step_gather(GatherBlock &block, const Step &step, int32_t index) {
    const int32_t row = index / gather_slices(step);
    const int32_t first = index % gather_slices(step) * GATHER_THREADS;
    if (step.counts[row] > step.capacity) {
        return;
    }
    const int64_t place = int64_t{row} * step.capacity;
    const GatherInput in = {step.embedding,      row_bytes(TYPE, step.n_embd), step.n_embd,     step.embedding_scale,
                            step.tokens + place, step.probabilities + place,   step.counts[row]};
    gather<TYPE>(block, in, first, step.signal + int64_t{row} * step.n_embd);
}

// Calls f with the type as a constant: f(std::integral_constant-like) for templates over RowType.
template <RowType TYPE> struct TypeTag {
    static constexpr RowType value = TYPE;
};

template <typename F> void with_type(RowType type, const F &f) {
    switch (type) {
        case RowType::F32: f(TypeTag<RowType::F32>{}); break;
        case RowType::F16: f(TypeTag<RowType::F16>{}); break;
        case RowType::BF16: f(TypeTag<RowType::BF16>{}); break;
        case RowType::Q8_0: f(TypeTag<RowType::Q8_0>{}); break;
        case RowType::Q4_K: f(TypeTag<RowType::Q4_K>{}); break;
        case RowType::Q5_K: f(TypeTag<RowType::Q5_K>{}); break;
        case RowType::Q6_K: f(TypeTag<RowType::Q6_K>{}); break;
    }
}

} // namespace dg::cuda
