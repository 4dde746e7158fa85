// Weights that are not used where they lie in the file: small tensors made at load, and what goes to a device.
#pragma once

#include "model/devices.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace dg {

// Sends `size` bytes to `offset` of the tensor, in pieces: ggml's RPC copies what it sends.
void upload(ggml_tensor *tensor, const void *data, size_t offset, size_t size);

class DeviceWeights {
  public:
    // `n_tensors`: the most that add() will be called for.
    DeviceWeights(const Devices &devices, size_t n_tensors);
    ~DeviceWeights();
    DeviceWeights(const DeviceWeights &) = delete;
    DeviceWeights &operator=(const DeviceWeights &) = delete;

    // A tensor like `tensor` on a device; `data` must stay until load().
    ggml_tensor *add(int32_t device, const ggml_tensor *tensor, const void *data);
    // A float32 tensor of these values.
    ggml_tensor *add(int32_t device, std::vector<float> values, int64_t ne0, int64_t ne1 = 1);
    // A tensor that the caller fills once it is allocated.
    ggml_tensor *add(int32_t device, int64_t ne0, int64_t ne1, int64_t ne2 = 1, ggml_type type = GGML_TYPE_F32);
    // Allocates all of them and fills them; `what` they are, for messages. Throws MEMORY.
    void load(const char *what = "weights");

    // Bytes of the tensors on a device.
    size_t bytes(int32_t device) const;
    size_t bytes() const;

  private:
    struct Source {
        ggml_tensor *tensor;
        const void *data;
        std::vector<float> values; // what `data` points to, if it is not somebody else's
    };
    const Devices &devices_;
    std::vector<ggml_context_ptr> contexts_; // of each device
    std::vector<BufferPtr> buffers_;
    std::vector<Source> sources_;
};

} // namespace dg
