// The three launches of a step (step.h), for the device that makes them all (cuda_device.cu) and for what times each.
#pragma once

#include "cuda/step.h"

#include <cuda_runtime_api.h>

namespace dg::cuda {

// In order on the stream, not waited for. They return what cudaGetLastError says of the launch.
cudaError_t launch_rows(const Step &step, cudaStream_t stream);
cudaError_t launch_canvases(const Step &step, cudaStream_t stream);
cudaError_t launch_gather(const Step &step, cudaStream_t stream); // nothing where there are no candidates

} // namespace dg::cuda
