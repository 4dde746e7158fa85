#include "base/exponential.h"
#include "cpu/kernels/table.h"

#include <algorithm>
#include <limits>

namespace dg::DG_LEVEL {
namespace {

constexpr int32_t ACCUMULATORS = 8;

} // namespace

// Sums over one block of x = max(z - greatest, EXP_FLOOR), in ACCUMULATORS float accumulators. Terms with x = 0 are
// counted apart: in a lane that holds a 1, what is below 6e-8 would vanish, which biased the entropy of a confident row
// by -3e-7 and that of a budget of 36 rows by -1.2e-5, enough to accept another row than the reference does.
LogitSums sum_logits(const float *z, int32_t n, float greatest) {
    float weight[ACCUMULATORS] = {};
    float moment[ACCUMULATORS] = {};
    float n_greatest[ACCUMULATORS] = {};
    int32_t i = 0;
    for (; i + ACCUMULATORS <= n; i += ACCUMULATORS) {
        for (int32_t lane = 0; lane < ACCUMULATORS; ++lane) {
            const float x = std::max(z[i + lane] - greatest, EXP_FLOOR);
            const float one = x == 0.0f ? 1.0f : 0.0f;
            // exp_negative(0) is 1 exactly, and what lies at the floor counts for nothing.
            const float e = x > EXP_FLOOR ? exp_negative(x) - one : 0.0f;
            n_greatest[lane] += one;
            weight[lane] += e;
            moment[lane] += x * e;
        }
    }
    for (; i < n; ++i) {
        const float x = std::max(z[i] - greatest, EXP_FLOOR);
        const float one = x == 0.0f ? 1.0f : 0.0f;
        const float e = x > EXP_FLOOR ? exp_negative(x) - one : 0.0f;
        n_greatest[i % ACCUMULATORS] += one;
        weight[i % ACCUMULATORS] += e;
        moment[i % ACCUMULATORS] += x * e;
    }
    LogitSums sums;
    for (int32_t lane = 0; lane < ACCUMULATORS; ++lane) {
        sums.weight += static_cast<double>(weight[lane]) + static_cast<double>(n_greatest[lane]);
        sums.moment += static_cast<double>(moment[lane]);
    }
    int32_t nans = 0;
    for (int32_t k = 0; k < n; ++k) {
        nans += z[k] != z[k];
    }
    sums.has_nan = nans > 0;
    return sums;
}

// Divides by t and returns the greatest; a NaN anywhere makes the sum NaN, which draw_row finds.
float scale_logits(float *z, int32_t n, float t) {
    float greatest[ACCUMULATORS];
    std::fill(greatest, greatest + ACCUMULATORS, -std::numeric_limits<float>::infinity());
    int32_t i = 0;
    for (; i + ACCUMULATORS <= n; i += ACCUMULATORS) {
        for (int32_t lane = 0; lane < ACCUMULATORS; ++lane) {
            const float value = z[i + lane] / t;
            z[i + lane] = value;
            greatest[lane] = value > greatest[lane] ? value : greatest[lane];
        }
    }
    for (; i < n; ++i) {
        z[i] /= t;
        greatest[0] = z[i] > greatest[0] ? z[i] : greatest[0];
    }
    float most = greatest[0];
    for (int32_t lane = 1; lane < ACCUMULATORS; ++lane) {
        most = std::max(most, greatest[lane]);
    }
    return most;
}

} // namespace dg::DG_LEVEL
