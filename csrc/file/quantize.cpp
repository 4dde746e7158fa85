#include "file/quantize.h"

#include "base/error.h"
#include "base/log_capture.h"
#include "base/parallel.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace dg {
namespace {

bool has_type(int32_t type) { return type >= 0 && type < GGML_TYPE_COUNT; }

// Types that weights come in: float ones, and quantized ones that ggml turns back into floats.
bool holds_weights(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ||
           (ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float);
}

// The quantizers of these are internal to ggml's CPU code (activations of a product), or there is none.
bool is_target(ggml_type type) {
    return holds_weights(type) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K &&
           (!ggml_is_quantized(type) || ggml_get_type_traits(type)->from_float_ref ||
            ggml_quantize_requires_imatrix(type));
}

ggml_type checked_type(const char *name, int32_t type, int64_t length, bool target) {
    if (!has_type(type)) {
        throw Error(DG_ERROR_ARGUMENT, format("%s is %d: there is no such ggml type", name, type));
    }
    const auto kind = static_cast<ggml_type>(type);
    if (target ? !is_target(kind) : !holds_weights(kind)) {
        throw Error(DG_ERROR_UNSUPPORTED, format("%s: ggml cannot turn %s %s rows of weights", name,
                                                 target ? "rows of floats into" : "into", ggml_type_name(kind)));
    }
    if (row_bytes(type, length) == 0) {
        throw Error(DG_ERROR_ARGUMENT, format("a row of %lld elements does not divide into the blocks of %s",
                                              static_cast<long long>(length), ggml_type_name(kind)));
    }
    return kind;
}

// The largest magnitude whose conversion is finite. Of block types the scale is an F16 of at most the largest value;
// Q8_0's is a 127th of it, and MXFP4's is a power of two.
float largest(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_MXFP4: return std::numeric_limits<float>::max();
        case GGML_TYPE_F16: return 65519.0f; // 65520 and above round to infinity
        case GGML_TYPE_BF16: return 3.39e38f;
        case GGML_TYPE_Q8_0: return 65504.0f * 127.0f;
        default: return 65504.0f;
    }
}

// The row as floats: `row` itself when it is float already, else converted into `buffer`.
const float *as_floats(ggml_type type, const char *row, std::vector<float> &buffer) {
    if (type == GGML_TYPE_F32) {
        return reinterpret_cast<const float *>(row);
    }
    ggml_get_type_traits(type)->to_float(row, buffer.data(), static_cast<int64_t>(buffer.size()));
    return buffer.data();
}

void check_row(const float *x, int64_t n, ggml_type type) {
    // A NaN passes through no std::max; adding 0 * x, which is NaN for both, finds it and vectorizes.
    float most = 0.0f;
    float zero = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        most = std::max(most, std::fabs(x[i]));
        zero += 0.0f * x[i];
    }
    if (std::isnan(zero)) {
        throw Error(DG_ERROR_FORMAT, "a weight is NaN or infinity");
    }
    if (most > largest(type)) {
        throw Error(DG_ERROR_UNSUPPORTED, format("a weight of %g is beyond the range of %s; use bf16 or f32",
                                                 static_cast<double>(most), ggml_type_name(type)));
    }
}

} // namespace

size_t row_bytes(int32_t type, int64_t row) {
    if (!has_type(type) || row < 1 || row > std::numeric_limits<int32_t>::max()) {
        return 0;
    }
    const auto kind = static_cast<ggml_type>(type);
    const int64_t block = ggml_blck_size(kind);
    return block == 0 || row % block != 0 ? 0 : ggml_row_size(kind, row);
}

bool to_floats(ggml_type type, const void *data, int64_t n, float *out) {
    if (type == GGML_TYPE_F32) {
        std::memcpy(out, data, static_cast<size_t>(n) * sizeof *out);
        return true;
    }
    const ggml_to_float_t convert = ggml_get_type_traits(type)->to_float;
    if (convert) {
        convert(data, out, n);
    }
    return convert != nullptr;
}

void quantize_rows(int32_t src_type, const void *src, int32_t dst_type, void *dst, Rows rows, const float *importance,
                   int32_t n_threads) {
    const ggml_type from = checked_type("src_type", src_type, rows.length, false);
    const ggml_type to = checked_type("dst_type", dst_type, rows.length, true);
    if (rows.count < 0 || rows.count > std::numeric_limits<int32_t>::max()) {
        throw Error(DG_ERROR_ARGUMENT, format("n_rows is %lld: it must be from 0 to %d",
                                              static_cast<long long>(rows.count), std::numeric_limits<int32_t>::max()));
    }
    if (n_threads < 0) {
        throw Error(DG_ERROR_ARGUMENT, format("n_threads is %d: it must be at least 0", n_threads));
    }
    if (!importance && from != to && ggml_quantize_requires_imatrix(to)) {
        throw Error(DG_ERROR_UNSUPPORTED, format("%s needs an importance matrix", ggml_type_name(to)));
    }
    for (int64_t i = 0; importance && i < rows.length; ++i) {
        if (!(importance[i] >= 0.0f) || !std::isfinite(importance[i])) {
            throw Error(DG_ERROR_ARGUMENT, format("importance[%lld] is %g: it must be finite and not negative",
                                                  static_cast<long long>(i), static_cast<double>(importance[i])));
        }
    }
    if (n_threads == 0) {
        n_threads = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
    }
    // Tables are made here, once, instead of under a lock in every thread: of IQ1_S 8 s, which no copy needs.
    if (from != to) {
        ggml_quantize_init(to);
    }
    const size_t src_row = ggml_row_size(from, rows.length);
    const size_t dst_row = ggml_row_size(to, rows.length);
    parallel_rows(static_cast<int32_t>(rows.count), static_cast<int32_t>(rows.length), n_threads, [&](int32_t row) {
        const AbortGuard no_abort;
        static thread_local std::vector<float> buffer;
        buffer.resize(static_cast<size_t>(rows.length));
        const char *in = static_cast<const char *>(src) + static_cast<size_t>(row) * src_row;
        char *out = static_cast<char *>(dst) + static_cast<size_t>(row) * dst_row;
        const float *x = as_floats(from, in, buffer);
        check_row(x, rows.length, to);
        if (from == to) {
            std::memcpy(out, in, src_row);
        } else {
            ggml_quantize_chunk(to, x, out, 0, 1, rows.length, importance);
        }
    });
}

} // namespace dg
