#include "file/gguf_header.h"

#include "base/error.h"

#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <unordered_set>

namespace dg {
namespace {

// Limits of a header: real files stay far below.
constexpr size_t MAX_KEYS = 4096;
constexpr size_t MAX_TENSORS = 65536;
constexpr size_t MAX_KEY_BYTES = 65535;
constexpr long long MAX_ELEMENTS = 1ll << 48; // of a tensor
constexpr size_t MAX_HEADER = 256u << 20;     // bytes; the released vocabulary makes 16 MB
constexpr uint32_t MAX_ALIGNMENT = 1 << 20;
constexpr uint32_t MIN_ALIGNMENT = 8; // the format's own rule

// The first read, which doubles from there on.
constexpr size_t FIRST_READ = 1 << 20;

bool begins_with(const std::string &text, const char *start) {
    const size_t n = std::strlen(start);
    return text.size() >= n && std::equal(start, start + n, text.begin(), [](char a, char b) {
               return a == (b >= 'A' && b <= 'Z' ? static_cast<char>(b - 'A' + 'a') : b);
           });
}

// What people have in a GGUF's place, by how it begins.
std::string what_else(const std::string &start) {
    const std::string text = start.substr(std::min(start.find_first_not_of(" \t\r\n"), start.size()));
    if (begins_with(text, "version https://git-lfs")) {
        return "a git-lfs pointer in the place of the file: run `git lfs pull` in its folder, or download it anew";
    }
    if (begins_with(text, "<!doctype html") || begins_with(text, "<html")) {
        return "an HTML page, as a download of a file's page gives (in the address, write resolve in place of blob)";
    }
    if (start.size() > 9 && start[8] == '{' && start[7] == '\0' && start[6] == '\0') {
        return "a safetensors file: `pydiffgguf convert` makes a GGUF of the folder that holds it";
    }
    if (start.compare(0, 4, "PK\x03\x04") == 0) {
        return "a zip archive, as PyTorch's checkpoints are";
    }
    return "its first four bytes are not \"GGUF\"";
}

} // namespace

class HeaderWalk {
  public:
    HeaderWalk(GgufHeader &out, const ByteSource &file, const std::string &path)
        : out_(out), file_(file), path_(path), size_(file.size()) {}

