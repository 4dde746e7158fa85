// What a step's time goes into (dg_timings): a graph's tensors carry their part in their name, where a profiled run
// finds it.
#pragma once

#include "ggml.h"

#include <cstring>

namespace dg {

enum class Part { OTHER, PRODUCTS, EXPERTS, ATTENTION, HEAD, SELF_CONDITIONING };

inline ggml_tensor *mark(ggml_tensor *t, Part part) { return ggml_format_name(t, "part %d", static_cast<int>(part)); }

inline Part part_of(const ggml_tensor *t) {
    return std::strncmp(t->name, "part ", 5) == 0 ? static_cast<Part>(t->name[5] - '0') : Part::OTHER;
}

} // namespace dg
