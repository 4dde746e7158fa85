// Attention on the CPU, as one ggml custom operator: softmax(q k) v over blocks of keys with a running maximum, in
// float32, whatever the cache's type. Scores never exist whole, and blocks of keys that no row of a task sees cost
// nothing: a sliding layer's cost does not grow with the prefix.
#pragma once

#include "cpu/kernels.h"
#include "cpu/work.h"

#include "ggml.h"

#include <cstdint>

namespace dg {

// q [head_dim, n_head, n] F32; k and v: cache tensors [head_dim * n_head_kv, slots] -> [head_dim * n_head, n]. Scale 1.
ggml_tensor *attention_op(ggml_context *ctx, const Kernels &kernels, WorkList &work, ggml_tensor *scratch,
                          ggml_tensor *q, ggml_tensor *k, ggml_tensor *v, int64_t n_head_kv, const Visible &visible);

} // namespace dg
