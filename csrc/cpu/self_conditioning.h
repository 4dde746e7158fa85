// The self-conditioning signal on the CPU: (softmax of a row's processed logits) times the embedding, times
// sqrt(n_embd).
//
// A row whose probability lies on few tokens gathers those tokens' embeddings: as many as keep the relative error of
// the signal below a bound (1e-6, or 1e-4 for a quantized embedding), and not a count, since a fixed top-k makes this
// model loop. A row too
// flat for that goes, with all others of its kind, through a product with the whole embedding, a chunk of the
// vocabulary at a time. Neither needs a transposed embedding.
#pragma once

#include "cpu/kernels.h"
#include "cpu/work.h"

#include "ggml.h"

#include <cstdint>

namespace dg {

// Tensors that self_conditioning_ops adds.
int64_t self_conditioning_nodes(int64_t n_vocab);

// The greatest length of an embedding row: what the error bound multiplies the mass left out with.
float longest_row(const Kernels &kernels, const ggml_tensor *embedding, int32_t n_threads);

// Adds to `graph`: logits [n_vocab, n] -> signal [n_embd, n], both views of rows. `longest`: longest_row's, read when
// the graph runs.
void self_conditioning_ops(ggml_context *ctx, const Kernels &kernels, ggml_cgraph *graph, WorkList &work,
                           ggml_tensor *scratch, ggml_tensor *embedding, ggml_tensor *logits, ggml_tensor *signal,
                           const float *longest);

} // namespace dg
