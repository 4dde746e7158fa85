#include "pass/importance.h"

namespace dg {
namespace {

const char *at(const ggml_tensor *t, int64_t i1, int64_t i2) {
    return static_cast<const char *>(t->data) + static_cast<size_t>(i1) * t->nb[1] + static_cast<size_t>(i2) * t->nb[2];
}

void add_row(Importance::Sums &sums, int64_t matrix, const float *x) {
    double *squares = sums.squares.data() + matrix * sums.row;
    for (int64_t i = 0; i < sums.row; ++i) {
        squares[i] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    ++sums.counts[static_cast<size_t>(matrix)];
}

// One thread alone, so that the order of the additions, and with it their last bits, is always the same.
void add_rows(ggml_tensor *dst, int ith, int /*nth*/, void *user) {
    if (ith != 0) {
        return;
    }
    Importance::Sums &sums = *static_cast<Importance::Sums *>(user);
    const ggml_tensor *x = dst->src[0];
    const ggml_tensor *ids = dst->src[1];
    if (!ids) {
        for (int64_t row = 0; row < x->ne[1]; ++row) {
            add_row(sums, 0, reinterpret_cast<const float *>(at(x, row, 0)));
        }
        return;
    }
    for (int64_t row = 0; row < ids->ne[1]; ++row) {
        const auto *chosen = reinterpret_cast<const int32_t *>(at(ids, row, 0));
        for (int64_t i = 0; i < ids->ne[0]; ++i) {
            add_row(sums, chosen[i], reinterpret_cast<const float *>(at(x, i % x->ne[1], row)));
        }
    }
}

} // namespace

void Importance::watch(ggml_context *ctx, ggml_cgraph *graph, const ggml_tensor *weight, ggml_tensor *x,
                       ggml_tensor *ids) {
    Sums &sums = sums_[ggml_get_name(weight)];
    if (sums.row == 0) {
        const int64_t matrices = weight->ne[2];
        sums.row = weight->ne[0];
        sums.squares.resize(static_cast<size_t>(matrices * sums.row));
        sums.counts.resize(static_cast<size_t>(matrices));
    }
    ggml_tensor *sources[] = {x, ids};
    ggml_build_forward_expand(graph,
                              ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, sources, ids ? 2 : 1, add_rows, 1, &sums));
}

const Importance::Sums *Importance::find(const std::string &name) const {
    const auto found = sums_.find(name);
    return found == sums_.end() ? nullptr : &found->second;
}

} // namespace dg
