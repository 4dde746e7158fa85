#include "session/host_stepper.h"

#include "base/random.h"

#include <algorithm>

namespace dg {

HostStepper::Live::Live(const CanvasStart &from)
    : start(from), canvas(from.canvas, from.canvas + from.n_rows), argmax(canvas), accepted(canvas.size()),
      entropy(canvas.size()), logprob(from.rules.watched ? canvas.size() : 0), uniform(canvas.size()),
      renoise(canvas.size()) {
    history.start(start.sampling.stability_threshold);
}

StepOutput HostStepper::Live::output() {
    return {argmax.data(), canvas.data(), accepted.data(), entropy.data(), logprob.empty() ? nullptr : logprob.data()};
}

dg_noise HostStepper::Live::noise(const dg_noise *handed_in, int32_t n_vocab) {
    if (handed_in) {
        return *handed_in;
    }
    for (int32_t i = 0; i < start.n_rows; ++i) {
        const auto row = static_cast<uint32_t>(i);
        const auto at = static_cast<uint32_t>(step);
        uniform[row] = draw_uniform(start.seed, start.canvas_index, at, row);
        renoise[row] = draw_id(start.seed, start.canvas_index, at, row, Stream::RENOISE, n_vocab);
    }
    return {uniform.data(), renoise.data()};
}

void HostStepper::Live::shorten(int32_t n) {
    const auto size = static_cast<size_t>(n);
    start.n_rows = n;
    canvas.resize(size);
    argmax.resize(size);
    accepted.resize(size);
    entropy.resize(size);
    logprob.resize(std::min(logprob.size(), size));
    uniform.resize(size);
    renoise.resize(size);
    history.shorten(n);
}

void HostStepper::Live::judge() {
    decision.mean_entropy = mean_entropy(entropy.data(), start.rules.pinned, start.n_rows);
    const bool stable = history.observe(argmax.data(), start.n_rows);
    decision.converged = stable && decision.mean_entropy < start.sampling.confidence_threshold;
    ++step;
    decision.finished = decision.converged || step == start.n_steps;
}

void HostStepper::declare(ggml_context *head) {
    const bool here = passes_.model().placement().head == passes_.model().devices().cpu();
    logits_.declare(head, here);
    if (!here) {
        io_.sample.make(head, passes_.figures().pass_rows); // texts are scored where the logits are
        declare_device_rows(head);
    }
}

void HostStepper::declare_device_rows(ggml_context *head) {
    if (passes_.model().config().has_self_conditioning) {
        io_.flat_rows = ggml_new_tensor_1d(head, GGML_TYPE_I32, passes_.figures().pass_rows);
        io_.flat_logits = ggml_new_tensor_1d(head, GGML_TYPE_I32, passes_.figures().pass_rows);
    }
}

void HostStepper::start(const std::vector<CanvasStart> &canvases) {
    canvases_.clear();
    for (const CanvasStart &canvas : canvases) {
        canvases_.emplace_back(canvas);
    }
    scratch_.kernels = passes_.model().kernels();
}

std::vector<int32_t> HostStepper::ids() const {
    std::vector<int32_t> all;
    for (const int32_t i : placed_) {
        const std::vector<int32_t> &canvas = canvases_[static_cast<size_t>(i)].canvas;
        all.insert(all.end(), canvas.begin(), canvas.end());
    }
    return all;
}

void HostStepper::close_up(const std::vector<int32_t> &which) {
    int32_t from = 0;
    int32_t to = 0;
    auto next = which.begin();
    for (const int32_t i : placed_) {
        if (next != which.end() && *next == i) {
            if (from != to) {
                logits_.move_signal(from, to, kept_of(i));
            }
            to += kept_of(i);
            ++next;
        }
        from += rows_of(i);
    }
}

void HostStepper::pass(const dg_noise *noise) {
    samples_.clear();
    if (logits_.are_here()) {
        logits_.denoise(ids().data(), segments(), free_rows().data(), [this](const Pass &pass) {
            // Rows that stand one after the other go where they belong, from the last one on: no place is further
            // ahead.
            float *logits = logits_.rows() + int64_t{pass.first_row} * n_vocab();
            for (int32_t i = pass.n_logits() - 1; i >= 0 && pass.logit_row(i) != i; --i) {
                std::copy_n(logits + int64_t{i} * n_vocab(), n_vocab(),
                            logits + int64_t{pass.logit_row(i)} * n_vocab());
            }
        });
        return;
    }
    std::vector<DeviceRows::Row> rows;
    for (const int32_t i : placed_) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const dg_noise draws = live.noise(noise ? noise + i : nullptr, n_vocab());
        const auto t = static_cast<float>(temperature(live.start.sampling, live.step));
        for (int32_t row = 0; row < live.start.n_rows; ++row) {
            rows.push_back({&live.start.rules, row, t, draws.uniform[row], gathers(live.start.rules)});
        }
    }
    std::vector<RowSample> samples(rows.size());
    logits_.denoise(ids().data(), segments(), free_rows().data(),
                    [&](const Pass &pass) { device_rows_.take(pass, rows, samples); });
    // Only now, so that a step that was cancelled between two passes may be repeated.
    if (passes_.model().config().has_self_conditioning) {
        logits_.take_next_signal(static_cast<int32_t>(rows.size()));
    }
    samples_ = std::move(samples);
}

