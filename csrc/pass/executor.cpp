#include "pass/executor.h"

#include "base/error.h"

#include "ggml-backend.h"

#include <algorithm>
#include <iterator>
#include <numeric>

namespace dg {
namespace {

// What the nodes read. ggml's scheduler puts a copy in the place of what another backend holds.
std::vector<ggml_tensor *> sources(ggml_cgraph *nodes) {
    std::vector<ggml_tensor *> all;
    for (int i = 0; i < ggml_graph_n_nodes(nodes); ++i) {
        const ggml_tensor *node = ggml_graph_node(nodes, i);
        all.insert(all.end(), std::begin(node->src), std::end(node->src));
    }
    return all;
}

} // namespace

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

void Executor::place(Graph &graph) {
    assign(graph);
    const std::vector<ggml_tensor *> wanted = sources(graph.nodes);
    if (!ggml_backend_sched_alloc_graph(scheduler_.get(), graph.nodes)) {
        throw Error(DG_ERROR_MEMORY, "memory for intermediate tensors was refused");
    }
    graph.whole = -1;
    if (ggml_backend_sched_get_n_splits(scheduler_.get()) == 1 && sources(graph.nodes) == wanted) {
        ggml_backend_t backend =
            ggml_backend_sched_get_tensor_backend(scheduler_.get(), ggml_graph_node(graph.nodes, 0));
        const auto found = std::find_if(backends_.begin(), backends_.end(),
                                        [&](const BackendPtr &candidate) { return candidate.get() == backend; });
        graph.whole = found == backends_.end() ? -1 : static_cast<int32_t>(found - backends_.begin());
    }
}

ggml_status Executor::compute(const Graph &graph) {
    return graph.whole < 0 ? ggml_backend_sched_graph_compute(scheduler_.get(), graph.nodes)
                           : ggml_backend_graph_compute(backends_[static_cast<size_t>(graph.whole)].get(), graph.nodes);
}

} // namespace dg
