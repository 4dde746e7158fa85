// The kernels of one level, compiled with the flags that it has, against sums in double precision: for processors that
// the tests do not run on, under an emulator (.ci/arm, .ci/emulated). Prints each failure; the exit status is their
// number.
#include "cpu/kernels/quantized_rows.h"
#include "cpu/kernels/table.h"

#include "ggml-cpp.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace {

using Floats = std::vector<float>;

int failures = 0;

void check(bool good, const char *what, const char *which, double error) {
    if (!good) {
        std::printf("FAILED: %s, %s: %g\n", what, which, error);
        ++failures;
    }
}

uint32_t state = 1;
float random_number() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}

ggml_context_ptr make_context() { return ggml_context_ptr(ggml_init({size_t{64} << 20, nullptr, false})); }

ggml_tensor *random_tensor(ggml_context *ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor *t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    for (int64_t r = 0; r < ne1; ++r) {
        Floats row(static_cast<size_t>(ne0));
        for (float &x : row) {
            x = random_number();
        }
        ggml_quantize_chunk(type, row.data(), static_cast<char *>(t->data) + static_cast<size_t>(r) * t->nb[1], 0, 1,
                            ne0, nullptr);
    }
    return t;
}

Floats row_of(const ggml_tensor *t, int64_t row) {
    Floats values(static_cast<size_t>(t->ne[0]));
    dg::DG_LEVEL::decode(t->type, static_cast<const char *>(t->data) + static_cast<size_t>(row) * t->nb[1], t->ne[0],
                         values.data());
    return values;
}

// The relative error over all of dst against `expected` (row by row).
double error_of(const ggml_tensor *dst, const std::vector<double> &expected) {
    const auto *got = static_cast<const float *>(dst->data);
    double off = 0.0, all = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        off += (got[i] - expected[i]) * (got[i] - expected[i]);
        all += expected[i] * expected[i];
    }
    return std::sqrt(off / all);
}

ggml_tensor *output(ggml_context *ctx, int64_t ne0, int64_t ne1, std::vector<ggml_tensor *> sources) {
    ggml_tensor *dst = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1);
    std::copy(sources.begin(), sources.end(), dst->src);
    return dst;
}

ggml_tensor *scratch_for(ggml_context *ctx, int64_t floats) {
    return ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (floats + 15) / 16 * 16, 1);
}

// Against ggml's own decoding, number by number.
void check_rows(ggml_type type) {
    const ggml_context_ptr ctx = make_context();
    const ggml_tensor *w = random_tensor(ctx.get(), type, 512, 3);
    for (int64_t r = 0; r < 3; ++r) {
        const Floats own = row_of(w, r);
        Floats ggmls(own.size());
        const char *data = static_cast<const char *>(w->data) + static_cast<size_t>(r) * w->nb[1];
        if (type == GGML_TYPE_F32) {
            continue;
        }
        ggml_get_type_traits(type)->to_float(data, ggmls.data(), w->ne[0]);
        double worst = 0.0;
        for (size_t i = 0; i < own.size(); ++i) {
            worst = std::max(worst, static_cast<double>(std::fabs(own[i] - ggmls[i])));
        }
        check(worst < 1e-6, "a row's values are not ggml's", ggml_type_name(type), worst);
    }
}

