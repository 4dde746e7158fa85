// Memory and launches of a device, as the loop on it needs them (device_loop.h). There are two: CUDA (cuda_device.cu),
// and the host in the tests, which runs the same bodies serially.
#pragma once

#include "cuda/step.h"

#include <cstddef>
#include <memory>

namespace dg::cuda {

// Calls throw Error: MEMORY when an allocation is refused, DEVICE for what else the device reports.
class Device {
  public:
    virtual ~Device() = default;
    virtual void *allocate(size_t n_bytes) = 0;
    virtual void release(void *memory) noexcept = 0;
    // Complete on return.
    virtual void upload(void *to, const void *from, size_t n_bytes) = 0;
    virtual void download(void *to, const void *from, size_t n_bytes) = 0;
    virtual void move(void *to, const void *from, size_t n_bytes) = 0; // on the device; the ranges may overlap
    // The step's launches; in order with other calls, and not waited for.
    virtual void launch(const Step &step) = 0;
};

// The GPU with CUDA's number `index`.
std::unique_ptr<Device> make_cuda_device(int index);

} // namespace dg::cuda
