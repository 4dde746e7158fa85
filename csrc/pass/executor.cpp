#include "pass/executor.h"

#include "base/error.h"

#include "ggml-backend.h"

#include <numeric>

namespace dg {

Executor::Executor(const std::vector<BackendPtr> &backends, size_t n_nodes) : backends_(backends) {
    std::vector<ggml_backend_t> all;
    for (const BackendPtr &backend : backends) {
        all.push_back(backend.get());
    }
    // Twice the nodes: its table has leafs as well.
    scheduler_.reset(
        ggml_backend_sched_new(all.data(), nullptr, static_cast<int>(all.size()), 2 * n_nodes, false, false));
}

void Executor::assign(const Graph &graph) {
    ggml_backend_sched_reset(scheduler_.get());
    for (const auto &[node, device] : graph.devices) {
        ggml_backend_t backend = backends_[static_cast<size_t>(device)].get();
        // What a device cannot do, the scheduler does elsewhere.
        if (ggml_backend_supports_op(backend, node)) {
            ggml_backend_sched_set_tensor_backend(scheduler_.get(), node, backend);
        }
    }
}

void Executor::reserve(const Graph &graph) {
    assign(graph);
    if (!ggml_backend_sched_reserve(scheduler_.get(), graph.nodes)) {
        throw Error(DG_ERROR_MEMORY,
                    "memory for intermediate tensors was refused; a smaller n_ctx or n_batch needs less");
    }
}

size_t Executor::measure(const Graph &graph) {
    // This forgets assignments first: nodes go where their weights are, which is where assign() puts them.
    std::vector<size_t> sizes(backends_.size());
    ggml_backend_sched_reserve_size(scheduler_.get(), graph.nodes, sizes.data());
    return std::accumulate(sizes.begin(), sizes.end(), size_t{0});
}

size_t Executor::bytes() const {
    size_t n = 0;
    for (const BackendPtr &backend : backends_) {
        n += ggml_backend_sched_get_buffer_size(scheduler_.get(), backend.get());
    }
    return n;
}

std::vector<std::pair<int32_t, std::string>> Executor::missing(const Graph &graph) const {
    std::vector<std::pair<int32_t, std::string>> found;
    for (const auto &[node, device] : graph.devices) {
        if (!ggml_backend_supports_op(backends_[static_cast<size_t>(device)].get(), node)) {
            const ggml_type type = node->src[0] ? node->src[0]->type : node->type;
            found.emplace_back(device, std::string(ggml_op_desc(node)) + " of " + ggml_type_name(type));
        }
    }
    return found;
}

void Executor::place(const Graph &graph) {
    assign(graph);
    if (!ggml_backend_sched_alloc_graph(scheduler_.get(), graph.nodes)) {
        throw Error(DG_ERROR_MEMORY, "memory for intermediate tensors was refused");
    }
}

ggml_status Executor::compute(const Graph &graph) {
    return ggml_backend_sched_graph_compute(scheduler_.get(), graph.nodes);
}

} // namespace dg
