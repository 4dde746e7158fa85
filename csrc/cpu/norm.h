// RMS norms on the CPU with what stands around them, as one ggml custom operator: a pass over each row instead of
// three.
#pragma once

#include "cpu/kernels.h"
#include "cpu/work.h"

#include "ggml.h"

namespace dg {

// scale * (add + x / rms(x) * weight), row by row of x, which is contiguous. `weight` [x's row], or nullptr for ones;
// `add` of x's shape, or nullptr for zeros and no scale; not without a weight.
ggml_tensor *norm_op(ggml_context *ctx, const Kernels &kernels, WorkList &work, ggml_tensor *x, ggml_tensor *weight,
                     ggml_tensor *add, float scale, float epsilon);

} // namespace dg
