#include "session/stepper.h"

#include <algorithm>
#include <numeric>

namespace dg {

void Stepper::begin(const std::vector<CanvasStart> &canvases) {
    rows_.clear();
    for (const CanvasStart &canvas : canvases) {
        rows_.push_back(canvas.n_rows);
    }
    kept_ = rows_;
    placed_.resize(canvases.size());
    std::iota(placed_.begin(), placed_.end(), 0);
    logits_.clear_signal();
    signal_stands_ = true;
    start(canvases);
}

void Stepper::place(const std::vector<int32_t> &which) {
    if (!signal_stands_) {
        make_signal();
        signal_stands_ = true;
    }
    close_up(which);
    placed_ = which;
    rows_ = kept_;
}

void Stepper::narrow(int32_t index, int32_t n) {
    shorten(index, n);
    kept_[static_cast<size_t>(index)] = n;
}

std::vector<int32_t> Stepper::segments() const {
    std::vector<int32_t> rows;
    for (const int32_t i : placed_) {
        rows.push_back(rows_[static_cast<size_t>(i)]);
    }
    return rows;
}

int32_t Stepper::placed_rows() const {
    const std::vector<int32_t> rows = segments();
    return std::accumulate(rows.begin(), rows.end(), 0);
}

std::vector<uint8_t> Stepper::free_rows() const {
    std::vector<uint8_t> all;
    for (const int32_t i : placed_) {
        for (int32_t row = 0; row < rows_of(i); ++row) {
            all.push_back(rules_of(i).is_pinned(row) ? 0 : 1);
        }
    }
    return all;
}

bool Stepper::is_placed(int32_t index) const {
    return std::find(placed_.begin(), placed_.end(), index) != placed_.end();
}

void Stepper::denoise(const int32_t *canvas, int32_t n_rows, const float *processed, const int32_t *out, int32_t n_out,
                      float *logits) {
    if (processed) {
        logits_.make_signal(processed, n_rows);
    } else {
        logits_.clear_signal();
    }
    if (!out) {
        logits_.denoise(canvas, {n_rows}, nullptr, [&](const Pass &pass) {
            logits_.fetch(pass.first_logit, pass.n_logits(), logits + int64_t{pass.first_row} * n_vocab());
        });
        return;
    }
    std::vector<uint8_t> wanted(static_cast<size_t>(n_rows));
    for (int32_t i = 0; i < n_out; ++i) {
        wanted[static_cast<size_t>(out[i])] = 1;
    }
    std::vector<int32_t> place(static_cast<size_t>(n_rows)); // of each row, among those with logits
    std::vector<float> some;
    logits_.denoise(canvas, {n_rows}, wanted.data(), [&](const Pass &pass) {
        some.resize(static_cast<size_t>(pass.n_logits()) * static_cast<size_t>(n_vocab()));
        logits_.fetch(pass.first_logit, pass.n_logits(), some.data());
        for (int32_t i = 0; i < pass.n_logits(); ++i) {
            place[static_cast<size_t>(pass.logit_row(i))] = i;
        }
    });
    for (int32_t i = 0; i < n_out; ++i) {
        const int64_t at = place[static_cast<size_t>(out[i])];
        logits = std::copy_n(some.data() + at * n_vocab(), n_vocab(), logits);
    }
}

} // namespace dg
