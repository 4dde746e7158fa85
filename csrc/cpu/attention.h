// Attention on the CPU, as one ggml custom operator: softmax(q k) v over blocks of keys with a running maximum, in
// float32, whatever the cache's type. Scores never exist whole, and blocks of keys that no row of a task sees cost
// nothing: a sliding layer's cost does not grow with the prefix.
#pragma once

#include "cpu/tile.h"
#include "cpu/work.h"

#include "ggml.h"

#include <cstdint>

namespace dg {

// Which cache rows the rows of a segment see. Row i stands at position first + i; slot s of a cache of `slots` rows
// holds the greatest position below `end` that maps to it (KvCache::position).
struct Visible {
    int32_t first = 0;
    int32_t end = 0;
    int32_t slots = 0;
    int32_t window = 0;  // of a sliding layer, else 0
    bool causal = false; // row i sees positions up to its own; else all rows see all up to the end
    int32_t n_past = 0;  // not causal: the window counts back from here
};

#if DG_HAS_TILES

// Floats that each thread needs in the scratch tensor.
int64_t attention_scratch(int64_t head_dim);

// q [head_dim, n_head, n] F32; k and v: cache tensors [head_dim * n_head_kv, slots] -> [head_dim * n_head, n]. Scale 1.
ggml_tensor *attention_op(ggml_context *ctx, WorkList &work, ggml_tensor *scratch, ggml_tensor *q, ggml_tensor *k,
                          ggml_tensor *v, int64_t n_head_kv, const Visible &visible);

#endif

} // namespace dg
