// Between two passes on the host: sampler.h over rows of logits. The sampler divides a row by the temperature in place,
// and what that leaves is what the next signal is made of. Where a device made them, device_rows.h brings them here.
#pragma once

#include "session/device_rows.h"
#include "session/stepper.h"

#include <vector>

namespace dg {

class HostStepper : public Stepper {
  public:
    using Stepper::Stepper;

    void declare(ggml_context *head) override;
    void pass(const dg_noise *noise) override;
    void decide(const dg_noise *noise) override;
    void set_rules(int32_t index, const RowRules &rules) override;
    CanvasDecision decision(int32_t index) const override;
    void read(int32_t index, const CanvasRows &out) override;

  protected:
    // What device_rows_ needs beside the logits, to the context of their device.
    void declare_device_rows(ggml_context *head);
    // A canvas between its steps; arrays [n_rows].
    struct Live {
        CanvasStart start;
        std::vector<int32_t> canvas;
        std::vector<int32_t> argmax;
        std::vector<uint8_t> accepted;
        std::vector<double> entropy;
        std::vector<double> logprob; // empty unless watched
        std::vector<double> uniform;
        std::vector<int32_t> renoise;
        StabilityHistory history;
        int32_t step = 0; // that is being made
        CanvasDecision decision;

        explicit Live(const CanvasStart &start);
        StepOutput output();
        // Those of the generator, unless they are handed in.
        dg_noise noise(const dg_noise *handed_in, int32_t n_vocab);
        void shorten(int32_t n);
        // The end of a step whose rows are sampled.
        void judge();
    };
    std::vector<Live> canvases_;
    SamplerScratch scratch_;
    DeviceRows device_rows_ = DeviceRows(passes_, logits_);
    std::vector<RowSample> samples_; // of the placed rows, where a device made their logits

    void start(const std::vector<CanvasStart> &canvases) override;
    void close_up(const std::vector<int32_t> &which) override;
    const RowRules &rules_of(int32_t index) const override { return canvases_[static_cast<size_t>(index)].start.rules; }
    void shorten(int32_t index, int32_t n) override { canvases_[static_cast<size_t>(index)].shorten(n); }
    // Of the placed canvases, one after the other.
    std::vector<int32_t> ids() const;
    // Whether such a canvas's signal may be gathered here, where a device made its logits.
    virtual bool gathers(const RowRules &) const { return true; }
    // The end of a step whose samples_ are there.
    void put_samples(const dg_noise *noise);
};

} // namespace dg
