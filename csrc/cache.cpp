#include "cache.h"

#include "error.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cinttypes>

namespace dg {

KvCache::KvCache(const Model &model, int32_t n_ctx, int32_t largest_pass, ggml_type type, bool allocate)
    : window_(model.config().sliding_window), slots_full_(n_ctx),
      slots_sliding_(
          static_cast<int32_t>(std::min<int64_t>(n_ctx, int64_t{model.config().sliding_window} - 1 + largest_pass))) {
    const std::vector<LayerWeights> &layers = model.weights().layers;
    ggml_init_params params = {};
    params.mem_size = layers.size() * 2 * ggml_tensor_overhead();
    params.no_alloc = true;
    context_.reset(ggml_init(params));
    if (!context_) {
        throw Error(DG_ERROR_MEMORY, "memory for the cache's headers was refused");
    }
    for (const LayerWeights &weights : layers) {
        const int64_t width = weights.head_dim * weights.n_head_kv;
        if (weights.head_dim % ggml_blck_size(type) != 0) {
            throw Error(DG_ERROR_UNSUPPORTED,
                        format("type_kv %s needs heads of a multiple of %" PRId64 ", this file has %" PRId64,
                               ggml_type_name(type), ggml_blck_size(type), weights.head_dim));
        }
        CacheLayer layer;
        layer.sliding = weights.sliding;
        layer.k = ggml_new_tensor_2d(context_.get(), type, width, slots(weights.sliding));
        layer.v = ggml_new_tensor_2d(context_.get(), type, width, slots(weights.sliding));
        layers_.push_back(layer);
    }
    bytes_ = ggml_backend_alloc_ctx_tensors_from_buft_size(context_.get(), ggml_backend_cpu_buffer_type());
    if (allocate) {
        buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_cpu_buffer_type()));
        if (!buffer_) {
            throw Error(DG_ERROR_MEMORY, format("%zu bytes for the KV cache were refused (n_ctx %d)", bytes_, n_ctx));
        }
    }
}

int32_t KvCache::position(bool sliding, int32_t slot, int32_t end) const {
    const int32_t n = slots(sliding);
    if (end <= n) {
        return slot;
    }
    const int32_t last = end - 1;
    return last - ((last - slot) % n + n) % n;
}

bool KvCache::holds_window_before(int32_t n) const {
    const int32_t oldest_needed = std::max(0, n - (window_ - 1));
    const int32_t oldest_held = std::max(0, high_ - slots_sliding_);
    return oldest_needed >= oldest_held;
}

} // namespace dg
