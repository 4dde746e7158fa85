#include "base/gpu_failure.h"

#include <atomic>

namespace dg {
namespace {

std::atomic<bool> failed{false};

} // namespace

bool has_gpu_failed() { return failed.load(std::memory_order_relaxed); }

Error gpu_failure(const std::string &reason) {
    failed.store(true, std::memory_order_relaxed);
    return Error(DG_ERROR_DEVICE,
                 "the GPU failed: " + reason +
                     "; this process cannot use it any more, models on the CPU (n_gpu_layers=0) go on");
}

} // namespace dg
