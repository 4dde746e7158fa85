// The embedding once more, transposed and in half precision: what the self-conditioning signal of a device's operators
// is one product with (sample/signal_graph.h). Optional, since it is as large as an embedding in F16.
#pragma once

#include "diffgguf.h"

#include "ggml.h"

#include <cstddef>

namespace dg {

size_t signal_copy_bytes(const dg_config &config);

// embedding [n_embd, n_vocab] of any type, whose numbers are at `data` -> `copy`, F16 [n_vocab, n_embd], wherever it
// is; some 64 MB of it exist here at a time. Throws UNSUPPORTED for numbers that half precision does not have.
void fill_signal_copy(const ggml_tensor *embedding, const void *data, ggml_tensor *copy);

} // namespace dg
