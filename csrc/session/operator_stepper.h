// Between two passes by operators of the graph (sampler_graph.h): a pass ends in a few numbers of each row, which come
// here, and in the next one's signal, which does not; what is accepted, renoised and stopped is decided here.
#pragma once

#include "session/host_stepper.h"

#include <vector>

namespace dg {

class OperatorStepper final : public HostStepper {
  public:
    using HostStepper::HostStepper;

    void declare(ggml_context *head) override;
    Pass kind() const override;
    void pass(const dg_noise *noise) override;
    void decide(const dg_noise *noise) override;

  private:
    // Of each placed row, for the graph, which takes the first two of rows that get logits, and what is watched.
    struct RowInputs {
        std::vector<float> temperature;
        std::vector<float> uniform;
        std::vector<int32_t> pinned; // 0 where a row is free
        std::vector<float> is_pinned;
        std::vector<int32_t> watched; // empty unless wanted
    };
    std::vector<RowResult> results_; // of the placed rows

    // Sets of allowed ids are the one rule that operators do not know: logits come here for them.
    bool is_for_the_host() const;
    // A canvas beside such a one has the numbers that it has alone.
    bool gathers(const RowRules &rules) const override { return rules.allowed_ends != nullptr; }
    RowInputs inputs(const dg_noise *noise);
};

} // namespace dg
