#include "cpu/norm.h"

namespace dg {

ggml_tensor *norm_op(ggml_context *ctx, const Kernels &kernels, WorkList &list, ggml_tensor *x, ggml_tensor *weight,
                     ggml_tensor *add, float scale, float epsilon) {
    auto *work = add_work<NormWork>(list);
    work->scale = scale;
    work->epsilon = epsilon;
    work->weighted = weight != nullptr;
    work->added = add != nullptr;
    std::vector<ggml_tensor *> args = {x};
    for (ggml_tensor *t : {weight, add}) {
        if (t) {
            args.push_back(t);
        }
    }
    return ggml_custom_4d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1], x->ne[2], 1, args.data(),
                          static_cast<int>(args.size()), kernels.norm, GGML_N_TASKS_MAX, work);
}

} // namespace dg
