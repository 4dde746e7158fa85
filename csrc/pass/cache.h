// The KV cache. A row of a layer's K or V is one position: [head_dim * n_head_kv]. Full layers have a slot for every
// position of the context. Sliding layers are rings (SessionFigures::slots): position p has slot p % slots.
//
// The canvas's K and V are written behind the prefix, where the next encoded tokens will go. What they overwrite in a
// ring is older than every window to come.
#pragma once

#include "model/figures.h"
#include "model/model.h"
#include "pass/pass.h"

#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

namespace dg {

struct CacheLayer {
    ggml_tensor *k = nullptr; // [head_dim * n_head_kv, slots]
    ggml_tensor *v = nullptr;
    bool sliding = false;
};

class KvCache {
  public:
    // `allocate` false: sizes only, for predictions.
    KvCache(const Model &model, const SessionFigures &figures, bool allocate);

    const std::vector<CacheLayer> &layers() const { return layers_; }
    int32_t slots(bool sliding) const { return sliding ? slots_sliding_ : slots_full_; }
    size_t bytes() const { return bytes_; }
    size_t bytes_on(size_t device) const;

    int32_t slot(bool sliding, int32_t position) const { return position % slots(sliding); }
    // Rows that ggml's operators read when the last position that a pass wrote is end - 1.
    int32_t view_rows(bool sliding, int32_t end) const { return dg::view_rows(end, slots(sliding)); }
    // Of the passes that read as many rows as `pass` in each segment, the one furthest back: their graphs are its
    // graph.
    Pass furthest(const Pass &pass) const;
    // The position in a slot when the last one written is end - 1: position_in_slot (base/positions.h).
    int32_t position(bool sliding, int32_t slot, int32_t end) const;

    // A pass has written up to `end`.
    void wrote(int32_t end) { high_ = end > high_ ? end : high_; }
    // Whether the window before position n is still there.
    bool holds_window_before(int32_t n) const;
    void clear() { high_ = 0; }

  private:
    int32_t window_;
    int32_t slots_full_;
    int32_t slots_sliding_;
    int32_t high_ = 0; // one past the greatest position ever written since clear()
    size_t bytes_ = 0;
    std::vector<CacheLayer> layers_;
    std::vector<ggml_context_ptr> contexts_; // of each device
    std::vector<BufferPtr> buffers_;
};

} // namespace dg
