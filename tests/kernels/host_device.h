// The kernels' bodies on the CPU: a Device whose threads are loops, so that all of the loop on a device, except the
// launches themselves, is tested without a GPU.
#pragma once

#include "cuda/device.h"

namespace dg::cuda {

// The three launches of a step, each of its blocks after the other; `backwards`: the order of threads within a phase
// (block.h).
void run_rows(const Step &step, bool backwards);
void run_canvases(const Step &step, bool backwards);
void run_gather(const Step &step, bool backwards);

class HostDevice : public Device {
  public:
    bool backwards = false;

    void *allocate(size_t n_bytes) override;
    void release(void *memory) noexcept override;
    void upload(void *to, const void *from, size_t n_bytes) override;
    void download(void *to, const void *from, size_t n_bytes) override;
    void move(void *to, const void *from, size_t n_bytes) override;
    void launch(const Step &step) override;
};

} // namespace dg::cuda
