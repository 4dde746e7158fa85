// Which way to do the work between two passes a session gets.
#pragma once

#include "session/stepper.h"

#include <memory>

namespace dg {

// For a model placed as `model` is: `asked`, or what AUTO comes to there. Throws UNSUPPORTED for kernels that the main
// device, or a model of this shape, cannot have, ARGUMENT for what is no dg_sampler.
dg_sampler resolve_sampler(const Model &model, int32_t asked);

// `sampler`: resolved for the model of `passes`, which outlives it and is not asked for anything yet.
std::unique_ptr<Stepper> make_stepper(Passes &passes, const Model &model, dg_sampler sampler);

} // namespace dg
