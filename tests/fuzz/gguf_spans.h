// Where the parts of a GGUF header lie. The mutator changes them without knowing what they mean.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fuzz {

enum class Kind { COUNT, LENGTH, KEY_TYPE, ARRAY_TYPE, TENSOR_TYPE, DIMS, EXTENT, OFFSET, INTEGER, REAL, TEXT };

struct Field {
    Kind kind;
    size_t begin, size;
};

struct Span {
    size_t begin, end;
};

// A header as far as it can be followed: `whole` when up to its end.
struct Spans {
    std::vector<Field> fields;
    std::vector<Span> keys, tensors;
    size_t end = 0; // of the header, before padding
    bool whole = false;
};

class SpanReader {
  public:
    SpanReader(const uint8_t *data, size_t size) : data_(data), size_(size) {}

    Spans read() {
        spans_.whole = walk();
        spans_.end = at_;
        return std::move(spans_);
    }

  private:
    const uint8_t *data_;
    size_t size_;
    size_t at_ = 0;
    Spans spans_;

    bool number(Kind kind, size_t size, uint64_t &value) {
        if (size > size_ - at_) {
            return false;
        }
        value = 0;
        std::memcpy(&value, data_ + at_, size);
        spans_.fields.push_back({kind, at_, size});
        at_ += size;
        return true;
    }

    bool text() {
        uint64_t length = 0;
        if (!number(Kind::LENGTH, 8, length) || length > size_ - at_) {
            return false;
        }
        if (length > 0) {
            spans_.fields.push_back({Kind::TEXT, at_, static_cast<size_t>(length)});
        }
        at_ += length;
        return true;
    }

    bool value(uint64_t type) {
        static constexpr size_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
        if (type == 8) {
            return text();
        }
        if (type > 12 || type == 9) {
            return false;
        }
        uint64_t ignored = 0;
        return number(type == 6 || type == 12 ? Kind::REAL : Kind::INTEGER, sizes[type], ignored);
    }

    bool key() {
        uint64_t type = 0;
        if (!text() || !number(Kind::KEY_TYPE, 4, type)) {
            return false;
        }
        if (type != 9) {
            return value(type);
        }
        uint64_t n = 0;
        if (!number(Kind::ARRAY_TYPE, 4, type) || !number(Kind::COUNT, 8, n)) {
            return false;
        }
        for (uint64_t i = 0; i < n; ++i) {
            if (!value(type)) {
                return false;
            }
        }
        return true;
    }

    bool tensor() {
        uint64_t n_dims = 0, ignored = 0;
        if (!text() || !number(Kind::DIMS, 4, n_dims) || n_dims > 4) {
            return false;
        }
        for (uint64_t i = 0; i < n_dims; ++i) {
            if (!number(Kind::EXTENT, 8, ignored)) {
                return false;
            }
        }
        return number(Kind::TENSOR_TYPE, 4, ignored) && number(Kind::OFFSET, 8, ignored);
    }

    bool walk() {
        uint64_t ignored = 0, n_tensors = 0, n_keys = 0;
        if (!number(Kind::INTEGER, 4, ignored) || !number(Kind::INTEGER, 4, ignored) ||
            !number(Kind::COUNT, 8, n_tensors) || !number(Kind::COUNT, 8, n_keys)) {
            return false;
        }
        for (uint64_t i = 0; i < n_keys; ++i) {
            const size_t begin = at_;
            if (!key()) {
                return false;
            }
            spans_.keys.push_back({begin, at_});
        }
        for (uint64_t i = 0; i < n_tensors; ++i) {
            const size_t begin = at_;
            if (!tensor()) {
                return false;
            }
            spans_.tensors.push_back({begin, at_});
        }
        return true;
    }
};

} // namespace fuzz
