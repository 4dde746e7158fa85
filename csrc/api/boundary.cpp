#include "api/boundary.h"

#include <algorithm>
#include <cstring>

namespace dg::api {

void write_message(const char *message, char *err, size_t err_size) noexcept {
    if (err && err_size > 0) {
        const size_t n = std::min(std::strlen(message), err_size - 1);
        std::replace_copy_if(
            message, message + n, err, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
        err[n] = '\0';
    }
}

void require(const void *pointer, const char *name) {
    if (!pointer) {
        throw dg::Error(DG_ERROR_ARGUMENT, std::string(name) + " is NULL");
    }
}

} // namespace dg::api
