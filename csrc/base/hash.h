// FNV-1a, 64 bits: tells apart what is not the same by accident.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace dg {

class Hash {
  public:
    void add(const void *data, size_t size) {
        const auto *bytes = static_cast<const unsigned char *>(data);
        for (size_t i = 0; i < size; ++i) {
            value_ = (value_ ^ bytes[i]) * 1099511628211ull;
        }
    }
    void add(const std::string &text) { add(text.c_str(), text.size() + 1); }
    // A number, and no bytes between two of them.
    template <typename T> void add(T number) {
        static_assert(std::is_arithmetic_v<T>, "a number");
        add(&number, sizeof number);
    }
    uint64_t value() const { return value_; }

  private:
    uint64_t value_ = 14695981039346656037ull;
};

} // namespace dg
