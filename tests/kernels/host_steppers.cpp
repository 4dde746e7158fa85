// In the place of csrc/session/steppers.cpp: a library whose sessions on the CPU have the kernels' sampler, by the
// bodies of the kernels on the host (host_device.h). tests/host_twin.py links it. With EVERY_ROW in the environment,
// sessions give all rows logits, whoever reads them.
#include "session/steppers.h"

#include "host_device.h"

#include "base/error.h"
#include "session/host_stepper.h"
#include "session/kernel_stepper.h"
#include "session/operator_stepper.h"

#include <cstdlib>
#include <list>

namespace dg {
namespace {

// A session's passes, with the logits of all rows.
class EveryRow final : public Passes {
  public:
    explicit EveryRow(Passes &passes) : passes_(passes) {}
    const Model &model() const override { return passes_.model(); }
    const SessionFigures &figures() const override { return passes_.figures(); }
    int32_t n_threads() const override { return passes_.n_threads(); }
    const GraphIo &io() const override { return passes_.io(); }
    void each_pass(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *, Pass kind,
                   const std::function<void(const Pass &)> &run) override {
        passes_.each_pass(ids, segments, nullptr, kind, run);
    }
    void compute_pass() override { passes_.compute_pass(); }
    void compute_signal(int32_t first_row, int32_t first_logit, int32_t n_rows) override {
        passes_.compute_signal(first_row, first_logit, n_rows);
    }
    void compute_signal(const std::vector<int32_t> &rows, const std::vector<int32_t> &logits) override {
        passes_.compute_signal(rows, logits);
    }

  private:
    Passes &passes_;
};

} // namespace

dg_sampler resolve_sampler(const Model &model, int32_t asked) {
    if (model.placement().head != model.devices().cpu()) {
        throw Error(DG_ERROR_UNSUPPORTED, "the kernels' bodies run on the CPU alone");
    }
    return asked == DG_SAMPLER_AUTO ? DG_SAMPLER_HOST : static_cast<dg_sampler>(asked);
}

std::unique_ptr<Stepper> make_stepper(Passes &session, const Model &, dg_sampler sampler) {
    static std::list<EveryRow> wrapped; // as long as the process, so as long as their steppers
    Passes &passes = std::getenv("EVERY_ROW") ? wrapped.emplace_back(session) : session;
    switch (sampler) {
        case DG_SAMPLER_OPERATORS: return std::make_unique<OperatorStepper>(passes);
        case DG_SAMPLER_KERNELS:
            return std::make_unique<KernelStepper>(passes, [] { return std::make_unique<cuda::HostDevice>(); });
        default: return std::make_unique<HostStepper>(passes);
    }
}

} // namespace dg
