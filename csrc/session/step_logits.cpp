#include "session/step_logits.h"

#include "ggml-backend.h"

#include <algorithm>

namespace dg {
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

void StepLogits::denoise(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted,
                         const std::function<void(const Pass &)> &take) {
    passes_.each_pass(ids, segments, wanted, Pass(), [&](const Pass &pass) {
        passes_.compute_pass();
        take(pass);
    });
}

void StepLogits::fetch(int32_t first, int32_t n, float *out) const {
    ggml_backend_tensor_get(io_.logits, out, bytes(first), bytes(n));
}

void StepLogits::store(int32_t first, int32_t n, const float *logits) {
    ggml_backend_tensor_set(io_.logits, logits, bytes(first), bytes(n));
}

void StepLogits::make_signal(int32_t n_rows) {
    if (!passes_.model().config().has_self_conditioning) {
        return;
    }
    const int32_t most = passes_.figures().pass_rows;
    for (int32_t first = 0; first < n_rows; first += most) {
        passes_.compute_signal(first, first, std::min(most, n_rows - first));
    }
    if (io_.next_signal) {
        take_next_signal(n_rows);
    }
}

void StepLogits::make_signal(const float *processed, int32_t n_rows) {
    if (whole_) {
        store(0, n_rows, processed);
        make_signal(n_rows);
        return;
    }
    if (!passes_.model().config().has_self_conditioning) {
        return;
    }
    const int32_t most = passes_.figures().pass_rows;
    for (int32_t first = 0; first < n_rows; first += most) {
        const int32_t n = std::min(most, n_rows - first);
        store(0, n, processed + int64_t{first} * n_vocab());
        passes_.compute_signal(first, 0, n);
    }
    take_next_signal(n_rows);
}

void StepLogits::set_next_signal(const float *signal, int32_t first, int32_t n) {
    const size_t row = io_.next_signal->nb[1];
    ggml_backend_tensor_set(io_.next_signal, signal, static_cast<size_t>(first) * row, static_cast<size_t>(n) * row);
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
