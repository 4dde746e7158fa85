// What the CPU's own operators run, as a table: the inner loops (kernels/) are compiled once for each level of a
// processor's instructions, into a namespace of their own, and which table is used is decided when a model is opened
// (levels.h). Everything outside of kernels/ is compiled for the build's floor.
#pragma once

#include "base/low_rank.h"
#include "cpu/work.h"

#include "ggml.h"

#include <cmath>
#include <cstdint>

namespace dg {

// Over x = logit - greatest.
struct LogitSums {
    double weight = 0.0; // sum of exp(x)
    double moment = 0.0; // sum of x exp(x)
    bool has_nan = false;
};

// What a row's first look finds; for flat rows what the product needs.
struct RowState {
    float greatest;
    float scale; // sqrt(n_embd) / sum
    int32_t flat;
    int32_t reserved;
};

// What activations are made into for a product, by the type of the weights that they meet.
enum class Form : int32_t {
    FLOATS,
    BYTES, // 8-bit integers
    WORDS, // 16-bit integers
    BFLOATS,
};
constexpr int N_FORMS = 4;
constexpr const char *FORM_NAMES[N_FORMS] = {"float32", "8-bit integers", "16-bit integers", "bfloat16"};

// Activations stand in column blocks: `columns` columns side by side, a row of a block after the other (tile.h).
struct Kernels {
    const char *level;
    int64_t columns;

    // What weights of the type are multiplied by.
    Form (*form_for)(ggml_type type);
    // Floats of memory that one column block takes.
    int64_t (*block_floats)(int64_t depth, Form form);
    // Floats of scratch memory that each thread needs.
    int64_t (*product_scratch)(int64_t n_embd, int64_t n_ff_exp);
    int64_t (*attention_scratch)(int64_t head_dim);
    int64_t (*self_conditioning_scratch)(int64_t n_embd);

    // `n` values (a multiple of the type's block) of a row of weights that begins at `data` -> floats.
    void (*decode)(ggml_type type, const void *data, int64_t n, float *out);

    // Operators of a graph; `userdata` is the Work that is named beside each.
    ggml_custom_op_t pack;     // PackWork
    ggml_custom_op_t quantize; // PackWork
    ggml_custom_op_t multiply; // MultiplyWork
    ggml_custom_op_t gated;    // MultiplyWork
    ggml_custom_op_t low;      // LowWork
    ggml_custom_op_t experts;  // ExpertsWork
    ggml_custom_op_t combine;  // Work
    ggml_custom_op_t norm;     // NormWork
    ggml_custom_op_t attend;   // AttentionWork
    ggml_custom_op_t look;     // SelfConditioningWork, as the others
    ggml_custom_op_t weigh;
    ggml_custom_op_t add;
    ggml_custom_op_t finish;

    // A row's first look, alone: what run_look does with it, `n_most` the tokens that are gathered at most, `row` room
    // for one embedding. Not flat: `signal` [n_embd] is made.
    RowState (*look_at)(const float *z, const ggml_tensor *embedding, float longest, int64_t n_most, float *row,
                        float *signal);

    // Sums over logits whose greatest is known. Divides logits by t and returns the greatest, NaN left out.
    LogitSums (*sum_logits)(const float *z, int32_t n, float greatest);
    float (*scale_logits)(float *z, int32_t n, float t);

    int64_t column_blocks(int64_t n) const { return (n + columns - 1) / columns; }
};

// ------------------------------------------------------------------------------------------------------ products

// Values that share a scale where activations are integers.
constexpr int64_t GROUP = 32;
// Columns of an expert that are one task.
constexpr int64_t EXPERT_COLUMNS = 128;

struct PackWork : Work {
    Form form = Form::FLOATS;
};

struct MultiplyWork : Work {
    int64_t n = 0; // columns
    Form form = Form::FLOATS;
    float softcap = 0.0f;
};

struct LowWork : Work {
    const ggml_tensor *scales = nullptr; // [R]
    int64_t n = 0;                       // columns
};

struct ExpertsWork : Work {
    int64_t n_expert = 0;
    int64_t n_ff = 0;
    int64_t n_assigned = 0;
    LowRank gate_up = {}; // what is added to gate and up, [R, 2 X, E], and to down; null without
    LowRank down = {};
    // Floats that each thread has for them behind the outputs: a block of columns, and what A makes of all.
    int64_t low_floats = 0;
    Form form = Form::FLOATS; // what gate and up are multiplied with
    Form form_down = Form::FLOATS;
};

// What the routing operator hands to the experts: who goes where, and in which pieces.
struct Routes {
    int32_t *n_tasks;
    int32_t *tasks; // of three: expert, first in `order`, how many
    int32_t *order; // assignments (row * n_used + place among the row's experts), those of one expert together

    static int64_t most_tasks(int64_t n_expert, int64_t n_assigned) { return n_expert + n_assigned / EXPERT_COLUMNS; }
    static int64_t size(int64_t n_expert, int64_t n_assigned) {
        return 1 + 3 * most_tasks(n_expert, n_assigned) + n_assigned + n_expert + 1;
    }
    Routes(const ggml_tensor *t, int64_t n_expert, int64_t n_assigned)
        : n_tasks(static_cast<int32_t *>(t->data)), tasks(n_tasks + 1),
          order(tasks + 3 * most_tasks(n_expert, n_assigned)) {}
};

// --------------------------------------------------------------------------------------------------------- norms

struct NormWork : Work {
    float scale = 1.0f;
    float epsilon = 0.0f;
    bool weighted = false;
    bool added = false;
};

// ----------------------------------------------------------------------------------------------------- attention

// Which cache rows the rows of a segment see. Row i stands at position first + i; slot s of a cache of `slots` rows
// holds position_in_slot(s, slots, end) (base/positions.h).
struct Visible {
    int32_t first = 0;
    int32_t end = 0;
    int32_t slots = 0;
    int32_t window = 0;  // of a sliding layer, else 0
    bool causal = false; // row i sees positions up to its own; else all rows see all up to the end
    int32_t n_past = 0;  // not causal: the window counts back from here
};

struct AttentionWork : Work {
    Visible visible;
    int64_t n_head_kv = 0;
};

// --------------------------------------------------------------------------------------- self-conditioning signal

// Tokens of the vocabulary whose weights stand ready at a time for rows that are too flat to gather.
constexpr int64_t VOCABULARY_CHUNK = 2048;

struct SelfConditioningWork : Work {
    const float *longest = nullptr;
    int64_t first = 0; // of the vocabulary
};

// Static: each level of the kernels has its own.
[[maybe_unused]] static double vector_length(const float *x, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    return std::sqrt(sum);
}

} // namespace dg
