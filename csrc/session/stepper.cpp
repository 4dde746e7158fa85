#include "session/stepper.h"

#include <algorithm>

namespace dg {

bool Stepper::is_placed(int32_t index) const {
    return std::find(placed_.begin(), placed_.end(), index) != placed_.end();
}

void Stepper::denoise(const int32_t *canvas, int32_t n_rows, const float *processed, float *logits) {
    if (processed) {
        logits_.set(processed, n_rows);
        logits_.make_signal(n_rows);
    } else {
        logits_.clear_signal();
    }
    logits_.denoise(canvas, {n_rows});
    std::copy_n(logits_.rows(), int64_t{n_rows} * n_vocab(), logits);
}

} // namespace dg
