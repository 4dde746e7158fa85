#include "sample/sampling.h"

#include "base/error.h"

#include <algorithm>
#include <cmath>

namespace dg {

dg_sampling released_sampling() {
    dg_sampling sampling = {};
    sampling.steps = 48;
    sampling.max_steps = 0;
    sampling.stability_threshold = 1;
    sampling.t_min = 0.4;
    sampling.t_max = 0.8;
    sampling.entropy_bound = 0.1;
    sampling.confidence_threshold = 0.005;
    return sampling;
}

void check_sampling(const dg_sampling &s) {
    const auto check_count = [](const char *name, int32_t value, int32_t least) {
        if (value < least || value > 1000000) {
            throw Error(DG_ERROR_ARGUMENT, format("%s is %d: it must be from %d to 1000000", name, value, least));
        }
    };
    const auto check_real = [](const char *name, double value, bool zero_allowed) {
        if (!std::isfinite(value) || value < 0.0 || (!zero_allowed && value == 0.0)) {
            throw Error(DG_ERROR_ARGUMENT,
                        format("%s is %g: it must be a finite number %s 0", name, value, zero_allowed ? ">=" : ">"));
        }
    };
    check_count("steps", s.steps, 1);
    check_count("max_steps", s.max_steps, 0);
    check_count("stability_threshold", s.stability_threshold, 0);
    check_real("t_min", s.t_min, true);
    check_real("t_max", s.t_max, false);
    check_real("entropy_bound", s.entropy_bound, true);
    check_real("confidence_threshold", s.confidence_threshold, true);
    if (s.t_max < s.t_min) {
        throw Error(DG_ERROR_ARGUMENT, format("t_max is %g: it must be at least t_min, %g", s.t_max, s.t_min));
    }
    if (s.t_min == 0.0 && s.t_max / s.steps < 1e-6) {
        throw Error(DG_ERROR_ARGUMENT, format("t_max is %g: the last step's temperature would be 0", s.t_max));
    }
}

int32_t step_count(const dg_sampling &s) { return s.max_steps > 0 ? std::min(s.steps, s.max_steps) : s.steps; }

void throw_unsound_row() { throw Error(DG_ERROR_INTERNAL, "a row of logits holds NaN or has no finite maximum"); }

} // namespace dg
