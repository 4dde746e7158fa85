// The keys of a GGUF file, each checked for its type and range before it is used.
#pragma once

#include "file/gguf_header.h"

#include <cstdint>
#include <string>
#include <vector>

namespace dg {

// Looks keys up by the names in names.h: those that begin with a dot stand behind the architecture. Everything throws
// DG_ERROR_FORMAT, naming file, key, and what was expected. Holds the header by reference.
class GgufKeys {
  public:
    GgufKeys(std::string path, const GgufHeader &header) : path_(std::move(path)), header_(header) {}

    static std::string full_name(const char *key);
    bool has(const char *key) const { return find(key) != nullptr; }
    std::string text(const char *key) const;
    std::string text_or(const char *key, const char *fallback) const;
    // Integers may have any width in the file.
    int32_t integer(const char *key, int64_t least, int64_t most) const;
    int32_t integer_or(const char *key, int64_t least, int64_t most, int32_t fallback) const;
    double real(const char *key, double least, double most) const;
    double real_or(const char *key, double least, double most, double fallback) const;
    // An array of n integers, or one integer that stands for all.
    std::vector<int64_t> integers(const char *key, size_t n, int64_t least, int64_t most) const;
    std::vector<bool> bools(const char *key, size_t n) const;

  private:
    std::string path_;
    const GgufHeader &header_;

    const GgufKey *find(const char *key) const { return header_.find(full_name(key)); }
    const GgufKey &require(const char *key) const;
    int64_t integer_at(const GgufKey &key, size_t i, const char *expected, int64_t least, int64_t most) const;
    void check_array_length(const GgufKey &key, size_t n) const;
    [[noreturn]] void fail(const std::string &what) const;
    [[noreturn]] void fail_type(const GgufKey &key, const char *expected) const;
};

} // namespace dg
