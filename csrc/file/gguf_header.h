// One GGUF file's header as a checked table: the only reader of the format here.
#pragma once

#include "file/file_map.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace dg {

// A key's entry in the header: its value begins at byte `data` and ends before `end`; the entry itself, name and type
// included, begins at `entry`. Numbers are little-endian and not aligned, a string is its length (u64) and its bytes.
struct GgufKey {
    std::string name;
    uint32_t type;    // GGUF's number
    uint32_t element; // of an array's elements; `type` of a single value
    uint64_t count;   // 1 for a single value
    size_t entry;
    size_t data;
    size_t end;
};

// A tensor: `offset` counts from the file's beginning, and all `n_bytes` from there on lie inside the file.
struct GgufTensor {
    std::string name;
    uint32_t type; // a ggml_type that exists
    int32_t n_dims;
    std::array<int64_t, 4> ne;
    uint64_t offset;
    size_t n_bytes;
};

// Holds the header's bytes itself, so that keys can be read when the file is long gone.
class GgufHeader {
  public:
    // Reads no more of the file than its header. Every count, length, type, shape, alignment and place is checked to be
    // within its limits and within the file. Throws DG_ERROR_FORMAT that says what is wrong, and where; for what is no
    // GGUF, what it is instead, where that can be told.
    GgufHeader(const ByteSource &file, const std::string &path);

    uint64_t file_size() const { return file_size_; }
    uint32_t version() const { return version_; }
    uint32_t alignment() const { return alignment_; }
    uint64_t data_offset() const { return data_offset_; } // where the first tensor may begin

    const std::vector<GgufKey> &keys() const { return keys_; }
    const GgufKey *find(const std::string &key) const; // null when there is none
    const unsigned char *at(size_t byte) const { return bytes_.data() + byte; }
    // `body` with each string of a key in order; with none when they are not strings.
    void for_each_string(const GgufKey &key, const std::function<void(std::string_view)> &body) const;

    const std::vector<GgufTensor> &tensors() const { return tensors_; }

  private:
    friend class HeaderWalk;

    uint64_t file_size_ = 0;
    uint32_t version_ = 0;
    uint32_t alignment_ = 32; // the format's default
    uint64_t data_offset_ = 0;
    std::vector<unsigned char> bytes_;
    std::vector<GgufKey> keys_;
    std::unordered_map<std::string, size_t> index_;
    std::vector<GgufTensor> tensors_;
};

} // namespace dg
