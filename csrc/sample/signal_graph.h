// The self-conditioning signal made of ggml's operators, on whatever device the logits are: the softmax of each row
// times the embedding, over the whole vocabulary, in slices that bound the memory for the transposed embedding. cpu/
// and cuda/ have ways of their own, which gather the rows of likely tokens.
#pragma once

#include "sample/sampler_graph.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace dg {

// p [n_vocab, n], rows that sum to 1 -> [n_embd, n]: p times the embedding [n_embd, n_vocab], times sqrt(n_embd). p is
// of no use afterwards. With `pins` -> [n_embd, n_rows], of all rows of the pass: what is pinned there has its id's own
// embedding. `copy`: null, or the embedding as F16 [n_vocab, n_embd]: the signal is one product with it then.
ggml_tensor *signal_of(ggml_context *ctx, ggml_tensor *embedding, ggml_tensor *copy, ggml_tensor *p,
                       const SampleIo *pins, int64_t n_rows);

// Nodes that it adds, at most, and what puts it somewhere.
size_t signal_nodes(int64_t n_vocab, int64_t n_embd);
// Bytes of its intermediate tensors, at most, beside p.
size_t signal_bytes(int64_t n_vocab, int64_t n_embd, int64_t n_rows);

} // namespace dg
