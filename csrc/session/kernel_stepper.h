// Between two passes by kernels of the device that the head is on (cuda/device_loop.h): ids, signal and rules stay
// there, and only decisions come here, and the rows that somebody reads.
#pragma once

#include "cuda/device_loop.h"
#include "session/stepper.h"

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace dg {

class KernelStepper final : public Stepper {
  public:
    using MakeDevice = std::function<std::unique_ptr<cuda::Device>()>;

    // `make_device`: that which the head is on; called when memory is allocated.
    KernelStepper(Passes &passes, MakeDevice make_device) : Stepper(passes), make_device_(std::move(make_device)) {}

    void declare(ggml_context *head) override;
    void allocated() override;
    void pass(const dg_noise *noise) override;
    void decide(const dg_noise *noise) override;
    void set_rules(int32_t index, const RowRules &rules) override;
    CanvasDecision decision(int32_t index) const override;
    void read(int32_t index, const CanvasRows &out) override;

  private:
    MakeDevice make_device_;
    std::unique_ptr<cuda::Device> device_;
    std::unique_ptr<cuda::DeviceLoop> loop_;
    ggml_tensor *next_ids_ = nullptr;   // I32 [R]: where a step leaves the ids, with the first layer elsewhere
    ggml_tensor *candidates_ = nullptr; // I8: the loop's own memory
    bool gathers_ = false;              // signals of rows that are not flat; else each is made of its row's logits
    std::vector<RowRules> rules_;       // of each canvas, by its number
    std::vector<int32_t> places_;       // of each placed row, where in the logits its own are; -1: it has none

    void start(const std::vector<CanvasStart> &canvases) override;
    void close_up(const std::vector<int32_t> &which) override { loop_->place(which); }
    void make_signal() override;
    void shorten(int32_t index, int32_t n) override;
    const RowRules &rules_of(int32_t index) const override { return rules_[static_cast<size_t>(index)]; }
};

} // namespace dg
