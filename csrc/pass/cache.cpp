#include "pass/cache.h"

#include "base/error.h"
#include "base/positions.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>

namespace dg {

KvCache::KvCache(const Model &model, const SessionFigures &figures, bool allocate)
    : window_(figures.sliding_window), slots_full_(figures.slots(false)), slots_sliding_(figures.slots(true)) {
    const std::vector<LayerWeights> &layers = model.weights().layers;
    const Devices &devices = model.devices();
    ggml_init_params params = {};
    params.mem_size = layers.size() * 2 * ggml_tensor_overhead();
    params.no_alloc = true;
    for (size_t i = 0; i <= devices.size(); ++i) {
        contexts_.emplace_back(ggml_init(params));
        if (!contexts_.back()) {
            throw Error(DG_ERROR_MEMORY, "memory for the cache's headers was refused");
        }
    }
    for (size_t i = 0; i < layers.size(); ++i) {
        const LayerWeights &weights = layers[i];
        const int64_t width = weights.head_dim * weights.n_head_kv;
        figures.slot_bytes(weights.head_dim, weights.n_head_kv); // throws
        ggml_context *ctx = contexts_[static_cast<size_t>(model.placement().cache[i])].get();
        CacheLayer layer;
        layer.sliding = weights.sliding;
        layer.k = ggml_new_tensor_2d(ctx, figures.type_kv, width, slots(weights.sliding));
        layer.v = ggml_new_tensor_2d(ctx, figures.type_kv, width, slots(weights.sliding));
        layers_.push_back(layer);
    }
    for (size_t i = 0; i < contexts_.size(); ++i) {
        ggml_context *ctx = contexts_[i].get();
        if (!ggml_get_first_tensor(ctx)) {
            continue;
        }
        const auto device = static_cast<int32_t>(i);
        const std::string what = format("the KV cache (n_ctx %d)", figures.n_ctx);
        devices.check_sizes(ctx, device, what);
        bytes_ += ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, devices.buffer_type(device));
        if (allocate) {
            buffers_.push_back(devices.allocate(ctx, device, what));
            // A masked NaN would still spoil the sums.
            ggml_backend_buffer_clear(buffers_.back().get(), 0);
        }
    }
}

size_t KvCache::bytes_on(size_t device) const { return tensor_bytes(contexts_[device].get()); }

int32_t KvCache::position(bool sliding, int32_t slot, int32_t end) const {
    return position_in_slot(slot, slots(sliding), end);
}

Pass KvCache::furthest(const Pass &pass) const {
    int32_t room = slots_full_;
    for (const int32_t rows : pass.segments) {
        const int32_t end = pass.end(rows);
        for (const bool sliding : {false, true}) {
            room = std::min(room, longest_in_view(end, slots(sliding), slots_full_) - end);
        }
    }
    Pass furthest = pass;
    furthest.n_past += room;
    return furthest;
}

bool KvCache::holds_window_before(int32_t n) const {
    const int32_t oldest_needed = seen_by(n, true, n, n, window_).oldest;
    const int32_t oldest_held = std::max(0, high_ - slots_sliding_);
    return oldest_needed >= oldest_held;
}

} // namespace dg
