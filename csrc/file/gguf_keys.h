// The keys of a GGUF file, each checked for its type and range before it is used.
#pragma once

#include "base/error.h"

#include "gguf.h"

#include <cstdint>
#include <string>
#include <vector>

namespace dg {

// Looks keys up by the names in names.h: those that begin with a dot stand behind the architecture. Everything throws
// DG_ERROR_FORMAT, naming file, key, and what was expected. Holds the context by reference.
class GgufKeys {
  public:
    GgufKeys(std::string path, const gguf_context *gguf) : path_(std::move(path)), gguf_(gguf) {}

    static std::string full_name(const char *key);
    bool has(const char *key) const { return find(key) >= 0; }
    std::string text(const char *key) const;
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
    const gguf_context *gguf_;

    int64_t find(const char *key) const;
    int64_t require(const char *key) const;
    void check_range(const char *key, int64_t value, int64_t least, int64_t most) const;
    void check_array_length(const char *key, int64_t id, size_t n) const;
    [[noreturn]] void fail(const std::string &what) const;
    [[noreturn]] void fail_type(const char *key, const char *expected, gguf_type got) const;
};

} // namespace dg
