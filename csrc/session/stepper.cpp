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
        logits_.set(processed, n_rows);
        logits_.make_signal(n_rows);
    } else {
        logits_.clear_signal();
    }
    if (!out) {
        logits_.denoise(canvas, {n_rows}, nullptr);
        std::copy_n(logits_.rows(), int64_t{n_rows} * n_vocab(), logits);
        return;
    }
    std::vector<uint8_t> wanted(static_cast<size_t>(n_rows));
    for (int32_t i = 0; i < n_out; ++i) {
        wanted[static_cast<size_t>(out[i])] = 1;
    }
    logits_.denoise(canvas, {n_rows}, wanted.data());
    for (int32_t i = 0; i < n_out; ++i) {
        logits = std::copy_n(logits_.rows() + int64_t{out[i]} * n_vocab(), n_vocab(), logits);
    }
}

} // namespace dg
