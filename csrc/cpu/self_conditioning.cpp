#include "cpu/self_conditioning.h"

#include "base/parallel.h"

namespace dg {
namespace {

// The flat rows, in order.
void run_list(ggml_tensor *dst, int thread, int, void *) {
    if (thread != 0) {
        return;
    }
    const int64_t n = dst->ne[0] - 1;
    const auto *rows = static_cast<const RowState *>(dst->src[0]->data);
    auto *list = static_cast<int32_t *>(dst->data);
    list[0] = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (rows[i].flat) {
            list[++list[0]] = static_cast<int32_t>(i);
        }
    }
}

// An operator whose result is the memory of `place`.
ggml_tensor *custom_inplace(ggml_context *ctx, ggml_tensor *place, std::vector<ggml_tensor *> args,
                            ggml_custom_op_t run, Work *work) {
    return mark(
        ggml_custom_inplace(ctx, place, args.data(), static_cast<int>(args.size()), run, GGML_N_TASKS_MAX, work),
        Part::SELF_CONDITIONING);
}

} // namespace

int64_t self_conditioning_nodes(int64_t n_vocab) {
    return 8 + 2 * ((n_vocab + VOCABULARY_CHUNK - 1) / VOCABULARY_CHUNK);
}

float longest_row(const Kernels &kernels, const ggml_tensor *embedding, int32_t n_threads) {
    const int64_t n_embd = embedding->ne[0];
    std::vector<float> lengths(static_cast<size_t>(embedding->ne[1]));
    parallel_rows(static_cast<int32_t>(embedding->ne[1]), static_cast<int32_t>(n_embd), n_threads, [&](int32_t id) {
        thread_local std::vector<float> row;
        row.resize(static_cast<size_t>(n_embd));
        kernels.decode(embedding->type,
                       static_cast<const char *>(embedding->data) + static_cast<size_t>(id) * embedding->nb[1], n_embd,
                       row.data());
        lengths[static_cast<size_t>(id)] = static_cast<float>(vector_length(row.data(), n_embd));
    });
    return *std::max_element(lengths.begin(), lengths.end());
}

void self_conditioning_ops(ggml_context *ctx, const Kernels &kernels, ggml_cgraph *graph, WorkList &list,
                           ggml_tensor *scratch, ggml_tensor *embedding, ggml_tensor *logits, ggml_tensor *signal,
                           const float *longest) {
    const auto work = [&](int64_t first) {
        auto *made = add_work<SelfConditioningWork>(list);
        made->longest = longest;
        made->first = first;
        return made;
    };
    const int64_t n = logits->ne[1];
    const int64_t n_blocks = kernels.column_blocks(n);
    constexpr int64_t STATE_WORDS = sizeof(RowState) / sizeof(int32_t);
    ggml_tensor *state = custom(ctx, Part::SELF_CONDITIONING, GGML_TYPE_I32, STATE_WORDS, n,
                                {logits, embedding, signal, scratch}, kernels.look, work(0));
    ggml_tensor *flat = custom(ctx, Part::SELF_CONDITIONING, GGML_TYPE_I32, n + 1, 1, {state}, run_list, work(0));
    ggml_tensor *sums = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, embedding->ne[0] * kernels.columns, n_blocks);
    for (int64_t first = 0; first < embedding->ne[1]; first += VOCABULARY_CHUNK) {
        ggml_tensor *weights = custom(ctx, Part::SELF_CONDITIONING, GGML_TYPE_F32, VOCABULARY_CHUNK * kernels.columns,
                                      n_blocks, {logits, state, flat}, kernels.weigh, work(first));
        sums = custom_inplace(ctx, sums, {embedding, weights, flat, scratch}, kernels.add, work(first));
    }
    ggml_build_forward_expand(graph, custom_inplace(ctx, signal, {sums, state, flat}, kernels.finish, work(0)));
}

} // namespace dg
