#include "session/operator_stepper.h"

#include "ggml-backend.h"

#include <algorithm>

namespace dg {

void OperatorStepper::declare(ggml_context *head) {
    logits_.declare(head, false);
    io_.sample.make(head, passes_.figures().pass_rows);
}

Pass OperatorStepper::kind() const {
    Pass kind;
    kind.sampled = kind.watched = true;
    return kind;
}

bool OperatorStepper::is_for_the_host() const {
    return std::any_of(placed_.begin(), placed_.end(), [this](int32_t i) {
        return canvases_[static_cast<size_t>(i)].start.rules.allowed_ends != nullptr;
    });
}

OperatorStepper::RowInputs OperatorStepper::inputs(const dg_noise *noise) {
    RowInputs inputs;
    const bool any_watched = std::any_of(placed_.begin(), placed_.end(), [this](int32_t i) {
        return canvases_[static_cast<size_t>(i)].start.rules.watched != nullptr;
    });
    for (const int32_t i : placed_) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const dg_noise draws = live.noise(noise ? noise + i : nullptr, n_vocab());
        const RowRules &rules = live.start.rules;
        const auto t = static_cast<float>(temperature(live.start.sampling, live.step));
        for (int32_t row = 0; row < live.start.n_rows; ++row) {
            inputs.temperature.push_back(t);
            inputs.uniform.push_back(uniform_in_float(draws.uniform[row]));
            inputs.pinned.push_back(rules.is_pinned(row) ? rules.pinned[row] : 0);
            inputs.is_pinned.push_back(rules.is_pinned(row) ? 1.0f : 0.0f);
            if (any_watched) {
                inputs.watched.push_back(rules.watched ? std::max(0, rules.watched[row]) : 0);
            }
        }
    }
    return inputs;
}

void OperatorStepper::pass(const dg_noise *noise) {
    results_.clear();
    if (is_for_the_host()) {
        HostStepper::pass(noise);
        return;
    }
    const RowInputs in = inputs(noise);
    const SampleIo &io = io_.sample;
    Pass kind;
    kind.sampled = true;
    kind.watched = !in.watched.empty();
    const auto set = [](ggml_tensor *tensor, const auto &values, const Pass &pass) {
        ggml_backend_tensor_set(tensor, values.data() + pass.first_row, 0,
                                static_cast<size_t>(pass.rows()) * sizeof values[0]);
    };
    passes_.each_pass(ids().data(), segments(), nullptr, kind, [&](const Pass &pass) {
        set(io.temperature, in.temperature, pass);
        set(io.uniform, in.uniform, pass);
        set(io.pinned, in.pinned, pass);
        set(io.is_pinned, in.is_pinned, pass);
        if (pass.watched) {
            set(io.watched, in.watched, pass);
        }
        passes_.compute_pass();
        const std::vector<RowResult> rows = read_results(io, pass.rows());
        results_.insert(results_.end(), rows.begin(), rows.end());
    });
    // Only now, so that a step that was cancelled between two passes may be repeated.
    if (passes_.model().config().has_self_conditioning) {
        logits_.take_next_signal(static_cast<int32_t>(results_.size()));
    }
}

void OperatorStepper::decide(const dg_noise *noise) {
    if (results_.empty()) {
        HostStepper::decide(noise);
        return;
    }
    const RowResult *result = results_.data();
    for (const int32_t i : placed_) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const CanvasStart &start = live.start;
        take_rows(result, start.n_rows, start.rules, scratch_, live.output());
        result += start.n_rows;
        finish_step(start.n_rows, start.sampling, live.noise(noise ? noise + i : nullptr, n_vocab()), start.rules,
                    scratch_, live.output());
        live.judge();
    }
}

} // namespace dg
