// What a session takes on devices, from figures alone: the arithmetic of a session's buffers, and a model of ggml's
// allocator for its intermediate tensors.
#pragma once

#include "model/figures.h"

#include <cstddef>
#include <vector>

namespace dg {

// As dg_session_needs; `cache`: bytes on each layer.
dg_needs session_needs(const dg_config &config, const std::vector<dg_layer_config> &layers,
                       const dg_session_options &session, std::vector<size_t> &cache);

} // namespace dg
