// Matrix products and experts on the CPU, as ggml custom operators: weights are decoded where they lie in the file,
// some rows at a time, and multiplied with blocks of columns, in float32 (kernels/tile.h) or in integers
// (kernels/integers.h). Nothing is repacked at load. Which thread computes what never changes a bit.
#pragma once

#include "cpu/kernels.h"
#include "cpu/work.h"

#include "ggml.h"

#include <cstdint>

namespace dg {

// What a matrix is multiplied with; its forms are made when a product wants them, once for all matrices that share it.
struct Operand {
    ggml_tensor *rows = nullptr; // [depth, n]
    int64_t n = 0;
    ggml_tensor *made[N_FORMS] = {}; // column blocks, by form
};

// Builds operators into one graph. `scratch`: F32 [floats of a thread, threads]; shared by all operators, since they
// run one after the other.
class ProductOps {
  public:
    ProductOps(ggml_context *ctx, const Kernels &kernels, WorkList &work, ggml_tensor *scratch)
        : ctx_(ctx), kernels_(kernels), work_(work), scratch_(scratch) {}

    // w [depth, n_out] times x -> [n_out, n]; softcapped where softcap > 0. `low`: what is added to the product; null:
    // nothing.
    ggml_tensor *multiply(ggml_tensor *w, Operand &x, float softcap = 0.0f, const LowRank *low = nullptr) const;
    // gelu_tanh(gate x) * (up x)
    Operand gated(ggml_tensor *gate, ggml_tensor *up, Operand &x, const LowRank *low_gate, const LowRank *low_up) const;
    // x [n_embd, n] through the experts that `selected` I32 [n_used, n] names -> [n_embd, n]: the sum of their outputs,
    // times `weights` F32 [n_used, n]. Either gate_up [n_embd, 2 X, E] or gate and up [n_embd, X, E].
    // `low_gate_up`: beside gate and up together, however they are spelled.
    ggml_tensor *experts(ggml_tensor *x, ggml_tensor *selected, ggml_tensor *weights, ggml_tensor *gate_up,
                         ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down, const LowRank *low_gate_up,
                         const LowRank *low_down) const;

  private:
    ggml_context *ctx_;
    const Kernels &kernels_;
    WorkList &work_;
    ggml_tensor *scratch_;

    Form form_for(const ggml_tensor *w) const;
    Form form_for(const ggml_tensor *w, const ggml_tensor *other) const;
    ggml_tensor *blocks(Operand &x, Form form) const;
    ggml_tensor *low_blocks(const LowRank &low, Operand &x) const;
};

} // namespace dg
