#include "session/step_logits.h"

#include "ggml-backend.h"

#include <algorithm>

namespace dg {
namespace {

// Rows of logits that stand one after the other go where they belong, from the last one on: no place is further ahead.
void spread(float *logits, const std::vector<int32_t> &places, int64_t n_vocab) {
    for (auto i = static_cast<int64_t>(places.size()) - 1; i >= 0 && places[static_cast<size_t>(i)] != i; --i) {
        std::copy_n(logits + i * n_vocab, n_vocab, logits + places[static_cast<size_t>(i)] * n_vocab);
    }
}

} // namespace

void StepLogits::declare(ggml_context *head, bool whole) {
    const Placement &placement = passes_.model().placement();
    const SessionFigures &f = passes_.figures();
    const dg_config &c = passes_.model().config();
    whole_ = whole;
    io_ = {};
    io_.logits = ggml_new_tensor_2d(head, GGML_TYPE_F32, c.n_vocab, whole ? f.n_rows : f.pass_rows);
    if (!whole || placement.layers.front() != placement.head) {
        io_.next_signal = ggml_new_tensor_2d(head, GGML_TYPE_F32, c.n_embd, f.n_rows);
    }
}

bool StepLogits::are_here() const {
    return whole_ && passes_.model().placement().head == passes_.model().devices().cpu();
}

size_t StepLogits::bytes(int32_t n_rows) const { return static_cast<size_t>(n_rows) * io_.logits->nb[1]; }

float *StepLogits::rows() { return are_here() ? static_cast<float *>(io_.logits->data) : copy_.data(); }

void StepLogits::denoise(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted) {
    if (!are_here()) {
        copy_.resize(static_cast<size_t>(passes_.figures().n_rows) * static_cast<size_t>(n_vocab()));
    }
    passes_.each_pass(ids, segments, wanted, Pass(), [&](const Pass &pass) {
        passes_.compute_pass();
        float *logits = rows() + int64_t{pass.first_row} * n_vocab();
        if (!are_here()) {
            ggml_backend_tensor_get(io_.logits, logits, bytes(pass.first_logit), bytes(pass.n_logits()));
        }
        spread(logits, pass.logit_rows, n_vocab());
    });
}

void StepLogits::set(const float *processed, int32_t n_rows) {
    if (whole_) {
        ggml_backend_tensor_set(io_.logits, processed, 0, bytes(n_rows));
    } else {
        copy_.assign(processed, processed + int64_t{n_rows} * n_vocab());
    }
}

void StepLogits::make_signal(int32_t n_rows) {
    if (!passes_.model().config().has_self_conditioning) {
        return;
    }
    const int32_t most = passes_.figures().pass_rows;
    for (int32_t first = 0; first < n_rows; first += most) {
        const int32_t n = std::min(most, n_rows - first);
        if (!whole_) {
            ggml_backend_tensor_set(io_.logits, copy_.data() + int64_t{first} * n_vocab(), 0, bytes(n));
        }
        passes_.compute_signal(first, whole_ ? first : 0, n);
    }
    if (io_.next_signal) {
        take_next_signal(n_rows);
    }
}

void StepLogits::take_next_signal(int32_t n_rows) {
    ggml_tensor *signal = passes_.io().signal;
    const Placement &placement = passes_.model().placement();
    if (placement.layers.front() == placement.head) {
        ggml_backend_tensor_copy(io_.next_signal, signal);
        return;
    }
    std::vector<char> rows(static_cast<size_t>(n_rows) * signal->nb[1]);
    ggml_backend_tensor_get(io_.next_signal, rows.data(), 0, rows.size());
    ggml_backend_tensor_set(signal, rows.data(), 0, rows.size());
}

void StepLogits::clear_signal() {
    for (ggml_tensor *signal : {passes_.io().signal, io_.next_signal}) {
        if (signal) {
            ggml_backend_tensor_memset(signal, 0, 0, ggml_nbytes(signal));
        }
    }
}

void StepLogits::move_signal(int32_t from, int32_t to, int32_t n) {
    ggml_tensor *signal = passes_.io().signal;
    const size_t row = signal->nb[1];
    std::vector<char> rows(static_cast<size_t>(n) * row);
    ggml_backend_tensor_get(signal, rows.data(), static_cast<size_t>(from) * row, rows.size());
    ggml_backend_tensor_set(signal, rows.data(), static_cast<size_t>(to) * row, rows.size());
}

} // namespace dg
