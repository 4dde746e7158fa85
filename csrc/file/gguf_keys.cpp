#include "file/gguf_keys.h"

#include "base/error.h"
#include "file/names.h"

#include "gguf.h"

#include <cinttypes>
#include <cstring>

namespace dg {
namespace {

template <typename T> T number_at(const unsigned char *data, size_t i) {
    T value;
    std::memcpy(&value, data + i * sizeof value, sizeof value);
    return value;
}

bool read_integer(uint32_t type, const unsigned char *data, size_t i, int64_t &out) {
    switch (type) {
        case GGUF_TYPE_UINT8: out = number_at<uint8_t>(data, i); return true;
        case GGUF_TYPE_INT8: out = number_at<int8_t>(data, i); return true;
        case GGUF_TYPE_UINT16: out = number_at<uint16_t>(data, i); return true;
        case GGUF_TYPE_INT16: out = number_at<int16_t>(data, i); return true;
        case GGUF_TYPE_UINT32: out = number_at<uint32_t>(data, i); return true;
        case GGUF_TYPE_INT32: out = number_at<int32_t>(data, i); return true;
        case GGUF_TYPE_INT64: out = number_at<int64_t>(data, i); return true;
        case GGUF_TYPE_UINT64: {
            const auto value = number_at<uint64_t>(data, i);
            out = value > INT64_MAX ? INT64_MAX : static_cast<int64_t>(value);
            return true;
        }
        default: return false;
    }
}

} // namespace

std::string GgufKeys::full_name(const char *key) {
    return key[0] == '.' ? std::string(names::ARCHITECTURE) + key : std::string(key);
}

void GgufKeys::fail(const std::string &what) const { throw Error(DG_ERROR_FORMAT, path_ + ": " + what); }

void GgufKeys::fail_type(const GgufKey &key, const char *expected) const {
    const char *element = gguf_type_name(static_cast<gguf_type>(key.element));
    fail(
        format(key.type == GGUF_TYPE_ARRAY ? "key %s has type arr[%s], expected %s" : "key %s has type %s, expected %s",
               key.name.c_str(), element, expected));
}

const GgufKey &GgufKeys::require(const char *key) const {
    const GgufKey *found = find(key);
    if (!found) {
        fail("key " + full_name(key) + " is missing");
    }
    return *found;
}

int64_t GgufKeys::integer_at(const GgufKey &key, size_t i, const char *expected, int64_t least, int64_t most) const {
    int64_t value = 0;
    if (!read_integer(key.element, header_.at(key.data), i, value)) {
        fail_type(key, expected);
    }
    if (value < least || value > most) {
        fail(format("key %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, key.name.c_str(), value, least, most));
    }
    return value;
}

void GgufKeys::check_array_length(const GgufKey &key, size_t n) const {
    if (key.count != n) {
        fail(format("key %s has %" PRIu64 " entries, expected one a layer, %zu", key.name.c_str(), key.count, n));
    }
}

std::string GgufKeys::text(const char *key) const {
    const GgufKey &found = require(key);
    if (found.type != GGUF_TYPE_STRING) {
        fail_type(found, "a string");
    }
    std::string out;
    header_.for_each_string(found, [&](std::string_view value) { out = value; });
    return out;
}

std::string GgufKeys::text_or(const char *key, const char *fallback) const { return has(key) ? text(key) : fallback; }

int32_t GgufKeys::integer(const char *key, int64_t least, int64_t most) const {
    const GgufKey &found = require(key);
    if (found.type == GGUF_TYPE_ARRAY) {
        fail_type(found, "an integer");
    }
    return static_cast<int32_t>(integer_at(found, 0, "an integer", least, most));
}

int32_t GgufKeys::integer_or(const char *key, int64_t least, int64_t most, int32_t fallback) const {
    return has(key) ? integer(key, least, most) : fallback;
}

double GgufKeys::real(const char *key, double least, double most) const {
    const GgufKey &found = require(key);
    double value = 0;
    if (found.type == GGUF_TYPE_FLOAT32) {
        value = static_cast<double>(number_at<float>(header_.at(found.data), 0));
    } else if (found.type == GGUF_TYPE_FLOAT64) {
        value = number_at<double>(header_.at(found.data), 0);
    } else {
        fail_type(found, "a real number");
    }
    if (!(value >= least && value <= most)) { // NaN as well
        fail(format("key %s is %g, expected %g to %g", found.name.c_str(), value, least, most));
    }
    return value;
}

double GgufKeys::real_or(const char *key, double least, double most, double fallback) const {
    return has(key) ? real(key, least, most) : fallback;
}

std::vector<int64_t> GgufKeys::integers(const char *key, size_t n, int64_t least, int64_t most) const {
    const GgufKey &found = require(key);
    if (found.type != GGUF_TYPE_ARRAY) {
        return std::vector<int64_t>(n, integer(key, least, most));
    }
    check_array_length(found, n);
    std::vector<int64_t> values(n);
    for (size_t i = 0; i < n; ++i) {
        values[i] = integer_at(found, i, "an array of integers", least, most);
    }
    return values;
}

std::vector<bool> GgufKeys::bools(const char *key, size_t n) const {
    const GgufKey &found = require(key);
    if (found.type != GGUF_TYPE_ARRAY || found.element != GGUF_TYPE_BOOL) {
        fail_type(found, "an array of bools");
    }
    check_array_length(found, n);
    const unsigned char *data = header_.at(found.data);
    return std::vector<bool>(data, data + n);
}

} // namespace dg
