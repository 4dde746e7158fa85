// The forward pass, which exists once: one layer builder serves both modes. Encode runs causally over prompt tokens and
// finished canvases and writes the cache; denoise runs over the canvas, sees all of it, and reads the cache.
#pragma once

#include "cache.h"
#include "model.h"

#include "ggml-cpp.h"

#include <cstdint>

namespace dg {

enum class Mode { ENCODE, DENOISE };

// Tensors that a graph reads and writes from outside; they keep their memory between graphs. Sizes are the largest.
struct GraphIo {
    ggml_tensor *ids = nullptr;           // I32 [pass]
    ggml_tensor *positions = nullptr;     // I32 [pass]
    ggml_tensor *slots_full = nullptr;    // I32 [pass]: the cache row of each position
    ggml_tensor *slots_sliding = nullptr; // I32 [pass]
    ggml_tensor *mask_full = nullptr;     // F16, rows of visible_rows values; 0 where visible, -inf elsewhere
    ggml_tensor *mask_sliding = nullptr;  // F16
    ggml_tensor *soft = nullptr;          // F32 [n_embd, C]: (p @ embed) * sqrt(n_embd), zero for no signal
    ggml_tensor *logits = nullptr;        // F32 [n_vocab, C]
};

// What a graph is built for; the shapes of all its tensors follow from it.
struct Pass {
    Mode mode;
    int32_t n;      // rows
    int32_t n_past; // positions in the cache before it
    int32_t end() const { return n_past + n; }
};

// On full layers the canvas sees everything there is, so only encoding needs a mask; on sliding layers the canvas needs
// one only when the cache holds more than the window.
inline bool needs_mask(const Model &model, const Pass &pass, bool sliding) {
    return pass.mode == Mode::ENCODE || (sliding && pass.n_past > model.config().sliding_window - 1);
}

struct Graph {
    ggml_context_ptr context;
    ggml_cgraph *nodes = nullptr; // in context's memory
};

// One pass. Encode ends with the last layer's K and V: nobody reads what would follow. Denoise ends in io.logits.
Graph build_pass(const Model &model, const KvCache &cache, const GraphIo &io, const Pass &pass);

// io.logits (processed) -> io.soft: the softmax of each row times the embedding, over the whole vocabulary, in slices
// that bound the memory for the transposed embedding.
Graph build_soft_embedding(const Model &model, const GraphIo &io);

} // namespace dg
