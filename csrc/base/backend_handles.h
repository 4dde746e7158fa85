// What is held through ggml's backends, given back when nobody needs it any more; but for what a failed GPU holds: to
// free that would fail as well, and end the process.
#pragma once

#include "base/gpu_failure.h"

#include "ggml-backend.h"

#include <memory>

namespace dg {

struct GiveBack {
    void operator()(ggml_backend_buffer_t buffer) const {
        if (ggml_backend_buffer_is_host(buffer) || !has_gpu_failed()) {
            ggml_backend_buffer_free(buffer);
        }
    }
    void operator()(ggml_backend_t backend) const {
        const bool cpu = ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
        if (cpu || !has_gpu_failed()) {
            ggml_backend_free(backend);
        }
    }
    void operator()(ggml_backend_sched_t scheduler) const {
        if (ggml_backend_sched_get_n_backends(scheduler) == 1 || !has_gpu_failed()) {
            ggml_backend_sched_free(scheduler);
        }
    }
};

using BufferPtr = std::unique_ptr<ggml_backend_buffer, GiveBack>;
using BackendPtr = std::unique_ptr<ggml_backend, GiveBack>;
using SchedulerPtr = std::unique_ptr<ggml_backend_sched, GiveBack>;

} // namespace dg
