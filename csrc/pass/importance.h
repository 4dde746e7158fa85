// What weight matrices are multiplied by: sums of squares by column, from which importance matrices are made.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace dg {

class Importance {
  public:
    struct Sums {
        int64_t row = 0;
        std::vector<double> squares; // [matrices, row]
        std::vector<int64_t> counts; // [matrices]: rows that were summed
    };

    // Puts a node into the graph that adds the rows of x to the sums of `weight`. `ids` [n_used, n]: the expert that
    // each row of x [row, n_used or 1, n] meets; nullptr: `weight` is one matrix, x [row, n].
    void watch(ggml_context *ctx, ggml_cgraph *graph, const ggml_tensor *weight, ggml_tensor *x, ggml_tensor *ids);

    // Of the tensor called `name`; nullptr when no pass met it.
    const Sums *find(const std::string &name) const;

  private:
    std::map<std::string, Sums> sums_; // whose addresses the graphs' nodes hold
};

} // namespace dg
