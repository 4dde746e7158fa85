// What a session does for those who denoise canvases: passes through its layers, computed. All that steppers see of it.
#pragma once

#include "model/figures.h"
#include "model/model.h"
#include "pass/graph.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace dg {

class Passes {
  public:
    virtual const Model &model() const = 0;
    virtual const SessionFigures &figures() const = 0;
    virtual int32_t n_threads() const = 0;
    virtual const GraphIo &io() const = 0;

    // Decoder passes over canvases side by side, as many as it takes; `segments` holds the rows of each. `ids`: of all
    // rows; null: they are in io().ids. Of `kind` counts what happens to the logits. For each pass that is ready, `run`
    // is called, which calls compute_pass() between writing what it reads and reading what it leaves. `wanted`: of each
    // row, whether somebody reads its logits; null: somebody reads all.
    virtual void each_pass(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted, Pass kind,
                           const std::function<void(const Pass &)> &run) = 0;
    virtual void compute_pass() = 0;
    // n_rows of logits (processed), from first_logit on -> those of the signal from first_row on.
    virtual void compute_signal(int32_t first_row, int32_t first_logit, int32_t n_rows) = 0;
    // The same for some rows, the others' signal left as it is: logits[i] is where the logits of rows[i] are. For a
    // stepper whose StepIo has the tensors for it.
    virtual void compute_signal(const std::vector<int32_t> &rows, const std::vector<int32_t> &logits) = 0;

  protected:
    ~Passes() = default;
};

} // namespace dg
