#include "pass/pass.h"

#include <algorithm>
#include <numeric>

namespace dg {

int32_t Pass::rows() const { return std::accumulate(segments.begin(), segments.end(), 0); }

int32_t Pass::n_logits() const { return logit_rows.empty() ? rows() : static_cast<int32_t>(logit_rows.size()); }

int32_t Pass::logit_row(int32_t i) const { return logit_rows.empty() ? i : logit_rows[static_cast<size_t>(i)]; }

int32_t Pass::end() const { return end(*std::max_element(segments.begin(), segments.end())); }

std::vector<int32_t> rows_with_logits(const uint8_t *wanted, int32_t n, int32_t block) {
    const auto n_wanted = static_cast<int32_t>(std::count(wanted, wanted + n, 1));
    int32_t others = whole_blocks(std::max(1, n_wanted), block) - n_wanted;
    std::vector<int32_t> rows;
    if (n_wanted + others >= n) {
        return rows;
    }
    for (int32_t row = 0; row < n; ++row) {
        if (wanted[row] || others > 0) {
            others -= wanted[row] ? 0 : 1;
            rows.push_back(row);
        }
    }
    return rows;
}

} // namespace dg
