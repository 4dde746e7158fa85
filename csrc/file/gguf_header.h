// Checks a GGUF's header before ggml reads it.
#pragma once

#include <cstddef>
#include <string>

namespace dg {

// Limits of a header. Real files stay far below; ggml compares every key and every tensor name with all before it, so
// that a million of either would keep it busy for hours.
constexpr size_t MAX_KEYS = 4096;
constexpr size_t MAX_TENSORS = 16384;
constexpr size_t MAX_KEY_BYTES = 65535;
constexpr long long MAX_ELEMENTS = 1ll << 48; // of a tensor

// Whether every count, length, type, shape and alignment in the header of `data` is within its limits and within the
// file: ggml multiplies extents before it looks at them, and reads types straight into enums. Throws DG_ERROR_FORMAT
// that says what is wrong, and where. The tensors' offsets are left to the caller.
void check_gguf_header(const unsigned char *data, size_t size, const std::string &path);

} // namespace dg
