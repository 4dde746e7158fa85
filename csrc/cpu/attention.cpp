#include "cpu/attention.h"

namespace dg {

ggml_tensor *attention_op(ggml_context *ctx, const Kernels &kernels, WorkList &list, ggml_tensor *scratch,
                          ggml_tensor *q, ggml_tensor *k, ggml_tensor *v, int64_t n_head_kv, const Visible &visible) {
    auto *work = add_work<AttentionWork>(list);
    work->visible = visible;
    work->n_head_kv = n_head_kv;
    return custom(ctx, Part::ATTENTION, GGML_TYPE_F32, q->ne[0] * q->ne[1], q->ne[2], {q, k, v, scratch},
                  kernels.attend, work);
}

} // namespace dg
