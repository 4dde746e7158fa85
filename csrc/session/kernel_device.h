// Which devices the sampler's own kernels run on (csrc/cuda), and what of them a session may ask for.
#pragma once

#include "cuda/device_loop.h"
#include "model/model.h"

#include <memory>

namespace dg {

// Where the sampler's work on a step is done, for a model placed as `model` is: `asked`, or what AUTO comes to there.
// Throws UNSUPPORTED for kernels that the main device, or a model of this shape, cannot have, ARGUMENT for what is no
// dg_sampler.
dg_sampler resolve_sampler(const Model &model, int32_t asked);

// The main device's: a CUDA device, or the CPU, which runs their bodies serially.
std::unique_ptr<cuda::Device> make_kernel_device(const Model &model);

// What a row of the self-conditioning signal is gathered from; null where the embedding's type has no kernel.
const void *gathered_embedding(const Model &model, cuda::RowType &type);

} // namespace dg
