#include "loop.h"

#include "error.h"
#include "random.h"

namespace dg {

CanvasLoop::CanvasLoop(Session &session) : session_(session) {
    const auto n = static_cast<size_t>(session.model().config().canvas_length);
    canvas_.resize(n);
    argmax_.resize(n);
    accepted_.resize(n);
    entropy_.resize(n);
    uniform_.resize(n);
    renoise_.resize(n);
}

void CanvasLoop::begin(const dg_canvas_options &options) {
    const dg_config &c = session_.model().config();
    active_ = false;
    check_sampling(options.sampling);
    if (session_.n_past() == 0) {
        throw Error(DG_ERROR_ARGUMENT, "nothing is encoded yet: a canvas needs a prefix of at least one token");
    }
    pinned_.clear();
    if (options.pinned) {
        for (int32_t i = 0; i < c.canvas_length; ++i) {
            if (options.pinned[i] < -1 || options.pinned[i] >= c.n_vocab) {
                throw Error(DG_ERROR_ARGUMENT, format("pinned[%d] is %d: it must be -1 (free) or a token id up to %d",
                                                      i, options.pinned[i], c.n_vocab - 1));
            }
        }
        pinned_.assign(options.pinned, options.pinned + c.canvas_length);
    }
    if (options.canvas) {
        session_.check_ids("canvas", options.canvas, c.canvas_length);
        canvas_.assign(options.canvas, options.canvas + c.canvas_length);
    } else {
        for (int32_t i = 0; i < c.canvas_length; ++i) {
            canvas_[static_cast<size_t>(i)] = draw_id(options.seed, options.canvas_index, 0, static_cast<uint32_t>(i),
                                                      Stream::FIRST_CANVAS, c.n_vocab);
        }
    }
    for (size_t i = 0; i < pinned_.size(); ++i) {
        if (pinned_[i] >= 0) {
            canvas_[i] = pinned_[i];
        }
    }
    sampling_ = options.sampling;
    seed_ = options.seed;
    canvas_index_ = options.canvas_index;
    history_.start(sampling_.stability_threshold);
    step_ = 0;
    session_.condition_on_nothing();
    conditioned_ = true;
    active_ = true;
}

dg_noise CanvasLoop::philox_noise() {
    const int32_t n_vocab = session_.model().config().n_vocab;
    const auto step = static_cast<uint32_t>(step_);
    for (size_t i = 0; i < canvas_.size(); ++i) {
        const auto row = static_cast<uint32_t>(i);
        uniform_[i] = draw_uniform(seed_, canvas_index_, step, row);
        renoise_[i] = draw_id(seed_, canvas_index_, step, row, Stream::RENOISE, n_vocab);
    }
    return {uniform_.data(), renoise_.data()};
}

dg_step CanvasLoop::step(const dg_noise *handed_in) {
    if (!active_) {
        throw Error(DG_ERROR_ARGUMENT, "no canvas is under way: it was not begun, has finished, or another call on the "
                                       "session ended it");
    }
    const dg_config &c = session_.model().config();
    if (handed_in) {
        check_noise(*handed_in, c.canvas_length, c.n_vocab);
    }
    if (!conditioned_) {
        session_.condition_on_logits();
        conditioned_ = true;
    }
    session_.denoise(canvas_.data());
    conditioned_ = false;

    active_ = false; // until the sampler is through: it fails only on broken logits, and those end the canvas
    const dg_noise noise = handed_in ? *handed_in : philox_noise();
    const int32_t *pinned = pinned_.empty() ? nullptr : pinned_.data();
    sample_step(session_.logits(), c.canvas_length, c.n_vocab, sampling_, step_, noise, pinned, session_.n_threads(),
                scratch_, {argmax_.data(), canvas_.data(), accepted_.data(), entropy_.data()});

    dg_step out = {};
    out.step = step_;
    out.steps = step_count(sampling_);
    out.mean_entropy = mean_entropy(entropy_.data(), pinned, c.canvas_length);
    const bool stable = history_.observe(argmax_.data(), c.canvas_length);
    out.converged = stable && out.mean_entropy < sampling_.confidence_threshold;
    out.finished = out.converged || step_ + 1 == out.steps;
    out.argmax = argmax_.data();
    out.canvas = canvas_.data();
    out.accepted = accepted_.data();
    out.entropy = entropy_.data();
    ++step_;
    active_ = !out.finished;
    return out;
}

} // namespace dg
