// The forward pass, which exists once: one layer builder serves all modes. Encode runs causally over prompt tokens and
// finished canvases and writes the cache. Score does the same over texts that are judged, not kept, and ends in logits.
// Denoise runs over canvases, each of which sees itself whole and the cache, and ends in logits.
#pragma once

#include "adapter/adapter.h"
#include "pass/cache.h"
#include "pass/importance.h"
#include "pass/pass.h"

#include <cstdint>

namespace dg {

// What the CPU multiplies weights of a type by: "8-bit integers", "16-bit integers", "bfloat16" or "float32"; "ggml"
// where it has no own operators.
const char *product_kernel(const Model &model, ggml_type type);
// Floats of scratch memory that each thread needs for its own operators.
int64_t scratch_floats(const Model &model);

// One pass. Encode ends with the last layer's K and V: nobody reads what would follow. The others end in logits,
// whose rows are those of the segments, one after the other.
// `importance`: what the pass multiplies weights by is added up there; nullptr: nowhere. `adapters`: what runs beside
// the weights; nullptr: nothing.
Graph build_pass(const Model &model, const KvCache &cache, const GraphIo &io, const Pass &pass,
                 Importance *importance = nullptr, const ActiveAdapters *adapters = nullptr);

// n_rows of logits (processed), from first_logit on -> those of io.signal from first_row on: the softmax of each row
// times the embedding, over the whole vocabulary, in slices that bound the memory for the transposed embedding.
Graph build_signal(const Model &model, const GraphIo &io, int32_t first_row, int32_t first_logit, int32_t n_rows);
// The same for those rows alone that are in StepIo::flat_rows, the first n_rows of it.
Graph build_flat_signal(const Model &model, const GraphIo &io, int32_t n_rows);

} // namespace dg
