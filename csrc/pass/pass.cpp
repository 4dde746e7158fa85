#include "pass/pass.h"

#include <algorithm>
#include <numeric>

namespace dg {

int32_t Pass::rows() const { return std::accumulate(segments.begin(), segments.end(), 0); }

int32_t Pass::end() const { return end(*std::max_element(segments.begin(), segments.end())); }

} // namespace dg
