#include "session/device_rows.h"

#include "base/error.h"
#include "base/log_capture.h"
#include "base/parallel.h"
#include "cpu/levels.h"
#include "cpu/self_conditioning.h"
#include "file/names.h"
#include "file/quantize.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>

namespace dg {
namespace {

// Bytes of logits that a thread takes at a time, or a row where that is more: what stays in a core's cache, and more
// where each read is a wait. From a server on loopback a step of 67 MB took as long in pieces of 1 to 8 MB, 3 % longer
// in pieces of 256 KB, and 4 % longer in one, which one thread samples. On a network with a millisecond from one answer
// to the next, 268 MB wait 64 ms in these.
constexpr int64_t PIECE = 1 << 20;
constexpr int64_t WAITED_PIECE = 4 << 20;
// A row that is likely to be more tokens than this is multiplied by the device: a step of 256 such rows decodes 0.4 G
// numbers here, 0.4 s of one core, where the device reads the whole embedding once.
constexpr int64_t MOST_GATHERED = 512;

} // namespace

void DeviceRows::take(const Pass &pass, const std::vector<Row> &rows, std::vector<RowSample> &samples) {
    const Model &model = passes_.model();
    const int64_t bytes = n_vocab() * int64_t{sizeof(float)};
    const int64_t piece_bytes = model.devices().waits_for_reads(model.placement().head) ? WAITED_PIECE : PIECE;
    const auto most = static_cast<int32_t>(std::max<int64_t>(1, piece_bytes / bytes));
    if (is_signalled()) {
        find_embedding();
        signal_.resize(static_cast<size_t>(pass.rows()) * static_cast<size_t>(n_embd()));
    }
    flat_.assign(static_cast<size_t>(pass.n_logits()), 0);
    sample_pinned(pass, rows, samples);
    const int32_t n_pieces = (pass.n_logits() + most - 1) / most;
    parallel_rows(n_pieces, static_cast<int32_t>(std::min<int64_t>(most * n_vocab(), INT32_MAX)), passes_.n_threads(),
                  [&](int32_t piece) {
                      const AbortGuard guard; // this thread may meet what ggml gives up at
                      const int32_t first = piece * most;
                      sample_piece(pass, first, std::min(most, pass.n_logits() - first), rows, samples);
                  });
    if (!is_signalled()) {
        return;
    }
    std::vector<int32_t> flat_rows;
    std::vector<int32_t> flat_logits;
    for (int32_t i = 0; i < pass.n_logits(); ++i) {
        if (flat_[static_cast<size_t>(i)]) {
            flat_rows.push_back(pass.first_row + pass.logit_row(i));
            flat_logits.push_back(pass.first_logit + i);
        }
    }
    if (static_cast<int32_t>(flat_rows.size()) < pass.rows()) {
        logits_.set_next_signal(signal_.data(), pass.first_row, pass.rows());
    }
    passes_.compute_signal(flat_rows, flat_logits);
}

std::unique_lock<std::mutex> DeviceRows::speak() {
    const Model &model = passes_.model();
    return model.devices().is_remote(model.placement().head) ? std::unique_lock<std::mutex>(server_)
                                                             : std::unique_lock<std::mutex>();
}

std::vector<float> DeviceRows::take_buffer() {
    const std::lock_guard<std::mutex> lock(buffers_mutex_);
    std::vector<float> buffer;
    if (!buffers_.empty()) {
        std::swap(buffer, buffers_.back());
        buffers_.pop_back();
    }
    return buffer;
}

void DeviceRows::find_embedding() {
    if (embedding_.data) {
        return;
    }
    const Model &model = passes_.model();
    const FileTensor &found = *model.files().find(names::TOKEN_EMBD);
    embedding_ = *found.tensor;
    embedding_.data = const_cast<unsigned char *>(found.data);
    if (model.kernels()) {
        longest_ = longest_row(*model.kernels(), &embedding_, passes_.n_threads());
    }
}

void DeviceRows::sample_pinned(const Pass &pass, const std::vector<Row> &rows, std::vector<RowSample> &samples) {
    const float scale = std::sqrt(static_cast<float>(n_embd()));
    for (int32_t i = 0; i < pass.rows(); ++i) {
        const auto at = static_cast<size_t>(pass.first_row + i);
        const Row &row = rows[at];
        if (!row.rules->is_pinned(row.row)) {
            continue;
        }
        const int32_t id = row.rules->pinned[row.row];
        samples[at] = {id, id, 0.0, 0.0};
        if (is_signalled()) {
            float *out = signal_.data() + i * n_embd();
            to_floats(embedding_.type,
                      static_cast<const char *>(embedding_.data) + static_cast<size_t>(id) * embedding_.nb[1], n_embd(),
                      out);
            std::transform(out, out + n_embd(), out, [scale](float x) { return x * scale; });
        }
    }
}

void DeviceRows::sample_piece(const Pass &pass, int32_t first, int32_t n, const std::vector<Row> &rows,
                              std::vector<RowSample> &samples) {
    std::vector<float> logits = take_buffer();
    logits.resize(static_cast<size_t>(n * n_vocab()));
    {
        const std::unique_lock<std::mutex> turn = speak();
        logits_.fetch(pass.first_logit + first, n, logits.data());
    }
    const Kernels &kernels = logit_kernels(passes_.model().kernels());
    bool any_flat = false;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t row_of_pass = pass.logit_row(first + i);
        const auto at = static_cast<size_t>(pass.first_row + row_of_pass);
        const Row &row = rows[at];
        if (row.rules->is_pinned(row.row)) {
            continue;
        }
        float *z = logits.data() + i * n_vocab();
        try {
            samples[at] = sample_row(kernels, z, static_cast<int32_t>(n_vocab()), row.t, row.u, *row.rules, row.row);
        } catch (const Error &) {
            samples[at].draw = -1;
            continue;
        }
        if (is_signalled() && !(row.gathers && gather(z, row_of_pass))) {
            flat_[static_cast<size_t>(first + i)] = 1;
            any_flat = true;
        }
    }
    if (any_flat) {
        const std::unique_lock<std::mutex> turn = speak();
        logits_.store(pass.first_logit + first, n, logits.data());
    }
    const std::lock_guard<std::mutex> lock(buffers_mutex_);
    buffers_.push_back(std::move(logits));
}

// Whether the row is peaked, so that its signal is made.
bool DeviceRows::gather(const float *z, int32_t row) {
    const Kernels *kernels = passes_.model().kernels();
    if (!kernels) {
        return false;
    }
    thread_local std::vector<float> decoded;
    decoded.resize(static_cast<size_t>(n_embd()));
    return kernels->look_at(z, &embedding_, longest_, MOST_GATHERED, decoded.data(), signal_.data() + row * n_embd())
               .flat == 0;
}

} // namespace dg
