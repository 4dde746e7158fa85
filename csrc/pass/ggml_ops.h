// The operators of a pass as ggml's.
#pragma once

#include "pass/ops.h"

namespace dg {

class GgmlOps : public Ops {
  public:
    using Ops::multiply;
    using Ops::Ops;

    ggml_tensor *rows(ggml_tensor *matrix, ggml_tensor *ids) override;
    ggml_tensor *norm(ggml_tensor *x, ggml_tensor *weight, ggml_tensor *add, float scale) override;
    ggml_tensor *multiply(ggml_tensor *weight, Operand &x, float softcap) override;
    ggml_tensor *route(ggml_tensor *router, ggml_tensor *x) override;
    ggml_tensor *gated(ggml_tensor *x, ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down) override;
    ggml_tensor *experts(const LayerWeights &l, ggml_tensor *x, ggml_tensor *selected, ggml_tensor *weights) override;
    ggml_tensor *attend(const Segment &s, const LayerWeights &l, const CacheLayer &cache, ggml_tensor *q) override;

  private:
    bool device_computes(ggml_tensor *node) const;
    ggml_tensor *gelu_mul(ggml_tensor *gate, ggml_tensor *up) const;
    ggml_tensor *multiply_experts(ggml_tensor *weights, ggml_tensor *x, ggml_tensor *selected) const;
    ggml_tensor *low_product(const LowRank &low, ggml_tensor *x) const;
    ggml_tensor *low_experts(const LowRank &low, ggml_tensor *x, ggml_tensor *selected) const;
    ggml_tensor *read_cache(const Segment &s, const LayerWeights &l, ggml_tensor *cache) const;
};

} // namespace dg
