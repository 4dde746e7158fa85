#include "model/device_weights.h"

#include "base/error.h"

#include "ggml-alloc.h"

#include <algorithm>

namespace dg {
namespace {

constexpr size_t PIECE = 8 << 20; // of an upload; the experts of a layer are hundreds of megabytes

} // namespace

void upload(ggml_tensor *tensor, const void *data, size_t offset, size_t size) {
    for (size_t done = 0; done < size; done += PIECE) {
        ggml_backend_tensor_set(tensor, static_cast<const char *>(data) + done, offset + done,
                                std::min(PIECE, size - done));
    }
}

DeviceWeights::DeviceWeights(const Devices &devices, size_t n_tensors) : devices_(devices) {
    for (size_t i = 0; i <= devices.size(); ++i) {
        ggml_init_params params = {};
        params.mem_size = n_tensors * ggml_tensor_overhead();
        params.no_alloc = true;
        contexts_.emplace_back(ggml_init(params));
        if (!contexts_.back()) {
            throw Error(DG_ERROR_MEMORY, format("%zu bytes for tensor headers were refused", params.mem_size));
        }
    }
}

DeviceWeights::~DeviceWeights() {
    const Devices::Turn turn(devices_);
    buffers_.clear();
}

ggml_tensor *DeviceWeights::add(int32_t device, const ggml_tensor *tensor, const void *data) {
    ggml_tensor *copy = ggml_dup_tensor(contexts_[static_cast<size_t>(device)].get(), tensor);
    ggml_set_name(copy, ggml_get_name(tensor));
    sources_.push_back({copy, data, {}});
    return copy;
}

ggml_tensor *DeviceWeights::add(int32_t device, std::vector<float> values, int64_t ne0, int64_t ne1) {
    ggml_tensor *tensor = ggml_new_tensor_2d(contexts_[static_cast<size_t>(device)].get(), GGML_TYPE_F32, ne0, ne1);
    sources_.push_back({tensor, nullptr, std::move(values)});
    return tensor;
}

ggml_tensor *DeviceWeights::add(int32_t device, int64_t ne0, int64_t ne1, int64_t ne2, ggml_type type) {
    return ggml_new_tensor_3d(contexts_[static_cast<size_t>(device)].get(), type, ne0, ne1, ne2);
}

void DeviceWeights::load(const char *what) {
    for (size_t i = 0; i < contexts_.size(); ++i) {
        ggml_context *ctx = contexts_[i].get();
        if (!ggml_get_first_tensor(ctx)) {
            continue;
        }
        const auto device = static_cast<int32_t>(i);
        buffers_.push_back(devices_.allocate(ctx, device, what));
        ggml_backend_buffer_set_usage(buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    for (const Source &source : sources_) {
        upload(source.tensor, source.data ? source.data : source.values.data(), 0, ggml_nbytes(source.tensor));
    }
    sources_.clear();
}

size_t DeviceWeights::bytes() const {
    size_t n = 0;
    for (int32_t device = 0; device <= devices_.cpu(); ++device) {
        n += bytes(device);
    }
    return n;
}

size_t DeviceWeights::bytes(int32_t device) const { return tensor_bytes(contexts_[static_cast<size_t>(device)].get()); }

} // namespace dg