// What a low-rank pair adds to the product `bare`, whatever type the matrix has and however the activations are rounded
// for it: B (scales * (A x)) of x itself.
void check_low(const dg::Kernels &k, ggml_tensor *x, const ggml_tensor *bare, dg::Form form) {
    const ggml_context_ptr context = make_context();
    ggml_context *ctx = context.get();
    const int64_t rank = 5;
    const int64_t depth = x->ne[0];
    ggml_tensor *w = bare->src[0];
    ggml_tensor *a = random_tensor(ctx, GGML_TYPE_F32, depth, rank);
    ggml_tensor *b = random_tensor(ctx, GGML_TYPE_F32, rank, bare->ne[0]);
    ggml_tensor *scales = random_tensor(ctx, GGML_TYPE_F32, rank, 1);
    ggml_tensor *blocks = output(ctx, k.block_floats(depth, dg::Form::FLOATS), k.column_blocks(x->ne[1]), {x});
    dg::PackWork pack;
    k.pack(blocks, 0, 1, &pack);
    ggml_tensor *scratch = scratch_for(ctx, k.product_scratch(depth, bare->ne[0]));
    ggml_tensor *low = output(ctx, rank * k.columns, k.column_blocks(x->ne[1]), {a, blocks, scratch});
    dg::LowWork low_work;
    low_work.scales = scales;
    low_work.n = x->ne[1];
    k.low(low, 0, 1, &low_work);
    ggml_tensor *dst = output(ctx, bare->ne[0], bare->ne[1], {w, bare->src[1], scratch, b, low});
    dg::MultiplyWork work;
    work.form = form;
    k.multiply(dst, 0, 1, &work);
    std::vector<double> expected;
    for (int64_t j = 0; j < x->ne[1]; ++j) {
        const Floats column = row_of(x, j);
        std::vector<double> inner;
        for (int64_t i = 0; i < rank; ++i) {
            const Floats row = row_of(a, i);
            double sum = 0.0;
            for (size_t d = 0; d < row.size(); ++d) {
                sum += static_cast<double>(row[d]) * static_cast<double>(column[d]);
            }
            inner.push_back(sum * static_cast<double>(row_of(scales, 0)[static_cast<size_t>(i)]));
        }
        for (int64_t r = 0; r < bare->ne[0]; ++r) {
            const Floats row = row_of(b, r);
            double sum = 0.0;
            for (size_t i = 0; i < row.size(); ++i) {
                sum += static_cast<double>(row[i]) * inner[i];
            }
            const float base = static_cast<const float *>(bare->data)[expected.size()];
            expected.push_back(static_cast<double>(base) + sum);
        }
    }
    const double error = error_of(dst, expected);
    check(error < 1e-6, "a low-rank pair is off", ggml_type_name(w->type), error);
}

// w [depth, n_out] times x [depth, n]; integers round activations to 8 bits.
void check_product(const dg::Kernels &k, ggml_type type, int64_t depth, int64_t n_out, int64_t n, float poison) {
    const ggml_context_ptr context = make_context();
    ggml_context *ctx = context.get();
    const dg::Form form = k.form_for(type);
    ggml_tensor *w = random_tensor(ctx, type, depth, n_out);
    ggml_tensor *x = random_tensor(ctx, GGML_TYPE_F32, depth, n);
    if (poison != 0.0f) {
        static_cast<float *>(x->data)[depth / 2] = poison; // of column 0
    }
    ggml_tensor *blocks = output(ctx, k.block_floats(depth, form), k.column_blocks(n), {x});
    dg::PackWork pack;
    pack.form = form;
    k.pack(blocks, 0, 1, &pack);
    ggml_tensor *dst = output(ctx, n_out, n, {w, blocks, scratch_for(ctx, k.product_scratch(depth, n_out))});
    dg::MultiplyWork work;
    work.form = form;
    k.multiply(dst, 0, 1, &work);
    if (poison != 0.0f) {
        bool all = true;
        for (int64_t r = 0; r < n_out; ++r) {
            all = all && !std::isfinite(static_cast<const float *>(dst->data)[r]);
        }
        check(all, "a number that is none vanished", ggml_type_name(type), poison);
        return;
    }
    std::vector<double> expected;
    for (int64_t j = 0; j < n; ++j) {
        const Floats column = row_of(x, j);
        for (int64_t r = 0; r < n_out; ++r) {
            const Floats row = row_of(w, r);
            double sum = 0.0;
            for (size_t i = 0; i < row.size(); ++i) {
                sum += static_cast<double>(row[i]) * static_cast<double>(column[i]);
            }
            expected.push_back(sum);
        }
    }
    const double error = error_of(dst, expected);
    // The greatest of 32 uniform numbers is 0.97: a step of 1/131, an error of 1/131 / sqrt(12) against 1 / sqrt(3),
    // which is 3.8e-3; of 61 outputs at a time up to 5.1e-3 was seen. A misread bit costs ten times that.
    const bool words = form == dg::Form::WORDS; // 258 times as many steps
    // Steps of 1/256 of each value at most, an error of 1/256 / sqrt(12); twice where weights are rounded, too.
    const bool bfloats = form == dg::Form::BFLOATS;
    const double rounded = type == GGML_TYPE_BF16 ? 2e-3 : 3e-3;
    const bool floats = form == dg::Form::FLOATS;
    const double bound = floats ? 1e-6 : words ? 7e-3 / 258 : bfloats ? rounded : 7e-3;
    check(error < bound, "a product is off", ggml_type_name(type), error);
    check(floats || error > (words ? 1e-4 / 258 : 1e-4), "a product of integers is too good to be one",
          ggml_type_name(type), error);
    check_low(k, x, dst, form);
}

