#include "cpu/product.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace dg {
namespace {

// On one thread, before the experts themselves: the assignments of each expert together, in tasks of at most
// EXPERT_COLUMNS.
void run_route(ggml_tensor *dst, int thread, int, void *userdata) {
    if (thread != 0) {
        return;
    }
    const auto n_expert = static_cast<ExpertsWork *>(userdata)->n_expert;
    const auto *selected = static_cast<const int32_t *>(dst->src[0]->data);
    const int64_t n_assigned = ggml_nelements(dst->src[0]);
    const Routes routes(dst, n_expert, n_assigned);
    int32_t *ends = routes.order + n_assigned; // [n_expert + 1]: counts, then where each expert's assignments end
    std::fill(ends, ends + n_expert + 1, 0);
    for (int64_t a = 0; a < n_assigned; ++a) {
        ++ends[selected[a] + 1];
    }
    for (int64_t e = 0; e < n_expert; ++e) {
        ends[e + 1] += ends[e];
    }
    int32_t n_tasks = 0;
    for (int64_t e = 0; e < n_expert; ++e) {
        for (int32_t first = ends[e]; first < ends[e + 1]; first += EXPERT_COLUMNS) {
            int32_t *task = routes.tasks + 3 * n_tasks++;
            task[0] = static_cast<int32_t>(e);
            task[1] = first;
            task[2] = std::min(static_cast<int32_t>(EXPERT_COLUMNS), ends[e + 1] - first);
        }
    }
    *routes.n_tasks = n_tasks;
    for (int64_t a = 0; a < n_assigned; ++a) {
        routes.order[ends[selected[a]]++] = static_cast<int32_t>(a);
    }
    // The largest first, so that no thread begins one when the others have ended.
    struct Task {
        int32_t expert, first, n;
    };
    auto *tasks = reinterpret_cast<Task *>(routes.tasks);
    std::sort(tasks, tasks + n_tasks,
              [](const Task &a, const Task &b) { return a.n > b.n || (a.n == b.n && a.first < b.first); });
}

} // namespace

// Column blocks as the product of a type of weights wants them: floats, or groups of something shorter.
Form ProductOps::form_for(const ggml_tensor *w) const {
    return w->ne[0] % GROUP == 0 ? kernels_.form_for(w->type) : Form::FLOATS;
}

// Of two matrices that are multiplied with the same blocks.
Form ProductOps::form_for(const ggml_tensor *w, const ggml_tensor *other) const {
    const Form form = form_for(w);
    return form == form_for(other) ? form : Form::FLOATS;
}

ggml_tensor *ProductOps::blocks(Operand &x, Form form) const {
    ggml_tensor *&made = x.made[static_cast<int>(form)];
    if (!made) {
        ggml_tensor *floats = x.made[static_cast<int>(Form::FLOATS)];
        const int64_t depth = x.rows ? x.rows->ne[0] : floats->ne[0] / kernels_.columns;
        auto *work = add_work<PackWork>(work_);
        work->form = form;
        made =
            custom(ctx_, Part::PRODUCTS, GGML_TYPE_F32, kernels_.block_floats(depth, form), kernels_.column_blocks(x.n),
                   {x.rows ? x.rows : floats}, x.rows ? kernels_.pack : kernels_.quantize, work);
    }
    return made;
}

ggml_tensor *ProductOps::low_blocks(const LowRank &low, Operand &x) const {
    auto *work = add_work<LowWork>(work_);
    work->scales = low.scales;
    work->n = x.n;
    return custom(ctx_, Part::PRODUCTS, GGML_TYPE_F32, low.a->ne[1] * kernels_.columns, kernels_.column_blocks(x.n),
                  {low.a, blocks(x, Form::FLOATS), scratch_}, kernels_.low, work);
}

ggml_tensor *ProductOps::multiply(ggml_tensor *w, Operand &x, float softcap, const LowRank *low) const {
    auto *work = add_work<MultiplyWork>(work_);
    work->form = form_for(w);
    work->softcap = softcap;
    std::vector<ggml_tensor *> sources = {w, blocks(x, work->form), scratch_};
    if (low) {
        sources.insert(sources.end(), {low->b, low_blocks(*low, x)});
    }
    return custom(ctx_, Part::PRODUCTS, GGML_TYPE_F32, w->ne[1], x.n, std::move(sources), kernels_.multiply, work);
}

Operand ProductOps::gated(ggml_tensor *gate, ggml_tensor *up, Operand &x, const LowRank *low_gate,
                          const LowRank *low_up) const {
    auto *work = add_work<MultiplyWork>(work_);
    work->n = x.n;
    work->form = form_for(gate, up);
    std::vector<ggml_tensor *> sources = {gate, up, blocks(x, work->form), scratch_};
    if (low_gate || low_up) {
        for (const LowRank *low : {low_gate, low_up}) {
            sources.push_back(low ? low->b : nullptr);
            sources.push_back(low ? low_blocks(*low, x) : nullptr);
        }
    }
    ggml_tensor *product = custom(ctx_, Part::PRODUCTS, GGML_TYPE_F32, gate->ne[1] * kernels_.columns,
                                  kernels_.column_blocks(x.n), std::move(sources), kernels_.gated, work);
    return {nullptr, x.n, {product}};
}

ggml_tensor *ProductOps::experts(ggml_tensor *x, ggml_tensor *selected, ggml_tensor *weights, ggml_tensor *gate_up,
                                 ggml_tensor *gate, ggml_tensor *up, ggml_tensor *down, const LowRank *low_gate_up,
                                 const LowRank *low_down) const {
    const int64_t n_assigned = ggml_nelements(selected);
    auto *route = add_work<ExpertsWork>(work_);
    route->n_expert = down->ne[2];
    ggml_tensor *routes = custom(ctx_, Part::EXPERTS, GGML_TYPE_I32, Routes::size(route->n_expert, n_assigned), 1,
                                 {selected}, run_route, route);
    ggml_tensor *first = gate_up ? gate_up : gate;
    ggml_tensor *second = gate_up ? gate_up : up;
    auto *work = add_work<ExpertsWork>(work_);
    work->n_expert = down->ne[2];
    work->n_ff = down->ne[0];
    work->form = form_for(first, second);
    work->form_down = form_for(down);
    work->n_assigned = n_assigned;
    int64_t rank = 0;
    for (const LowRank *low : {low_gate_up, low_down}) {
        if (low) {
            (low == low_gate_up ? work->gate_up : work->down) = *low;
            rank = std::max(rank, low->a->ne[1]);
        }
    }
    work->low_floats = rank > 0 ? x->ne[0] * kernels_.columns + rank * EXPERT_COLUMNS : 0;
    const int64_t low_rows = (work->low_floats * scratch_->ne[1] + x->ne[0] - 1) / x->ne[0];
    ggml_tensor *outputs = custom(ctx_, Part::EXPERTS, GGML_TYPE_F32, x->ne[0], n_assigned + low_rows,
                                  {x, routes, first, second, down, scratch_}, kernels_.experts, work);
    return custom(ctx_, Part::EXPERTS, GGML_TYPE_F32, x->ne[0], x->ne[1], {outputs, weights}, kernels_.combine,
                  add_work<Work>(work_));
}

} // namespace dg
