#include "file/gguf_header.h"

#include "base/error.h"

#include "ggml.h"
#include "gguf.h"

#include <cinttypes>
#include <cstring>

namespace dg {
namespace {

constexpr uint32_t MAX_ALIGNMENT = 1 << 20;
constexpr uint32_t MIN_ALIGNMENT = 8; // the format's own rule; what is less aligned is not read as numbers

class HeaderWalk {
  public:
    HeaderWalk(const unsigned char *data, size_t size, const std::string &path)
        : data_(data), size_(size), path_(path) {}

    void walk() {
        at_ = 4; // the magic
        const auto version = number<uint32_t>("the version");
        if ((version & 0xffff) == 0) {
            fail(format("version 0x%08x: the file is big-endian", version));
        }
        if (version != 2 && version != 3) {
            fail(format("version %u, expected 2 or 3", version));
        }
        const auto n_tensors = number<uint64_t>("the number of tensors");
        const auto n_keys = number<uint64_t>("the number of keys");
        if (n_tensors > MAX_TENSORS) {
            fail(format("%" PRIu64 " tensors, expected at most %zu", n_tensors, MAX_TENSORS));
        }
        if (n_keys > MAX_KEYS) {
            fail(format("%" PRIu64 " keys, expected at most %zu", n_keys, MAX_KEYS));
        }
        for (uint64_t i = 0; i < n_keys; ++i) {
            key();
        }
        for (uint64_t i = 0; i < n_tensors; ++i) {
            tensor();
        }
    }

  private:
    const unsigned char *data_;
    size_t size_;
    size_t at_ = 0;
    const std::string &path_;

    [[noreturn]] void fail(const std::string &what) const {
        throw Error(DG_ERROR_FORMAT, path_ + ": broken GGUF header: " + what);
    }

    void need(uint64_t n, const char *what) const {
        if (n > size_ - at_) {
            fail(format("%s, at byte %zu, needs %" PRIu64
                        " bytes, and the file has %zu more: it is truncated or damaged",
                        what, at_, n, size_ - at_));
        }
    }

    template <typename T> T number(const char *what) {
        need(sizeof(T), what);
        T value;
        std::memcpy(&value, data_ + at_, sizeof value);
        at_ += sizeof value;
        return value;
    }

    std::string name(const char *what, size_t most) {
        const auto length = number<uint64_t>(what);
        need(length, what);
        if (length == 0 || length > most) {
            fail(format("%s, at byte %zu, has %" PRIu64 " bytes, expected 1 to %zu", what, at_, length, most));
        }
        std::string text(reinterpret_cast<const char *>(data_) + at_, static_cast<size_t>(length));
        if (text.find('\0') != std::string::npos) {
            fail(format("%s, at byte %zu, holds a NUL", what, at_));
        }
        at_ += length;
        return text;
    }

    void skip_text(const char *what) {
        const auto length = number<uint64_t>(what);
        need(length, what);
        at_ += length;
    }

    // Bytes of a value of fixed size; 0 for a string.
    size_t value_size(uint32_t type, const char *key) const {
        switch (type) {
            case GGUF_TYPE_UINT8:
            case GGUF_TYPE_INT8:
            case GGUF_TYPE_BOOL: return 1;
            case GGUF_TYPE_UINT16:
            case GGUF_TYPE_INT16: return 2;
            case GGUF_TYPE_UINT32:
            case GGUF_TYPE_INT32:
            case GGUF_TYPE_FLOAT32: return 4;
            case GGUF_TYPE_UINT64:
            case GGUF_TYPE_INT64:
            case GGUF_TYPE_FLOAT64: return 8;
            case GGUF_TYPE_STRING: return 0;
            default: fail(format("key %s has the value type %u", key, type));
        }
    }

    void key() {
        const std::string text = name("a key", MAX_KEY_BYTES);
        auto type = number<uint32_t>(text.c_str());
        uint64_t n = 1;
        const bool array = type == GGUF_TYPE_ARRAY;
        if (array) {
            type = number<uint32_t>(text.c_str());
            n = number<uint64_t>(text.c_str());
        }
        const size_t size = value_size(type, text.c_str());
        // A string takes eight bytes at least, for its length.
        const uint64_t least = size > 0 ? size : sizeof(uint64_t);
        if (n > (size_ - at_) / least) {
            fail(format("key %s has %" PRIu64 " values, and the file has %zu more bytes: it is truncated or damaged",
                        text.c_str(), n, size_ - at_));
        }
        if (text == GGUF_KEY_GENERAL_ALIGNMENT && !array && type == GGUF_TYPE_UINT32) {
            uint32_t alignment = 0;
            std::memcpy(&alignment, data_ + at_, sizeof alignment);
            if (alignment < MIN_ALIGNMENT || alignment > MAX_ALIGNMENT || (alignment & (alignment - 1)) != 0) {
                fail(format("key %s is %u, expected a power of 2 from %u to %u", text.c_str(), alignment, MIN_ALIGNMENT,
                            MAX_ALIGNMENT));
            }
        }
        if (size > 0) {
            at_ += static_cast<size_t>(n) * size;
            return;
        }
        for (uint64_t i = 0; i < n; ++i) {
            skip_text(text.c_str());
        }
    }

    void tensor() {
        const std::string text = name("a tensor's name", GGML_MAX_NAME - 1);
        const auto n_dims = number<uint32_t>(text.c_str());
        if (n_dims > GGML_MAX_DIMS) {
            fail(format("tensor %s has %u dimensions, expected at most %d", text.c_str(), n_dims, GGML_MAX_DIMS));
        }
        int64_t first = 1;
        int64_t elements = 1;
        for (uint32_t i = 0; i < n_dims; ++i) {
            const auto extent = number<int64_t>(text.c_str());
            if (extent < 1 || extent > MAX_ELEMENTS / elements) {
                fail(format("dimension %u of tensor %s is %" PRId64 ", expected at least 1 and at most 2^48 elements",
                            i, text.c_str(), extent));
            }
            elements *= extent;
            first = i == 0 ? extent : first;
        }
        const auto type = number<uint32_t>(text.c_str());
        const int64_t block = type < GGML_TYPE_COUNT ? ggml_blck_size(static_cast<ggml_type>(type)) : 0;
        if (block == 0) {
            fail(format("tensor %s has the type %u, which does not exist", text.c_str(), type));
        }
        if (first % block != 0) {
            fail(format("tensor %s has rows of %" PRId64 " elements, expected a multiple of %" PRId64 " for type %s",
                        text.c_str(), first, block, ggml_type_name(static_cast<ggml_type>(type))));
        }
        number<uint64_t>(text.c_str());
    }
};

} // namespace

void check_gguf_header(const unsigned char *data, size_t size, const std::string &path) {
    HeaderWalk(data, size, path).walk();
}

} // namespace dg
