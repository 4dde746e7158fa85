// Rows of weights from one ggml type to another, for the converter. ggml's own row functions do the arithmetic.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

namespace dg {

// Bytes of a row; 0 for an unknown type, or a row that does not divide into the type's blocks.
size_t row_bytes(int32_t type, int64_t row);

// `n` numbers (a multiple of the type's block) -> floats; false for a type that ggml cannot read so.
bool to_floats(ggml_type type, const void *data, int64_t n, float *out);

struct Rows {
    int64_t count;
    int64_t length;
};

// As dg_quantize_rows in diffgguf.h. The result does not depend on n_threads: a row is computed whole, by one thread.
void quantize_rows(int32_t src_type, const void *src, int32_t dst_type, void *dst, Rows rows, const float *importance,
                   int32_t n_threads);

} // namespace dg
