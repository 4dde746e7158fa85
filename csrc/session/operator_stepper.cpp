#include "session/operator_stepper.h"

#include "ggml-backend.h"

#include <algorithm>

namespace dg {

void OperatorStepper::declare(ggml_context *head) {
    logits_.declare(head, false);
    io_.sample.make(head, passes_.figures().pass_rows);
    declare_device_rows(head);
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
    const auto set = [](ggml_tensor *tensor, const auto *values, int32_t n) {
        ggml_backend_tensor_set(tensor, values, 0, static_cast<size_t>(n) * sizeof *values);
    };
    const auto set_of_logits = [&](ggml_tensor *tensor, auto values, const Pass &pass) {
        for (int32_t i = 0; i < pass.n_logits(); ++i) {
            values[static_cast<size_t>(i)] = values[static_cast<size_t>(pass.first_row + pass.logit_row(i))];
        }
        set(tensor, values.data(), pass.n_logits());
    };
    passes_.each_pass(ids().data(), segments(), free_rows().data(), kind, [&](const Pass &pass) {
        set_of_logits(io.temperature, in.temperature, pass);
        set_of_logits(io.uniform, in.uniform, pass);
        if (pass.watched) {
            set_of_logits(io.watched, in.watched, pass);
        }
        set(io.pinned, in.pinned.data() + pass.first_row, pass.rows());
        set(io.is_pinned, in.is_pinned.data() + pass.first_row, pass.rows());
        if (pass.n_logits() < pass.rows()) {
            std::vector<int32_t> logits_of(static_cast<size_t>(pass.rows()));
            for (int32_t i = 0; i < pass.n_logits(); ++i) {
                logits_of[static_cast<size_t>(pass.logit_row(i))] = i;
            }
            set(io.logits_of, logits_of.data(), pass.rows());
        }
        passes_.compute_pass();
        results_.resize(static_cast<size_t>(pass.first_row + pass.rows()));
        const std::vector<RowResult> rows = read_results(io, pass.n_logits());
        for (int32_t i = 0; i < pass.n_logits(); ++i) {
            results_[static_cast<size_t>(pass.first_row + pass.logit_row(i))] = rows[static_cast<size_t>(i)];
        }
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
