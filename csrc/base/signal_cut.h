// How much of a row's softmax the self-conditioning signal may leave out, and where a row may be cut: one rule for the
// CPU's kernels and for CUDA's.
#pragma once

namespace dg {

// What may be left out of a signal, relative to its length. Beside quantized weights 1e-6 would be lost in the
// products' own 5e-3: a confident row with a wide tail (p = 0.93, logits spread by 4) needs 7,324 tokens for 1e-6, and
// 19 for 1e-4.
constexpr double signal_error(bool quantized_embedding) { return quantized_embedding ? 1e-4 : 1e-6; }

// Who knows no lengths takes a signal to be no shorter than this share of the longest embedding: so long is the mean of
// 256 unrelated ones.
constexpr double SHORTEST_SIGNAL = 1.0 / 16.0;

// Where a row may be cut: so many nats below its greatest logit, from the fewest tokens to the most. Below the last one
// half a million tokens weigh 5e-8 of a row together.
constexpr int SIGNAL_CUTS = 8;
constexpr float signal_cut(int index) {
    constexpr float cuts[SIGNAL_CUTS] = {-6.0f, -9.0f, -12.0f, -15.0f, -18.0f, -21.0f, -25.0f, -30.0f};
    return cuts[index];
}

} // namespace dg
