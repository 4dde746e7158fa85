// Runs graphs over the CPU and any number of devices: ggml's scheduler, with each node where the graph wants it.
#pragma once

#include "pass/graph.h"

#include "ggml-cpp.h"

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace dg {

// Holds memory for the intermediate tensors of one graph at a time.
class Executor {
  public:
    // For graphs of at most so many nodes. The backends, the CPU's last, must outlive it.
    Executor(const std::vector<BackendPtr> &backends, size_t n_nodes);

    // Address space that the scheduler takes for its own headers, most of which is never touched: ggml's bound of 30
    // inputs, two headers each, for as many splits as there are nodes.
    static size_t headers(size_t n_nodes) { return 2 * n_nodes * 30 * 2 * sizeof(ggml_tensor); }

    // Takes the memory that `graph` needs; throws MEMORY.
    void reserve(const Graph &graph);
    // What it would take, in bytes, of all devices together.
    size_t measure(const Graph &graph);
    // What it holds.
    size_t bytes() const;

    // Operators that the graph wants on a device which cannot do them, so that they run on the CPU: "CPY of q6_K", with
    // the device.
    std::vector<std::pair<int32_t, std::string>> missing(const Graph &graph) const;

    // Gives the graph's tensors their places, in the same memory as those of the graphs before it. Within what was
    // reserved nothing is allocated.
    void place(Graph &graph);
    // Any graph that one backend computes whole, or else the one that was placed last: copies between backends are
    // known of that one alone. None once memory was allocated for another.
    ggml_status compute(const Graph &graph);

  private:
    const std::vector<BackendPtr> &backends_;
    SchedulerPtr scheduler_;

    void assign(const Graph &graph);
};

} // namespace dg
