#include "session/kernel_device.h"

#include "base/error.h"
#include "cuda/host_device.h"

#include <cstring>

namespace dg {
namespace {

constexpr int NO_CUDA = -1;

bool is_on_cpu(const Model &model) { return model.placement().head == model.devices().cpu(); }

// CUDA's number of the main device.
int cuda_index(const Model &model) {
#ifdef DG_CUDA_KERNELS
    const ggml_backend_dev_t device = model.devices()[static_cast<size_t>(model.placement().head)].handle;
    const ggml_backend_reg_t backend = ggml_backend_dev_backend_reg(device);
    if (std::strcmp(ggml_backend_reg_name(backend), "CUDA") == 0) {
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
    if (!cpu && cuda_index(model) == NO_CUDA) {
        const std::string &name = model.devices()[static_cast<size_t>(model.placement().head)].name;
        throw Error(DG_ERROR_UNSUPPORTED, "sampler: there are kernels for CUDA, and their bodies on the CPU; device " +
                                              name + " samples with ggml's operators");
    }
    return DG_SAMPLER_KERNELS;
}

std::unique_ptr<cuda::Device> make_kernel_device(const Model &model) {
#ifdef DG_CUDA_KERNELS
    if (!is_on_cpu(model)) {
        return cuda::make_cuda_device(cuda_index(model));
    }
#else
    (void)model;
#endif
    return std::make_unique<cuda::HostDevice>();
}

const void *gathered_embedding(const Model &model, cuda::RowType &type) {
    const ggml_tensor *embedding = model.weights().token_embd;
    switch (embedding->type) {
        case GGML_TYPE_F32: type = cuda::RowType::F32; break;
        case GGML_TYPE_F16: type = cuda::RowType::F16; break;
        case GGML_TYPE_BF16: type = cuda::RowType::BF16; break;
        case GGML_TYPE_Q8_0: type = cuda::RowType::Q8_0; break;
        case GGML_TYPE_Q4_K: type = cuda::RowType::Q4_K; break;
        case GGML_TYPE_Q5_K: type = cuda::RowType::Q5_K; break;
        case GGML_TYPE_Q6_K: type = cuda::RowType::Q6_K; break;
        default: return nullptr;
    }
    return embedding->data;
}

} // namespace dg