    void walk() {
        out_.file_size_ = size_;
        magic();
        out_.version_ = number<uint32_t>("the version");
        if ((out_.version_ & 0xffff) == 0) {
            fail(format("version 0x%08x: the file is big-endian", out_.version_));
        }
        if (out_.version_ != 2 && out_.version_ != 3) {
            fail(format("version %u, expected 2 or 3", out_.version_));
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
        out_.data_offset_ = (at_ + out_.alignment_ - 1) / out_.alignment_ * out_.alignment_;
        for (GgufTensor &tensor : out_.tensors_) {
            place(tensor);
        }
        out_.bytes_.resize(at_);
        out_.bytes_.shrink_to_fit();
    }

  private:
    GgufHeader &out_;
    const ByteSource &file_;
    const std::string &path_;
    const uint64_t size_;
    size_t at_ = 0;
    std::unordered_set<std::string> names_; // of tensors

    [[noreturn]] void refuse(const std::string &what) const { throw Error(DG_ERROR_FORMAT, path_ + ": " + what); }
    [[noreturn]] void fail(const std::string &what) const { refuse("broken GGUF header: " + what); }

    void magic() {
        if (size_ == 0) {
            refuse("the file is empty");
        }
        const auto n = static_cast<size_t>(std::min<uint64_t>(size_, 64));
        read_to(n);
        const std::string start(reinterpret_cast<const char *>(out_.bytes_.data()), n);
        if (start.compare(0, 4, "GGUF") != 0) {
            refuse("not a GGUF file: " + what_else(start));
        }
        at_ = 4;
    }

    void read_to(size_t end) {
        std::vector<unsigned char> &bytes = out_.bytes_;
        const size_t have = bytes.size();
        if (end <= have) {
            return;
        }
        const uint64_t wanted = std::max<uint64_t>(end, std::max(FIRST_READ, 2 * have));
        bytes.resize(static_cast<size_t>(std::min<uint64_t>({wanted, size_, MAX_HEADER})));
        file_.read(have, bytes.data() + have, bytes.size() - have);
    }

    void need(uint64_t n, const char *what) {
        if (n > size_ - at_) {
            fail(format("%s, at byte %zu, needs %" PRIu64 " bytes, and the file has %" PRIu64
                        " more: it is truncated or damaged",
                        what, at_, n, size_ - at_));
        }
        if (n > MAX_HEADER - at_) {
            fail(format("%s, at byte %zu, has %" PRIu64 " bytes: a header may have %zu", what, at_, n, MAX_HEADER));
        }
        read_to(at_ + static_cast<size_t>(n));
    }

    template <typename T> T number(const char *what) {
        need(sizeof(T), what);
        T value;
        std::memcpy(&value, out_.at(at_), sizeof value);
        at_ += sizeof value;
        return value;
    }

    std::string name(const char *what, size_t most) {
        const auto length = number<uint64_t>(what);
        need(length, what);
        if (length == 0 || length > most) {
            fail(format("%s, at byte %zu, has %" PRIu64 " bytes, expected 1 to %zu", what, at_, length, most));
        }
        std::string text(reinterpret_cast<const char *>(out_.at(at_)), static_cast<size_t>(length));
        if (text.find('\0') != std::string::npos) {
            fail(format("%s, at byte %zu, holds a NUL", what, at_));
        }
        at_ += length;
        return text;
    }

    void skip(uint64_t n, const char *what) {
        need(n, what);
        at_ += static_cast<size_t>(n);
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
        GgufKey key = {};
        key.entry = at_;
        key.name = name("a key", MAX_KEY_BYTES);
        const char *what = key.name.c_str();
        key.type = key.element = number<uint32_t>(what);
        key.count = 1;
        if (key.type == GGUF_TYPE_ARRAY) {
            key.element = number<uint32_t>(what);
            key.count = number<uint64_t>(what);
        }
        key.data = at_;
        const size_t size = value_size(key.element, what);
        // A string takes eight bytes at least, for its length.
        if (key.count > (size_ - at_) / (size > 0 ? size : sizeof(uint64_t))) {
            fail(format("key %s has %" PRIu64 " values, and the file has %" PRIu64
                        " more bytes: it is truncated or damaged",
                        what, key.count, size_ - at_));
        }
        if (size > 0) {
            skip(key.count * size, what);
        } else {
            for (uint64_t i = 0; i < key.count; ++i) {
                skip(number<uint64_t>(what), what);
            }
        }
        key.end = at_;
        if (key.name == GGUF_KEY_GENERAL_ALIGNMENT) {
            alignment(key);
        }
        if (!out_.index_.emplace(key.name, out_.keys_.size()).second) {
            fail(format("key %s is there twice", what));
        }
        out_.keys_.push_back(std::move(key));
    }

    void alignment(const GgufKey &key) {
        if (key.type != GGUF_TYPE_UINT32) {
            fail(format("key %s has another type than u32", key.name.c_str()));
        }
        std::memcpy(&out_.alignment_, out_.at(key.data), sizeof out_.alignment_);
        const uint32_t n = out_.alignment_;
        if (n < MIN_ALIGNMENT || n > MAX_ALIGNMENT || (n & (n - 1)) != 0) {
            fail(format("key %s is %u, expected a power of 2 from %u to %u", key.name.c_str(), n, MIN_ALIGNMENT,
                        MAX_ALIGNMENT));
        }
    }

    void tensor() {
        GgufTensor tensor = {};
        tensor.name = name("a tensor's name", GGML_MAX_NAME - 1);
        const char *what = tensor.name.c_str();
        if (!names_.insert(tensor.name).second) {
            fail(format("tensor %s is there twice", what));
        }
        const auto n_dims = number<uint32_t>(what);
        if (n_dims > GGML_MAX_DIMS) {
            fail(format("tensor %s has %u dimensions, expected at most %d", what, n_dims, GGML_MAX_DIMS));
        }
        tensor.n_dims = static_cast<int32_t>(n_dims);
        tensor.ne.fill(1);
        int64_t elements = 1;
        for (uint32_t i = 0; i < n_dims; ++i) {
            const auto extent = number<int64_t>(what);
            if (extent < 1 || extent > MAX_ELEMENTS / elements) {
                fail(format("dimension %u of tensor %s is %" PRId64 ", expected at least 1 and at most 2^48 elements",
                            i, what, extent));
            }
            elements *= extent;
            tensor.ne[i] = extent;
        }
        tensor.type = number<uint32_t>(what);
        const auto type = static_cast<ggml_type>(tensor.type);
        const int64_t block = tensor.type < GGML_TYPE_COUNT ? ggml_blck_size(type) : 0;
        if (block == 0) {
            fail(format("tensor %s has the type number %u, which ggml does not have: another program wrote it, or a "
                        "newer ggml",
                        what, tensor.type));
        }
        if (tensor.ne[0] % block != 0) {
            fail(format("tensor %s has rows of %" PRId64 " elements, expected a multiple of %" PRId64 " for type %s",
                        what, tensor.ne[0], block, ggml_type_name(type)));
        }
        tensor.n_bytes = static_cast<size_t>(elements / block) * ggml_type_size(type);
        tensor.offset = number<uint64_t>(what);
        out_.tensors_.push_back(std::move(tensor));
    }

    // From here on the offset counts from the file's beginning.
    void place(GgufTensor &tensor) {
        const char *what = tensor.name.c_str();
        if (tensor.offset % out_.alignment_ != 0) {
            fail(format("tensor %s lies at %" PRIu64 ", expected a multiple of the alignment, %u", what, tensor.offset,
                        out_.alignment_));
        }
        const uint64_t start = out_.data_offset_;
        if (start > size_ || tensor.offset > size_ - start || tensor.n_bytes > size_ - start - tensor.offset) {
            refuse(format("tensor %s lies at bytes %" PRIu64 " to %" PRIu64 ", but the file ends at %" PRIu64
                          ": it is truncated",
                          what, start + tensor.offset, start + tensor.offset + tensor.n_bytes, size_));
        }
        tensor.offset += start;
    }
};

GgufHeader::GgufHeader(const ByteSource &file, const std::string &path) { HeaderWalk(*this, file, path).walk(); }

const GgufKey *GgufHeader::find(const std::string &key) const {
    const auto found = index_.find(key);
    return found == index_.end() ? nullptr : &keys_[found->second];
}

void GgufHeader::for_each_string(const GgufKey &key, const std::function<void(std::string_view)> &body) const {
    size_t place = key.data;
    for (uint64_t i = 0; key.element == GGUF_TYPE_STRING && i < key.count; ++i) {
        uint64_t length = 0;
        std::memcpy(&length, at(place), sizeof length);
        place += sizeof length;
        body({reinterpret_cast<const char *>(at(place)), static_cast<size_t>(length)});
        place += static_cast<size_t>(length);
    }
}

} // namespace dg
