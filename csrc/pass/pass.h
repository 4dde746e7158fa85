// What a pass is, and what its graph reads and writes.
#pragma once

#include "cpu/work.h"
#include "model/model.h"
#include "sample/sampler_graph.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <utility>
#include <vector>

namespace dg {

enum class Mode { ENCODE, SCORE, DENOISE };

// What the attention of the layers on one device reads besides its weights, written anew for each pass. Masks are for
// ggml's operators; the CPU's own need none.
struct DeviceIo {
    ggml_tensor *positions = nullptr;     // I32 [pass]
    ggml_tensor *slots_full = nullptr;    // I32 [pass]: the cache row of each position
    ggml_tensor *slots_sliding = nullptr; // I32 [pass]
    ggml_tensor *mask_full = nullptr;     // F16, rows of view_rows values; 0 where visible, -inf elsewhere
    ggml_tensor *mask_sliding = nullptr;  // F16
    ggml_tensor *attended = nullptr; // F32 [head_dim * n_head of the widest layer, pass]: several segments' outputs
};

// What a graph that ends in logits leaves, and what samples them there, on the head's device. The Stepper owns it
// (session/stepper.h): each way to do the work between two passes has the tensors that it needs.
struct StepIo {
    ggml_tensor *logits = nullptr;      // F32 [n_vocab, rows of logits]: R, the session's n_rows, or those of a pass
    ggml_tensor *next_signal = nullptr; // F32 [n_embd, R]: where a step leaves the next one's; null: in signal itself
    // I32 [pass_rows]: rows of the signal that are made alone, and where their logits are; null: none are.
    ggml_tensor *flat_rows = nullptr;
    ggml_tensor *flat_logits = nullptr;
    SampleIo sample; // of a pass that is sampled or watched
};

// Tensors that a graph reads and writes from outside; they keep their memory between graphs. Sizes are the largest.
struct GraphIo {
    std::vector<DeviceIo> devices;     // empty ones where no layer is; the CPU's is last
    ggml_tensor *ids = nullptr;        // I32 [pass], or R where that is more
    ggml_tensor *logit_rows = nullptr; // I32 [R]: Pass::logit_rows, where there are any, from first_row on
    ggml_tensor *signal = nullptr;     // F32 [n_embd, R]: (p @ embed) * sqrt(n_embd), zero for no signal
    const StepIo *step = nullptr;      // not owned
    // The CPU's own operators (product.h, attention.h) serve a session that has scratch memory for them; elsewhere, and
    // without it, the graph is made of ggml's, which every device has.
    ggml_tensor *scratch = nullptr; // F32 [floats of a thread, threads]
    float longest_embedding = 0.0f; // longest_row() of the embedding, once a signal was asked for (self_conditioning.h)
};

// What a graph is built for; the shapes of all its tensors follow from it.
//
// A pass is one or more segments: canvases that are denoised, or texts that are scored, side by side. All of them start
// at the same position behind the same prefix and do not see each other. Matrices and experts meet all rows at once.
// Attention goes through the segments one after the other: each writes its K and V into the same cache rows, behind the
// prefix, and reads them before the next one overwrites them, so a segment's numbers are those it has alone.
struct Pass {
    Mode mode = Mode::ENCODE;
    int32_t n_past = 0;            // positions in the cache before it
    std::vector<int32_t> segments; // rows of each
    int32_t first_row = 0;         // its rows stand from here on in io.ids and io.signal
    int32_t first_logit = 0;       // and from here on in the logits
    bool sampled = false;          // ids are drawn, and the next step's signal is made, where the logits are
    bool watched = false;          // probabilities of the ids in SampleIo::watched are reported
    bool uncapped = false;         // logits are left as the product makes them: the kernels softcap
    // Its rows that get logits, ascending; they stand one after the other in the logits. Empty: all rows.
    std::vector<int32_t> logit_rows = {};

    bool causal() const { return mode != Mode::DENOISE; }
    bool has_logits() const { return mode != Mode::ENCODE; }
    // A text is scored from the prefix's last token on, whose prediction is its first token: that row is computed
    // again, and what it would write goes where nothing looks.
    int32_t first_position() const { return mode == Mode::SCORE ? n_past - 1 : n_past; }
    int32_t rows() const;                                               // of all segments
    int32_t n_logits() const;                                           // rows of logits
    int32_t logit_row(int32_t i) const;                                 // whose logits are the i-th
    int32_t end(int32_t rows) const { return first_position() + rows; } // of a segment
    int32_t end() const;                                                // of the longest segment
    // Positions, slots and masks are the same.
    bool has_inputs_of(const Pass &other) const {
        return mode == other.mode && n_past == other.n_past && segments == other.segments;
    }
    // Which rows get logits is an input: their number alone makes another graph.
    bool operator==(const Pass &other) const {
        return has_inputs_of(other) && first_row == other.first_row && first_logit == other.first_logit &&
               logit_rows.size() == other.logit_rows.size() && sampled == other.sampled && watched == other.watched &&
               uncapped == other.uncapped;
    }
};

// Rows that are chosen are made up to multiples of this. That costs nothing, since a product takes its columns 8 to 32
// at a time, and rows that come and go between steps make few graphs.
constexpr int32_t ROW_BLOCK = 16;
// The next multiple of a block.
constexpr int32_t whole_blocks(int32_t n, int32_t block = ROW_BLOCK) { return (n + block - 1) / block * block; }

// Which of a pass's n rows get logits (Pass::logit_rows): those that are wanted, and the first others until there are a
// multiple of `block`. At least one row does.
std::vector<int32_t> rows_with_logits(const uint8_t *wanted, int32_t n, int32_t block);

struct Graph {
    ggml_context_ptr context;
    ggml_cgraph *nodes = nullptr; // in context's memory
    // Where nodes are to be computed. Empty when all are on the CPU.
    std::vector<std::pair<ggml_tensor *, int32_t>> devices;
    WorkList work; // of its custom operators
    // The backend that computes all of it, once it is placed; -1: several do, with copies between them.
    int32_t whole = -1;
};

} // namespace dg
