// What this folder offers, compiled for one level: DG_LEVEL is its name, and the namespace that everything here is in.
// The compiler may use the level's instructions anywhere in these files, so nothing of theirs may be shared with code
// of other levels: no inline function or template from outside that could be left as a symbol of its own
// (tests/test_levels.py looks for such symbols).
#pragma once

#include "cpu/kernels.h"

namespace dg::DG_LEVEL {

// The table of this level.
const Kernels *kernels();

Form form_for(ggml_type type);
int64_t block_floats(int64_t depth, Form form);
int64_t product_scratch(int64_t n_embd, int64_t n_ff_exp);
int64_t attention_scratch(int64_t head_dim);
int64_t self_conditioning_scratch(int64_t n_embd);

// Column blocks of rows of floats; column blocks as integers.
void run_pack(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_quantize(ggml_tensor *dst, int thread, int n_threads, void *userdata);
// w times x; gelu_tanh(gate x) * (up x); scales * (A x); the experts that each row was routed to; the sum of a row's
// experts.
void run_multiply(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_gated(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_low(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_experts(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_combine(ggml_tensor *dst, int thread, int n_threads, void *userdata);

void run_norm(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_attention(ggml_tensor *dst, int thread, int n_threads, void *userdata);

// The self-conditioning signal: a first look at each row, weights of a chunk of the vocabulary, their product with the
// embedding, the signal of flat rows.
RowState look_at(const float *z, const ggml_tensor *embedding, float longest, int64_t n_most, float *row,
                 float *signal);
void run_look(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_weigh(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_add(ggml_tensor *dst, int thread, int n_threads, void *userdata);
void run_finish(ggml_tensor *dst, int thread, int n_threads, void *userdata);

LogitSums sum_logits(const float *z, int32_t n, float greatest);
float scale_logits(float *z, int32_t n, float t);

} // namespace dg::DG_LEVEL
