#include "file/gguf_keys.h"

#include "file/names.h"

#include <cinttypes>

namespace dg {
namespace {

bool integer_at(gguf_type type, const void *data, size_t i, int64_t &out) {
    switch (type) {
        case GGUF_TYPE_UINT8: out = static_cast<const uint8_t *>(data)[i]; return true;
        case GGUF_TYPE_INT8: out = static_cast<const int8_t *>(data)[i]; return true;
        case GGUF_TYPE_UINT16: out = static_cast<const uint16_t *>(data)[i]; return true;
        case GGUF_TYPE_INT16: out = static_cast<const int16_t *>(data)[i]; return true;
        case GGUF_TYPE_UINT32: out = static_cast<const uint32_t *>(data)[i]; return true;
        case GGUF_TYPE_INT32: out = static_cast<const int32_t *>(data)[i]; return true;
        case GGUF_TYPE_INT64: out = static_cast<const int64_t *>(data)[i]; return true;
        case GGUF_TYPE_UINT64: {
            const uint64_t value = static_cast<const uint64_t *>(data)[i];
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

void GgufKeys::fail_type(const char *key, const char *expected, gguf_type got) const {
    fail(format("key %s has type %s, expected %s", full_name(key).c_str(), gguf_type_name(got), expected));
}

int64_t GgufKeys::find(const char *key) const { return gguf_find_key(gguf_, full_name(key).c_str()); }

int64_t GgufKeys::require(const char *key) const {
    const int64_t id = find(key);
    if (id < 0) {
        fail("key " + full_name(key) + " is missing");
    }
    return id;
}

void GgufKeys::check_range(const char *key, int64_t value, int64_t least, int64_t most) const {
    if (value < least || value > most) {
        fail(format("key %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, full_name(key).c_str(), value, least,
                    most));
    }
}

void GgufKeys::check_array_length(const char *key, int64_t id, size_t n) const {
    const size_t got = gguf_get_arr_n(gguf_, id);
    if (got != n) {
        fail(format("key %s has %zu entries, expected one a layer, %zu", full_name(key).c_str(), got, n));
    }
}

std::string GgufKeys::text(const char *key) const {
    const int64_t id = require(key);
    if (gguf_get_kv_type(gguf_, id) != GGUF_TYPE_STRING) {
        fail_type(key, "a string", gguf_get_kv_type(gguf_, id));
    }
    return gguf_get_val_str(gguf_, id);
}

int32_t GgufKeys::integer(const char *key, int64_t least, int64_t most) const {
    const int64_t id = require(key);
    const gguf_type type = gguf_get_kv_type(gguf_, id);
    int64_t value = 0;
    if (type == GGUF_TYPE_ARRAY || type == GGUF_TYPE_STRING ||
        !integer_at(type, gguf_get_val_data(gguf_, id), 0, value)) {
        fail_type(key, "an integer", type);
    }
    check_range(key, value, least, most);
    return static_cast<int32_t>(value);
}

int32_t GgufKeys::integer_or(const char *key, int64_t least, int64_t most, int32_t fallback) const {
    return has(key) ? integer(key, least, most) : fallback;
}

double GgufKeys::real(const char *key, double least, double most) const {
    const int64_t id = require(key);
    const gguf_type type = gguf_get_kv_type(gguf_, id);
    double value = 0;
    if (type == GGUF_TYPE_FLOAT32) {
        value = static_cast<double>(gguf_get_val_f32(gguf_, id));
    } else if (type == GGUF_TYPE_FLOAT64) {
        value = gguf_get_val_f64(gguf_, id);
    } else {
        fail_type(key, "a real number", type);
    }
    if (!(value >= least && value <= most)) { // NaN as well
        fail(format("key %s is %g, expected %g to %g", full_name(key).c_str(), value, least, most));
    }
    return value;
}

double GgufKeys::real_or(const char *key, double least, double most, double fallback) const {
    return has(key) ? real(key, least, most) : fallback;
}

std::vector<int64_t> GgufKeys::integers(const char *key, size_t n, int64_t least, int64_t most) const {
    const int64_t id = require(key);
    if (gguf_get_kv_type(gguf_, id) != GGUF_TYPE_ARRAY) {
        return std::vector<int64_t>(n, integer(key, least, most));
    }
    check_array_length(key, id, n);
    const gguf_type type = gguf_get_arr_type(gguf_, id);
    std::vector<int64_t> values(n);
    for (size_t i = 0; i < n; ++i) {
        if (type == GGUF_TYPE_STRING || !integer_at(type, gguf_get_arr_data(gguf_, id), i, values[i])) {
            fail_type(key, "an array of integers", type);
        }
        check_range(key, values[i], least, most);
    }
    return values;
}

std::vector<bool> GgufKeys::bools(const char *key, size_t n) const {
    const int64_t id = require(key);
    if (gguf_get_kv_type(gguf_, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf_, id) != GGUF_TYPE_BOOL) {
        fail_type(key, "an array of bools", gguf_get_kv_type(gguf_, id));
    }
    check_array_length(key, id, n);
    const auto *data = static_cast<const int8_t *>(gguf_get_arr_data(gguf_, id));
    return std::vector<bool>(data, data + n);
}

} // namespace dg
