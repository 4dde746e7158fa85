// The sampler's work on a row of logits, made of ggml's operators, for logits that lie on another device than the CPU:
// what depends on the vocabulary stays there, and nine numbers for each row come back. sampler.h is the same for
// logits in this process's memory; a test holds the two together.
//
// Both draw the first id whose cumulative weight reaches u times the row's. Here sums are float32, over blocks of the
// vocabulary as there: where u lies within rounding of a cumulative sum (some 1e-6 of the row's weight), the neighbour
// may be drawn, and a sum that equals it exactly counts as reached. u below 1e-37 and above 1 - 2^-24 are taken for
// these. The argmax is the lowest id among equals in both.
#pragma once

#include "sample/sampler.h"

#include "ggml.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace dg {

// Tensors of the sampler, for at most R rows. Rows of logits may be fewer than those of the pass: what is pinned needs
// none.
struct SampleIo {
    // Of each row of logits.
    ggml_tensor *temperature = nullptr; // F32 [1, R]
    ggml_tensor *uniform = nullptr;     // F32 [1, R]
    ggml_tensor *watched = nullptr;     // I32 [R]
    ggml_tensor *chosen = nullptr;      // I32 [R, 3], results: argmax; block and place in it of the draw
    ggml_tensor *sums = nullptr;        // F32 [R, 6], results: see RowSums
    // Of each row of the pass.
    ggml_tensor *pinned = nullptr;    // I32 [R]: the id of a pinned row; any where it is free
    ggml_tensor *is_pinned = nullptr; // F32 [1, R]: 1 or 0
    ggml_tensor *logits_of = nullptr; // I32 [R]: which row of logits is its own; any where it has none

    // Makes them, without memory.
    void make(ggml_context *ctx, int64_t n_rows);
    static size_t bytes(int64_t n_rows);
};

// What comes back of one row. With x = z - max(z): how often x is 0, and the sum of exp(x) and of x exp(x) over the
// rest.
struct RowSums {
    float ties;
    float rest;
    float moment;

    double weight() const { return static_cast<double>(ties) + static_cast<double>(rest); }
    // False where a logit was NaN or the greatest one was not finite.
    bool sound() const;
    double entropy() const; // nats
};

struct RowResult {
    int32_t argmax;
    int32_t draw;
    RowSums sums;   // at the row's temperature
    RowSums before; // at temperature 1, if asked for; its moment is the watched id's x
    double logprob() const {
        return static_cast<double>(before.moment) - std::log(before.weight());
    } // the watched id's
};

// Nodes that sample_ops adds, at most.
size_t sample_nodes(int64_t n_vocab, int64_t n_rows);
// Bytes of its intermediate tensors, at most.
size_t sample_bytes(int64_t n_vocab, int64_t n_rows);

// Adds the sampler to a graph, over logits [V, n]. `watched`: gives RowResult::before. `draws`: gives the rest, and
// makes the logits the processed ones in place, pins left out.
void sample_ops(ggml_context *ctx, ggml_cgraph *graph, const SampleIo &io, ggml_tensor *logits, bool draws,
                bool watched);

// sum [n_embd, rows of logits] -> [n_embd, n], of the pass's rows: with those of `embedding` where they are pinned.
ggml_tensor *with_pins(ggml_context *ctx, const SampleIo &io, ggml_tensor *sum, ggml_tensor *embedding, int64_t n);

// The results of the first n rows of a graph that was computed.
std::vector<RowResult> read_results(const SampleIo &io, int64_t n);

// What the rows' results come to: argmax, entropy and logprob of `out`, draws of `scratch`. Throws as draw_row does.
void take_rows(const RowResult *results, int32_t n_rows, const RowRules &rules, SamplerScratch &scratch,
               const StepOutput &out);

// The sampler alone, on logits in this process's memory: what a test compares with sampler.h.
std::vector<RowResult> sample_by_graph(const float *z, int32_t n_rows, int32_t n_vocab, float t, const double *uniform);

// u as the sampler above takes it.
float uniform_in_float(double u);

} // namespace dg
