// The figures of a model as its file's header tells them: from keys, or, where one is missing, from the shapes of
// tensors and from defaults. No weight is read.
#pragma once

#include "diffgguf.h"
#include "file/gguf_head.h"

#include <string>
#include <vector>

namespace dg {

struct FileFigures {
    dg_config config = {}; // without what only the tensors of all layers tell: has_encoder_scalars
    std::vector<dg_layer_config> layers;
    dg_sampling sampling = {};
    std::vector<std::string> warnings; // keys that are missing, and what is used
};

// Throws DG_ERROR_FORMAT or DG_ERROR_UNSUPPORTED, naming the key and what was expected.
FileFigures read_figures(const GgufHead &head);

// The file's name of the self-conditioning's first norm, of which there are two.
const char *self_conditioning_norm(const GgufHead &head);

} // namespace dg
