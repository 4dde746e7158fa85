// The one exception type of the engine. It never crosses the C boundary: api/boundary.h turns it into a status and a
// message.
#pragma once

#include "diffgguf.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

#if defined(__MINGW32__) // its "printf" is Microsoft's old one, which knows no %zu; C++ gets the other
#    define DG_PRINTF(fmt, args) __attribute__((format(gnu_printf, fmt, args)))
#elif defined(__GNUC__)
#    define DG_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#    define DG_PRINTF(fmt, args)
#endif

namespace dg {

class Error : public std::runtime_error {
  public:
    Error(dg_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
    dg_status status() const noexcept { return status_; }

  private:
    dg_status status_;
};

DG_PRINTF(1, 2) inline std::string format(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    va_list again;
    va_copy(again, args);
    const int n = std::vsnprintf(nullptr, 0, fmt, args);
    va_end(args);
    std::string text(n > 0 ? static_cast<size_t>(n) : 0, '\0');
    if (n > 0) {
        std::vsnprintf(text.data(), text.size() + 1, fmt, again);
    }
    va_end(again);
    return text;
}

} // namespace dg
