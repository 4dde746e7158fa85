#include "session/loop.h"

#include "base/error.h"
#include "base/random.h"

#include <algorithm>
#include <chrono>

namespace dg {
namespace {

template <typename T> const T *data_or_null(const std::vector<T> &values) {
    return values.empty() ? nullptr : values.data();
}

} // namespace

RowRules CanvasLoop::Live::rules() const {
    return {data_or_null(pinned), data_or_null(watched), data_or_null(allowed_ends), data_or_null(allowed_ids)};
}

CanvasStart CanvasLoop::start(Live &live, const dg_canvas_options &options) const {
    const dg_config &c = session_.model().config();
    check_sampling(options.sampling);
    if (options.n_rows < 0 || options.n_rows > c.canvas_length) {
        throw Error(DG_ERROR_ARGUMENT, format("n_rows is %d: it must be from 1 to the canvas length, %d, or 0 for that",
                                              options.n_rows, c.canvas_length));
    }
    const int32_t n = options.n_rows > 0 ? options.n_rows : c.canvas_length;
    const auto size = static_cast<size_t>(n);
    const RowRules rules = {options.pinned, options.watched, options.allowed_ends, options.allowed_ids};
    check_rules(rules, n, c.n_vocab);
    if (options.canvas) {
        session_.check_ids("canvas", options.canvas, n);
    }
    live.n_rows = n;
    live.quiet = options.quiet;
    const auto keep = [size](std::vector<int32_t> &out, const int32_t *in) {
        if (in) {
            out.assign(in, in + size);
        }
    };
    keep(live.pinned, options.pinned);
    keep(live.watched, options.watched);
    keep(live.allowed_ends, options.allowed_ends);
    if (options.allowed_ends) {
        live.allowed_ids.assign(options.allowed_ids, options.allowed_ids + options.allowed_ends[n - 1]);
    }
    live.canvas.resize(size);
    for (int32_t i = 0; i < n; ++i) {
        const auto row = static_cast<uint32_t>(i);
        if (options.canvas) {
            live.canvas[row] = rules.is_pinned(i) ? rules.pinned[i] : options.canvas[i];
        } else {
            live.canvas[row] =
                rules.noise(i, draw_id(options.seed, options.canvas_index, 0, row, Stream::FIRST_CANVAS, c.n_vocab));
        }
    }
    live.argmax = live.canvas;
    live.accepted.resize(size);
    live.entropy.resize(size);
    live.logprob.resize(options.watched ? size : 0);
    live.last.steps = step_count(options.sampling);
    live.last.n_rows = n;
    // A canvas that is dropped before its first step has something to show as well.
    live.last.argmax = live.argmax.data();
    live.last.canvas = live.canvas.data();
    live.last.accepted = live.accepted.data();
    live.last.entropy = live.entropy.data();
    live.last.logprob = data_or_null(live.logprob);
    CanvasStart start;
    start.sampling = options.sampling;
    start.n_steps = live.last.steps;
    start.seed = options.seed;
    start.canvas_index = options.canvas_index;
    start.n_rows = n;
    start.rules = live.rules();
    start.canvas = live.canvas.data();
    return start;
}

void CanvasLoop::begin(const dg_canvas_options *options, int32_t n_canvases) {
    active_ = false;
    if (n_canvases < 1 || n_canvases > session_.n_rows()) {
        throw Error(DG_ERROR_ARGUMENT, format("n_canvases is %d: it must be from 1 to the rows of the session, %d",
                                              n_canvases, session_.n_rows()));
    }
    if (session_.n_past() == 0) {
        throw Error(DG_ERROR_ARGUMENT, "nothing is encoded yet: a canvas needs a prefix of at least one token");
    }
    canvases_.clear();
    canvases_.resize(static_cast<size_t>(n_canvases));
    std::vector<CanvasStart> starts;
    int32_t rows = 0;
    for (int32_t i = 0; i < n_canvases; ++i) {
        starts.push_back(start(canvases_[static_cast<size_t>(i)], options[i]));
        rows += starts.back().n_rows;
    }
    if (rows > session_.n_rows()) {
        throw Error(DG_ERROR_ARGUMENT, format("the canvases have %d rows together: this session was made for n_rows %d",
                                              rows, session_.n_rows()));
    }
    step_ = 0;
    session_.stepper().begin(starts);
    active_ = true;
}

size_t CanvasLoop::checked(int32_t index) const {
    if (index < 0 || static_cast<size_t>(index) >= canvases_.size()) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d is not under way", index));
    }
    return static_cast<size_t>(index);
}

dg_step CanvasLoop::Live::shown() const {
    dg_step out = last;
    if (quiet && !last.finished) {
        out.argmax = out.canvas = nullptr;
        out.accepted = nullptr;
        out.entropy = out.logprob = nullptr;
    }
    return out;
}

dg_step CanvasLoop::rows_of(int32_t index) {
    const Live &live = canvases_[checked(index)];
    if (live.goes_on && !active_) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d was ended by an error", index));
    }
    if (live.quiet && live.goes_on) {
        read(static_cast<size_t>(index));
    }
    return live.last;
}

