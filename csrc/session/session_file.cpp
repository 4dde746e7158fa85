// A session's prefix in a file.
#include "session/session.h"

#include "base/error.h"
#include "file/file_map.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>

namespace dg {
namespace {

struct SavedHeader {
    char magic[8];
    uint64_t fingerprint;
    int32_t type_kv;
    int32_t n_past;
    int32_t first_sliding; // sliding layers hold positions first_sliding .. n_past - 1
    int32_t reserved;
};
constexpr char SAVED_MAGIC[8] = {'D', 'G', 'P', 'R', 'E', 'F', '0', '1'};
// With the adapters' encoder key behind the header, where that is not 0.
constexpr char ADAPTED_MAGIC[8] = {'D', 'G', 'P', 'R', 'E', 'F', '0', '2'};

// Rows of a cache tensor that lie one behind the other.
struct Run {
    int32_t slot;
    int32_t rows;
};

constexpr int32_t MOST_ROWS_AT_ONCE = 1024;

// Positions first .. end - 1.
std::vector<Run> runs(const KvCache &cache, bool sliding, int32_t first, int32_t end) {
    std::vector<Run> result;
    while (first < end) {
        const int32_t slot = cache.slot(sliding, first);
        const int32_t rows = std::min({end - first, cache.slots(sliding) - slot, MOST_ROWS_AT_ONCE});
        result.push_back({slot, rows});
        first += rows;
    }
    return result;
}

// The first position that a sliding layer needs behind a prefix of n_past, 0 or more.
int32_t first_of_window(int32_t n_past, const dg_config &c) { return std::max(0, n_past - (c.sliding_window - 1)); }

} // namespace

void Session::save(const std::string &path) {
    SavedHeader header = {};
    std::memcpy(header.magic, encoder_key_ ? ADAPTED_MAGIC : SAVED_MAGIC, sizeof header.magic);
    header.fingerprint = model_->fingerprint();
    header.type_kv = figures_.type_kv;
    header.n_past = n_past();
    header.first_sliding = first_of_window(n_past(), model_->config());
    AtomicFile file(path);
    file.write(&header, sizeof header);
    if (encoder_key_) {
        file.write(&encoder_key_, sizeof encoder_key_);
    }
    file.write(tokens_.data(), tokens_.size() * sizeof tokens_[0]);
    std::vector<char> bytes;
    for (const CacheLayer &layer : cache_->layers()) {
        for (const ggml_tensor *t : {layer.k, layer.v}) {
            for (const Run run :
                 runs(*cache_, layer.sliding, layer.sliding ? header.first_sliding : 0, header.n_past)) {
                bytes.resize(static_cast<size_t>(run.rows) * t->nb[1]);
                ggml_backend_tensor_get(t, bytes.data(), static_cast<size_t>(run.slot) * t->nb[1], bytes.size());
                file.write(bytes.data(), bytes.size());
            }
        }
    }
    file.commit();
}

void Session::load(const std::string &path) {
    truncate(0);
    const std::unique_ptr<FileBytes> file = FileBytes::open(path, false);
    size_t at = 0;
    const auto take = [&](void *out, size_t size) {
        if (size > file->size() - at) {
            throw Error(DG_ERROR_FORMAT, format("%s: cut short: not a whole saved session", path.c_str()));
        }
        std::copy_n(file->data() + at, size, static_cast<unsigned char *>(out));
        at += size;
    };
    SavedHeader header = {};
    const auto begins_with = [&](const char (&magic)[8]) {
        return file->size() >= sizeof header && std::memcmp(file->data(), magic, sizeof magic) == 0;
    };
    const bool adapted = begins_with(ADAPTED_MAGIC);
    if (!adapted && !begins_with(SAVED_MAGIC)) {
        throw Error(DG_ERROR_FORMAT, format("%s: not a saved session", path.c_str()));
    }
    take(&header, sizeof header);
    uint64_t key = 0;
    if (adapted) {
        take(&key, sizeof key);
    }
    if (header.fingerprint != model_->fingerprint() || header.type_kv != figures_.type_kv) {
        throw Error(DG_ERROR_FORMAT, format("%s: saved from another model or with another type_kv", path.c_str()));
    }
    if (key != encoder_key_) {
        throw Error(DG_ERROR_FORMAT, format("%s: saved with other adapters (or other scales)", path.c_str()));
    }
    if (header.n_past < 0 || header.first_sliding != first_of_window(header.n_past, model_->config())) {
        throw Error(DG_ERROR_FORMAT, format("%s: damaged header", path.c_str()));
    }
    if (header.n_past > figures_.n_ctx - model_->config().canvas_length) {
        throw Error(DG_ERROR_CONTEXT, format("%s: its %d tokens and a canvas do not fit n_ctx %d", path.c_str(),
                                             header.n_past, figures_.n_ctx));
    }
    std::vector<int32_t> tokens(static_cast<size_t>(header.n_past));
    take(tokens.data(), tokens.size() * sizeof(int32_t));
    try {
        check_ids("saved tokens", tokens.data(), header.n_past);
    } catch (const Error &error) {
        throw Error(DG_ERROR_FORMAT, path + ": " + error.what());
    }
    std::vector<char> bytes;
    for (const CacheLayer &layer : cache_->layers()) {
        for (ggml_tensor *t : {layer.k, layer.v}) {
            if (layer.sliding) { // slots before the window stay unwritten: a masked NaN would still spoil the sums
                ggml_backend_tensor_memset(t, 0, 0, ggml_nbytes(t));
            }
            for (const Run run :
                 runs(*cache_, layer.sliding, layer.sliding ? header.first_sliding : 0, header.n_past)) {
                bytes.resize(static_cast<size_t>(run.rows) * t->nb[1]);
                take(bytes.data(), bytes.size());
                ggml_backend_tensor_set(t, bytes.data(), static_cast<size_t>(run.slot) * t->nb[1], bytes.size());
            }
        }
    }
    // As if all had been encoded here and a canvas denoised: a ring holds no more than what was saved.
    cache_->wrote(header.first_sliding > 0 ? header.first_sliding + cache_->slots(true) : header.n_past);
    tokens_ = std::move(tokens);
    set_past(header.n_past);
}

} // namespace dg
