// Rows of logits that a device made, sampled here: a piece at a time goes into a thread's own memory, is sampled there
// while the processor's cache has it, and is let go. Where a device's memory is the processor's own, reading it is the
// one pass over the logits that there is.
#pragma once

#include "sample/sampler.h"
#include "session/passes.h"
#include "session/step_logits.h"

#include "ggml.h"

#include <cstdint>
#include <mutex>
#include <vector>

namespace dg {

class DeviceRows {
  public:
    DeviceRows(Passes &passes, StepLogits &logits) : passes_(passes), logits_(logits) {}

    // A row of a step, before it is sampled.
    struct Row {
        const RowRules *rules; // its canvas's
        int32_t row;           // in its canvas
        float t;
        double u;
        bool gathers; // its signal may be gathered here; else the device makes it, whatever the row is like
    };

    // Behind a pass that was computed: samples its rows, and leaves their signal in StepIo::next_signal. `rows`: all of
    // the step, as `samples`, of which those of the pass are written; draw is -1 where logits hold NaN or have no
    // finite maximum.
    void take(const Pass &pass, const std::vector<Row> &rows, std::vector<RowSample> &samples);

  private:
    Passes &passes_;
    StepLogits &logits_;
    ggml_tensor embedding_ = {}; // as it lies in the file; its data is null until it was asked for
    float longest_ = 0.0f;       // longest_row() of it
    std::vector<float> signal_;  // [n_embd, rows of a pass]
    std::vector<uint8_t> flat_;  // of each row of logits of a pass
    std::mutex server_;          // one thread of this call at a time speaks to a server; the call itself has its turn

    std::mutex buffers_mutex_;
    std::vector<std::vector<float>> buffers_; // pieces of logits, one for each thread

    std::unique_lock<std::mutex> speak();
    std::vector<float> take_buffer();
    void find_embedding();
    void sample_piece(const Pass &pass, int32_t first, int32_t n, const std::vector<Row> &rows,
                      std::vector<RowSample> &samples);
    void sample_pinned(const Pass &pass, const std::vector<Row> &rows, std::vector<RowSample> &samples);
    bool gather(const float *z, int32_t row);
    bool is_signalled() const { return passes_.model().config().has_self_conditioning; }
    int64_t n_vocab() const { return passes_.model().config().n_vocab; }
    int64_t n_embd() const { return passes_.model().config().n_embd; }
};

} // namespace dg