void CanvasLoop::leave(int32_t index) {
    Live &live = canvases_[checked(index)];
    if (!active_) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d is not under way", index));
    }
    rows_of(index); // while they are there
    live.goes_on = false;
}

void CanvasLoop::set_rules(int32_t index, const dg_canvas_rules &rules) {
    Live &live = canvases_[checked(index)];
    if (!session_.stepper().is_placed(index) || (live.goes_on && !active_)) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d is not under way", index));
    }
    if (!live.goes_on && !(live.last.converged && step_ < live.last.steps)) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d makes no further step", index));
    }
    const int32_t n_vocab = session_.model().config().n_vocab;
    check_rules({rules.pinned, nullptr, nullptr, nullptr}, live.n_rows, n_vocab);
    AllowedIds allowed = expand_masks(rules, live.n_rows, n_vocab);
    live.pinned.clear();
    if (rules.pinned) {
        live.pinned.assign(rules.pinned, rules.pinned + live.n_rows);
    }
    live.allowed_ends = std::move(allowed.ends);
    live.allowed_ids = std::move(allowed.ids);
    for (int32_t row = 0; row < live.n_rows; ++row) {
        if (live.rules().is_pinned(row)) {
            live.canvas[static_cast<size_t>(row)] = live.argmax[static_cast<size_t>(row)] = rules.pinned[row];
        }
    }
    live.last.finished = live.last.converged = false;
    live.goes_on = true;
    active_ = true;
    session_.stepper().set_rules(index, live.rules());
}

void CanvasLoop::narrow(int32_t index, int32_t n_rows) {
    Live &live = canvases_[checked(index)];
    if (!live.goes_on || !active_) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d makes no further step", index));
    }
    if (n_rows < 1 || n_rows > live.n_rows) {
        throw Error(DG_ERROR_ARGUMENT,
                    format("n_rows is %d: it must be from 1 to the rows of canvas %d, %d", n_rows, index, live.n_rows));
    }
    if (n_rows == live.n_rows) {
        return;
    }
    session_.stepper().narrow(index, n_rows);
    const auto size = static_cast<size_t>(n_rows);
    live.n_rows = live.last.n_rows = n_rows;
    for (std::vector<int32_t> *rows : {&live.pinned, &live.watched, &live.allowed_ends, &live.canvas, &live.argmax}) {
        rows->resize(std::min(rows->size(), size));
    }
    live.accepted.resize(size);
    live.entropy.resize(size);
    live.logprob.resize(std::min(live.logprob.size(), size));
}

void CanvasLoop::step(const dg_noise *handed_in, dg_step *out) {
    std::vector<int32_t> going;
    for (size_t i = 0; active_ && i < canvases_.size(); ++i) {
        if (canvases_[i].goes_on) {
            going.push_back(static_cast<int32_t>(i));
        }
    }
    if (going.empty()) {
        active_ = false;
        throw Error(DG_ERROR_ARGUMENT, "no canvas is under way: none was begun, all have finished, or another call on "
                                       "the session ended them");
    }
    for (const int32_t i : going) {
        if (handed_in) {
            check_noise(handed_in[i], canvases_[static_cast<size_t>(i)].n_rows, session_.model().config().n_vocab);
        }
    }
    Stepper &stepper = session_.stepper();
    stepper.place(going);
    stepper.pass(handed_in);
    active_ = false; // until it is decided: that fails only where nothing can go on
    const auto began = std::chrono::steady_clock::now();
    stepper.decide(handed_in);
    for (const int32_t i : going) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const CanvasDecision decision = stepper.decision(i);
        live.last.step = step_;
        live.last.mean_entropy = decision.mean_entropy;
        live.last.converged = decision.converged;
        live.last.finished = decision.finished;
        if (!live.quiet || decision.finished) {
            read(static_cast<size_t>(i));
        }
        live.goes_on = !decision.finished;
    }
    if (session_.profiled()) {
        session_.add_sampling_time(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
    bool any = false;
    for (const int32_t i : going) {
        any = any || canvases_[static_cast<size_t>(i)].goes_on;
    }
    for (size_t i = 0; i < canvases_.size(); ++i) {
        out[i] = canvases_[i].shown();
    }
    ++step_;
    active_ = any;
}

void CanvasLoop::read(size_t index) {
    Live &live = canvases_[index];
    session_.stepper().read(static_cast<int32_t>(index), {live.argmax.data(), live.canvas.data(), live.accepted.data(),
                                                          live.entropy.data(), live.logprob.data()});
    const RowRules rules = live.rules();
    for (int32_t row = 0; row < live.n_rows; ++row) {
        const auto at = static_cast<size_t>(row);
        if (rules.is_pinned(row) && (live.canvas[at] != rules.pinned[row] || live.argmax[at] != rules.pinned[row])) {
            throw Error(DG_ERROR_INTERNAL, format("the pinned row %d was changed", row));
        }
    }
}

} // namespace dg