void HostStepper::decide(const dg_noise *noise) {
    if (!samples_.empty()) {
        put_samples(noise);
        return;
    }
    signal_stands_ = false;
    float *logits = logits_.rows();
    for (const int32_t i : placed_) {
        Live &live = canvases_[static_cast<size_t>(i)];
        sample_step(logits, live.start.n_rows, n_vocab(), live.start.sampling, live.step,
                    live.noise(noise ? noise + i : nullptr, n_vocab()), live.start.rules, passes_.n_threads(), scratch_,
                    live.output());
        logits += int64_t{live.start.n_rows} * n_vocab();
        live.judge();
    }
}

void HostStepper::put_samples(const dg_noise *noise) {
    if (std::any_of(samples_.begin(), samples_.end(), [](const RowSample &sample) { return sample.draw < 0; })) {
        throw_unsound_row();
    }
    const RowSample *sample = samples_.data();
    for (const int32_t i : placed_) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const CanvasStart &start = live.start;
        scratch_.draws.resize(static_cast<size_t>(start.n_rows));
        for (int32_t row = 0; row < start.n_rows; ++row) {
            put_row(*sample++, row, scratch_, live.output());
        }
        finish_step(start.n_rows, start.sampling, live.noise(noise ? noise + i : nullptr, n_vocab()), start.rules,
                    scratch_, live.output());
        live.judge();
    }
}

void HostStepper::set_rules(int32_t index, const RowRules &rules) {
    Live &live = canvases_[static_cast<size_t>(index)];
    live.start.rules = rules;
    for (int32_t row = 0; row < live.start.n_rows; ++row) {
        if (rules.is_pinned(row)) {
            live.canvas[static_cast<size_t>(row)] = live.argmax[static_cast<size_t>(row)] = rules.pinned[row];
        }
    }
    live.history.start(live.start.sampling.stability_threshold);
    live.decision.converged = live.decision.finished = false;
}

CanvasDecision HostStepper::decision(int32_t index) const { return canvases_[static_cast<size_t>(index)].decision; }

void HostStepper::read(int32_t index, const CanvasRows &out) {
    const Live &live = canvases_[static_cast<size_t>(index)];
    std::copy(live.argmax.begin(), live.argmax.end(), out.argmax);
    std::copy(live.canvas.begin(), live.canvas.end(), out.canvas);
    std::copy(live.accepted.begin(), live.accepted.end(), out.accepted);
    std::copy(live.entropy.begin(), live.entropy.end(), out.entropy);
    std::copy(live.logprob.begin(), live.logprob.end(), out.logprob);
}

} // namespace dg
