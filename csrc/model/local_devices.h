// Which of this machine's devices a model may lie on, of those that all backends together report. A pure function, so
// that it can be tested where there is none of them.
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <vector>

namespace dg {

struct LocalDevice {
    bool is_integrated; // a GPU in the processor, which works in the processor's memory and at its bandwidth
    std::string id;     // where it is plugged in, as backends report it; empty where they do not
};

// Indices into `all`, in order. Two backends that were built in (CUDA and Vulkan, say) report one card twice: the first
// one counts, since a model on both would reckon with the card's memory twice. An integrated GPU beside a card would
// get a share of the layers by its "free" memory, which is the machine's, and be several times slower with it: it
// counts only where there is no card.
inline std::vector<size_t> usable_devices(const std::vector<LocalDevice> &all) {
    bool has_card = false;
    for (const LocalDevice &device : all) {
        has_card = has_card || !device.is_integrated;
    }
    std::vector<size_t> usable;
    std::set<std::string> seen;
    for (size_t i = 0; i < all.size(); ++i) {
        if (has_card && all[i].is_integrated) {
            continue;
        }
        if (all[i].id.empty() || seen.insert(all[i].id).second) {
            usable.push_back(i);
        }
    }
    return usable;
}

} // namespace dg