void check_norm(const dg::Kernels &k) {
    const ggml_context_ptr context = make_context();
    ggml_context *ctx = context.get();
    ggml_tensor *x = random_tensor(ctx, GGML_TYPE_F32, 77, 5);
    ggml_tensor *weight = random_tensor(ctx, GGML_TYPE_F32, 77, 1);
    ggml_tensor *dst = output(ctx, 77, 5, {x, weight});
    dg::NormWork work;
    work.epsilon = 1e-6f;
    work.weighted = true;
    k.norm(dst, 0, 1, &work);
    std::vector<double> expected;
    for (int64_t r = 0; r < 5; ++r) {
        const Floats row = row_of(x, r);
        double squares = 0.0;
        for (const float value : row) {
            squares += static_cast<double>(value) * static_cast<double>(value);
        }
        for (size_t i = 0; i < row.size(); ++i) {
            expected.push_back(row[i] / std::sqrt(squares / 77 + 1e-6) * row_of(weight, 0)[i]);
        }
    }
    const double error = error_of(dst, expected);
    check(error < 1e-6, "a norm is off", "F32", error);
}

// Every row sees every slot of a cache of 70; two heads share keys.
void check_attention(const dg::Kernels &k, ggml_type type) {
    constexpr int64_t DIM = 64, HEADS = 2, ROWS = 5, SLOTS = 70;
    const ggml_context_ptr context = make_context();
    ggml_context *ctx = context.get();
    ggml_tensor *q = ggml_reshape_3d(ctx, random_tensor(ctx, GGML_TYPE_F32, DIM, HEADS * ROWS), DIM, HEADS, ROWS);
    ggml_tensor *keys = random_tensor(ctx, type, DIM, SLOTS);
    ggml_tensor *values = random_tensor(ctx, type, DIM, SLOTS);
    ggml_tensor *dst = output(ctx, DIM * HEADS, ROWS, {q, keys, values, scratch_for(ctx, k.attention_scratch(DIM))});
    dg::AttentionWork work;
    work.n_head_kv = 1;
    work.visible.end = work.visible.slots = SLOTS;
    k.attend(dst, 0, 1, &work);
    std::vector<double> expected;
    for (int64_t row = 0; row < ROWS * HEADS; ++row) {
        const auto *query = static_cast<const float *>(q->data) + row * DIM;
        std::vector<double> sums(DIM, 0.0);
        double all = 0.0;
        for (int64_t s = 0; s < SLOTS; ++s) {
            const Floats key = row_of(keys, s);
            const Floats value = row_of(values, s);
            double score = 0.0;
            for (size_t i = 0; i < DIM; ++i) {
                score += static_cast<double>(query[i]) * static_cast<double>(key[i]);
            }
            all += std::exp(score);
            for (size_t i = 0; i < DIM; ++i) {
                sums[i] += std::exp(score) * static_cast<double>(value[i]);
            }
        }
        for (const double sum : sums) {
            expected.push_back(sum / all);
        }
    }
    const double error = error_of(dst, expected);
    check(error < 2e-6, "attention is off", ggml_type_name(type), error);
}

} // namespace

int main() {
    const dg::Kernels &k = *dg::DG_LEVEL::kernels();
    const ggml_type types[] = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                               GGML_TYPE_Q5_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K};
    int n_rounded = 0;
    for (const ggml_type type : types) {
        n_rounded += k.form_for(type) != dg::Form::FLOATS ? 1 : 0;
        check_rows(type);
        for (const int64_t n : {int64_t{1}, int64_t{3}, k.columns, 2 * k.columns + 5}) {
            check_product(k, type, 1280, 61, n, 0.0f);
        }
        for (const float poison : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            check_product(k, type, 512, 13, 3, poison);
        }
    }
    check_norm(k);
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
        check_attention(k, type);
    }
    std::printf("%s: %d types meet rounded activations, %d failures\n", k.level, n_rounded, failures);
    return failures;
}
