// csrc/model/local_devices.h for tests/test_local_devices.py: ctypes calls it with a device a byte ('i' integrated, 'c'
// a card) and one address for each, 0 where none is reported; returns a bit for each device that counts.
#include "model/local_devices.h"

extern "C" unsigned usable(const char *kinds, const int *addresses, int n) {
    std::vector<dg::LocalDevice> all;
    for (int i = 0; i < n; ++i) {
        all.push_back({kinds[i] == 'i', addresses[i] == 0 ? "" : std::to_string(addresses[i])});
    }
    unsigned bits = 0;
    for (const size_t i : dg::usable_devices(all)) {
        bits |= 1U << i;
    }
    return bits;
}
