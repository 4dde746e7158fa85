// Whether the numbers of a tensor are numbers, as a node of a graph on the CPU: for what is rounded to small integers
// next, where NaN becomes 0 or a plausible value.
#pragma once

#include "cpu/work.h"

#include "ggml.h"

namespace dg {

// Adds a look at x, F32, to a graph; Work::unsound says afterwards whether NaN or infinity is in it.
void finite_op(ggml_context *ctx, ggml_cgraph *graph, WorkList &list, ggml_tensor *x);

} // namespace dg
