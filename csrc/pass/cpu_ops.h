// The operators of a pass as the CPU's own (csrc/cpu), for a session that has scratch memory for them.
#pragma once

#include "pass/ggml_ops.h"

namespace dg {

// Taking rows is ggml's; and while importance is collected, what these would do in one with their products.
class CpuOps final : public GgmlOps {
  public:
    using GgmlOps::GgmlOps;
    using GgmlOps::multiply;

    ggml_tensor *norm(ggml_tensor *x, ggml_tensor *weight, ggml_tensor *add, float scale) override;
    ggml_tensor *multiply(ggml_tensor *weight, Operand &x, float softcap) override;
    ggml_tensor *gated(ggml_tensor *x, ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down) override;
    ggml_tensor *experts(const LayerWeights &l, ggml_tensor *x, ggml_tensor *selected, ggml_tensor *weights) override;
    ggml_tensor *attend(const Segment &s, const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q) override;

  private:
    ProductOps products() const { return {to_.ctx, *to_.model.kernels(), to_.graph.work, to_.io.scratch}; }
};

} // namespace dg
