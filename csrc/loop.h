// The canvas loop: what is carried from one denoise step to the next.
#pragma once

#include "sampler.h"
#include "session.h"

#include <vector>

namespace dg {

class CanvasLoop {
  public:
    explicit CanvasLoop(Session &session);

    void begin(const dg_canvas_options &options);
    // One step; a cancelled one may be repeated. Throws ARGUMENT when no canvas is under way.
    dg_step step(const dg_noise *handed_in);
    // Whatever else uses the session's logits ends the canvas.
    void drop() { active_ = false; }

  private:
    Session &session_;
    bool active_ = false;
    bool conditioned_ = false; // the self-conditioning signal of the next step stands ready
    int32_t step_ = 0;
    dg_sampling sampling_ = {};
    uint64_t seed_ = 0;
    uint32_t canvas_index_ = 0;
    StabilityHistory history_;
    // [C] each
    std::vector<int32_t> pinned_; // empty: all free
    std::vector<int32_t> canvas_;
    std::vector<int32_t> argmax_;
    std::vector<uint8_t> accepted_;
    std::vector<double> entropy_;
    std::vector<double> uniform_;
    std::vector<int32_t> renoise_;
    SamplerScratch scratch_;

    dg_noise philox_noise();
};

} // namespace dg
