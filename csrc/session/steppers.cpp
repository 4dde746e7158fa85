#include "session/steppers.h"

#include "base/error.h"
#include "session/host_stepper.h"
#include "session/kernel_stepper.h"
#include "session/operator_stepper.h"

namespace dg {
namespace {

constexpr int NO_CUDA = -1;

bool is_on_cpu(const Model &model) { return model.placement().head == model.devices().cpu(); }

// CUDA's number of the main device.
int cuda_index(const Model &model) {
#ifdef DG_CUDA_KERNELS
    if (is_on_cpu(model)) {
        return NO_CUDA;
    }
    const ggml_backend_dev_t device = model.devices()[static_cast<size_t>(model.placement().head)].handle;
    const ggml_backend_reg_t backend = ggml_backend_dev_backend_reg(device);
    if (model.devices().is_cuda(model.placement().head)) {
        for (size_t i = 0; i < ggml_backend_reg_dev_count(backend); ++i) {
            if (ggml_backend_reg_dev_get(backend, i) == device) {
                return static_cast<int>(i); // ggml counts them as CUDA does
            }
        }
    }
#else
    (void)model;
#endif
    return NO_CUDA;
}

// The main device, which has kernels.
std::unique_ptr<cuda::Device> main_device(const Model &model) {
#ifdef DG_CUDA_KERNELS
    return cuda::make_cuda_device(cuda_index(model));
#else
    throw Error(DG_ERROR_INTERNAL, "kernels without CUDA: " + std::to_string(cuda_index(model)));
#endif
}

bool fits_kernels(const dg_config &c) { return c.n_vocab <= cuda::MAX_VOCAB && c.canvas_length <= cuda::MAX_ROWS; }

} // namespace

dg_sampler resolve_sampler(const Model &model, int32_t asked) {
    const bool cpu = is_on_cpu(model);
    switch (asked) {
        case DG_SAMPLER_AUTO:
            if (cpu) {
                return DG_SAMPLER_HOST;
            }
            return cuda_index(model) != NO_CUDA && fits_kernels(model.config()) ? DG_SAMPLER_KERNELS
                                                                                : DG_SAMPLER_OPERATORS;
        case DG_SAMPLER_HOST:
        case DG_SAMPLER_OPERATORS: return static_cast<dg_sampler>(asked);
        case DG_SAMPLER_KERNELS: break;
        default: throw Error(DG_ERROR_ARGUMENT, format("sampler is %d: it must be one of dg_sampler", asked));
    }
    if (!fits_kernels(model.config())) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    format("sampler: the kernels take vocabularies of up to %d and canvases of up to %d rows; this "
                           "model has %d and %d",
                           cuda::MAX_VOCAB, cuda::MAX_ROWS, model.config().n_vocab, model.config().canvas_length));
    }
    if (cuda_index(model) == NO_CUDA) {
        const std::string where = cpu ? "the CPU samples on the host"
                                      : "device " + model.devices()[static_cast<size_t>(model.placement().head)].name +
                                            " samples with ggml's operators";
        throw Error(DG_ERROR_UNSUPPORTED, "sampler: there are kernels for CUDA; " + where);
    }
    return DG_SAMPLER_KERNELS;
}

std::unique_ptr<Stepper> make_stepper(Passes &passes, const Model &model, dg_sampler sampler) {
    switch (sampler) {
        case DG_SAMPLER_OPERATORS: return std::make_unique<OperatorStepper>(passes);
        case DG_SAMPLER_KERNELS:
            return std::make_unique<KernelStepper>(passes, [&model] { return main_device(model); });
        default: return std::make_unique<HostStepper>(passes);
    }
}

} // namespace dg
