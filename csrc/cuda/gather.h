// The self-conditioning signal of one row: the embeddings of its candidates (row.h), weighted by their probabilities.
// The generic graph multiplies the whole softmax with the whole embedding (signal_of in csrc/sample/signal_graph.h),
// which reads all of it for every canvas; here a row reads as many embeddings as it has candidates.
//
// Floor: the bytes of one embedding for each candidate. At the released shape (2,816 wide, Q6_K: 2,310 bytes) a canvas
// whose 256 rows have 100 candidates each reads 59 MB: 18 us on an H100, 59 us on an RTX 4090; a settled canvas, with
// one each, 0.6 MB. The dense product is 378 GFLOP and 605 MB.
#pragma once

#include "cuda/dequantize.h"

namespace dg::cuda {

constexpr int GATHER_THREADS = 256;

using GatherBlock = Block<GATHER_THREADS>;

struct GatherInput {
    const uint8_t *embedding; // token_embd: rows of n_embd weights
    int64_t bytes_per_row;
    int32_t n_embd;
    float scale;                // sqrt(n_embd)
    const int32_t *tokens;      // [count]
    const float *probabilities; // [count]
    int32_t count;
};

// The columns first .. first + 255 of one row of the signal. Candidates are added in their order, which process_row
// leaves the same every time.
template <RowType TYPE> DG_HD void gather(GatherBlock &block, const GatherInput &in, int32_t first, float *out) {
    block.local([&](int thread) {
        const int32_t column = first + thread;
        if (column >= in.n_embd) {
            return;
        }
        float sum = 0.0f;
        for (int32_t k = 0; k < in.count; ++k) {
            const uint8_t *row = in.embedding + in.tokens[k] * in.bytes_per_row;
            sum += in.probabilities[k] * weight_at<TYPE>(row, column);
        }
        out[column] = sum * in.scale;
    });
}

} // namespace dg::cuda
