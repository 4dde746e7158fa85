// What a product needs to know of the adapters beside its matrix. Kernels read it too: no function may stand here.
#pragma once

#include "ggml.h"

namespace dg {

// B (scales * (A x)) is added to what the matrix makes of x. All are float32; see adapter/adapter.h for shapes.
struct LowRank {
    ggml_tensor *a;
    ggml_tensor *b;
    ggml_tensor *scales; // [R], R = a->ne[1]
};

} // namespace dg
