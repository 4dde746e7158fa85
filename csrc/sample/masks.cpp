#include "sample/masks.h"

#include "base/error.h"

#include <bitset>

namespace dg {
namespace {

void append_ids(const uint32_t *mask, int32_t n_vocab, std::vector<int32_t> &ids) {
    for (int32_t first = 0; first < n_vocab; first += 32) {
        const uint32_t word = mask[first / 32];
        for (int32_t bit = 0; word != 0 && bit < 32 && first + bit < n_vocab; ++bit) {
            if (word >> bit & 1U) {
                ids.push_back(first + bit);
            }
        }
    }
}

/** No fewer than a mask has ids: room for all at once. A list that grows by doubling copies itself and touches new
 * memory each time, which for 20 rows of 262,144 ids took most of 39 ms. */
size_t n_ids(const uint32_t *mask, size_t words) {
    size_t n = 0;
    for (size_t i = 0; i < words; ++i) {
        n += std::bitset<32>(mask[i]).count();
    }
    return n;
}

} // namespace

AllowedIds expand_masks(const dg_canvas_rules &rules, int32_t n_rows, int32_t n_vocab) {
    AllowedIds allowed;
    if (rules.n_masks < 0 || (rules.n_masks > 0 && !rules.masks)) {
        throw Error(DG_ERROR_ARGUMENT, format("n_masks is %d, and masks must be there for them", rules.n_masks));
    }
    if (!rules.mask_of_row) {
        return allowed;
    }
    const auto words = static_cast<size_t>((n_vocab + 31) / 32);
    std::vector<size_t> counts;
    for (int32_t k = 0; k < rules.n_masks; ++k) {
        counts.push_back(n_ids(rules.masks + static_cast<size_t>(k) * words, words));
    }
    size_t total = 0;
    for (int32_t row = 0; row < n_rows; ++row) {
        const int32_t k = rules.mask_of_row[row];
        total += k >= 0 && k < rules.n_masks ? counts[static_cast<size_t>(k)] : 0;
    }
    allowed.ids.reserve(total);
    for (int32_t row = 0; row < n_rows; ++row) {
        const int32_t k = rules.mask_of_row[row];
        if (k < -1 || k >= rules.n_masks) {
            throw Error(DG_ERROR_ARGUMENT, format("mask_of_row[%d] is %d: it must be -1 (any id) or below n_masks, %d",
                                                  row, k, rules.n_masks));
        }
        if (k >= 0) {
            const uint32_t *mask = rules.masks + static_cast<size_t>(k) * words;
            const size_t before = allowed.ids.size();
            append_ids(mask, n_vocab, allowed.ids);
            if (allowed.ids.size() == before) {
                throw Error(DG_ERROR_ARGUMENT,
                            format("the mask of row %d is empty: it must be able to take some id", row));
            }
            const int32_t pin = rules.pinned ? rules.pinned[row] : -1;
            if (pin >= 0 && (pin >= n_vocab || (mask[pin / 32] >> (pin % 32) & 1U) == 0)) {
                throw Error(DG_ERROR_ARGUMENT, format("row %d is pinned to %d, which its mask leaves out", row, pin));
            }
        }
        allowed.ends.push_back(static_cast<int32_t>(allowed.ids.size()));
    }
    if (allowed.ids.empty()) {
        allowed.ends.clear();
    }
    return allowed;
}

} // namespace dg
