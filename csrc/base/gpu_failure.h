// A GPU that reports an error which is not about memory is lost to the process: CUDA refuses everything until it ends.
#pragma once

#include "base/error.h"

#include <string>

namespace dg {

// Whether that has happened.
bool has_gpu_failed();
// It has. What to throw.
Error gpu_failure(const std::string &reason);

} // namespace dg
