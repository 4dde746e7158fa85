// The sampler's options: what they may be, and what they come to at a step.
#pragma once

#include "diffgguf.h"

#include <cstdint>

namespace dg {

// The released values, for files that hold none (generation_config.json of the released checkpoint).
dg_sampling released_sampling();

// Throws DG_ERROR_ARGUMENT naming option, value and range.
void check_sampling(const dg_sampling &sampling);

// Temperature of a step that counts from 0: t_min + (t_max - t_min) * n / N with n = N - step, so the last step of the
// schedule runs at t_min + (t_max - t_min) / N. constexpr: nvcc compiles it for the device as well (base/random.h).
constexpr double temperature(double t_min, double t_max, int32_t steps, int32_t step) {
    return t_min + (t_max - t_min) * (static_cast<double>(steps - step) / static_cast<double>(steps));
}
inline double temperature(const dg_sampling &s, int32_t step) { return temperature(s.t_min, s.t_max, s.steps, step); }

// The number of steps there can be: N, or the cap when it is lower.
int32_t step_count(const dg_sampling &sampling);

// DG_ERROR_INTERNAL, for a row that holds NaN or has no finite maximum.
[[noreturn]] void throw_unsound_row();

} // namespace dg
