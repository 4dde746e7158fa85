// Which positions the cache holds, and which of them a row sees: for masks of ggml's attention and for the CPU's own.
// Static: each level of the kernels has its own (cpu/kernels/table.h).
#pragma once

#include <cstdint>

namespace dg {

// Position p is in slot p % n_slots. The position that a slot holds when the last one written is end - 1: the greatest
// below `end` that maps to the slot. What a truncation has left behind it is stale.
[[maybe_unused]] static constexpr int32_t position_in_slot(int32_t slot, int32_t n_slots, int32_t end) {
    const int32_t last = end - 1;
    return end <= n_slots ? slot : last - ((last - slot) % n_slots + n_slots) % n_slots;
}

// Positions from oldest to newest.
struct Span {
    int32_t oldest;
    int32_t newest;
};

// What a row at `position` sees, of a segment whose last position is end - 1. `window`: of a sliding layer; 0: none.
// Causal rows look back from themselves, and no further on. The rows of a canvas see it whole and have no window inside
// it: all look back from its first position, `n_past`.
[[maybe_unused]] static constexpr Span seen_by(int32_t position, bool causal, int32_t n_past, int32_t end,
                                               int32_t window) {
    const int32_t first_hidden = (causal ? position : n_past) - window;
    return {window > 0 && first_hidden >= 0 ? first_hidden + 1 : 0, causal ? position : end - 1};
}

} // namespace dg
