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

dg_noise CanvasLoop::Live::philox_noise(int32_t n_vocab) {
    for (int32_t i = 0; i < n_rows; ++i) {
        const auto row = static_cast<uint32_t>(i);
        const auto step = static_cast<uint32_t>(last.step);
        uniform[row] = draw_uniform(seed, canvas_index, step, row);
        renoise[row] = draw_id(seed, canvas_index, step, row, Stream::RENOISE, n_vocab);
    }
    return {uniform.data(), renoise.data()};
}

void CanvasLoop::start(Live &live, const dg_canvas_options &options) const {
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
    live.sampling = options.sampling;
    live.seed = options.seed;
    live.canvas_index = options.canvas_index;
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
    live.uniform.resize(size);
    live.renoise.resize(size);
    live.history.start(live.sampling.stability_threshold);
    live.last.steps = step_count(live.sampling);
    live.last.n_rows = n;
    // A canvas that is dropped before its first step has something to show as well.
    live.last.argmax = live.argmax.data();
    live.last.canvas = live.canvas.data();
    live.last.accepted = live.accepted.data();
    live.last.entropy = live.entropy.data();
    live.last.logprob = data_or_null(live.logprob);
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
    placed_.clear();
    for (int32_t i = 0; i < n_canvases; ++i) {
        start(canvases_[static_cast<size_t>(i)], options[i]);
        placed_.push_back(i);
    }
    if (rows(placed_) > session_.n_rows()) {
        throw Error(DG_ERROR_ARGUMENT, format("the canvases have %d rows together: this session was made for n_rows %d",
                                              rows(placed_), session_.n_rows()));
    }
    step_ = 0;
    session_.condition_on_nothing();
    if (has_kernels()) {
        begin_kernels();
    }
    conditioned_ = true;
    active_ = true;
}

int32_t CanvasLoop::rows(const std::vector<int32_t> &which) const {
    int32_t n = 0;
    for (const int32_t i : which) {
        n += canvases_[static_cast<size_t>(i)].n_rows;
    }
    return n;
}

// Closes up the rows of the self-conditioning signal where a canvas between others goes on no more. `which` is a
// subset of placed_, in its order.
void CanvasLoop::place(const std::vector<int32_t> &which) {
    if (has_kernels()) {
        session_.kernels().place(which);
        placed_ = which;
        return;
    }
    int32_t from = 0;
    int32_t to = 0;
    auto next = which.begin();
    for (const int32_t i : placed_) {
        const int32_t n = canvases_[static_cast<size_t>(i)].n_rows;
        if (next != which.end() && *next == i) {
            if (from != to) {
                session_.move_condition(from, to, n);
            }
            to += n;
            ++next;
        }
        from += n;
    }
    placed_ = which;
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
    if (has_kernels() && live.quiet && live.goes_on) {
        read_kernels(index);
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
    const bool placed = std::find(placed_.begin(), placed_.end(), index) != placed_.end();
    if (!placed || (live.goes_on && !active_)) {
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
    live.history.start(live.sampling.stability_threshold);
    live.last.finished = live.last.converged = false;
    live.goes_on = true;
    active_ = true;
    if (has_kernels()) {
        session_.kernels().set_rules(index, live.rules());
    }
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
    const int32_t n_vocab = session_.model().config().n_vocab;
    std::vector<int32_t> segments;
    ids_.clear();
    for (const int32_t i : going) {
        const Live &live = canvases_[static_cast<size_t>(i)];
        if (handed_in) {
            check_noise(handed_in[i], live.n_rows, n_vocab);
        }
        segments.push_back(live.n_rows);
        ids_.insert(ids_.end(), live.canvas.begin(), live.canvas.end());
    }
    if (!conditioned_) {
        session_.condition_on_logits(rows(placed_));
        conditioned_ = true;
    }
    place(going);
    if (has_kernels()) {
        sample_by_kernels(going, segments, handed_in);
    } else if (stays_on_device(going)) {
        sample_there(going, segments, handed_in);
    } else {
        sample_here(going, segments, handed_in);
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

// Sets of allowed ids are the one rule that operators do not know: logits come here for them.
bool CanvasLoop::stays_on_device(const std::vector<int32_t> &going) const {
    return session_.sampler() == DG_SAMPLER_OPERATORS && std::all_of(going.begin(), going.end(), [this](int32_t i) {
               return canvases_[static_cast<size_t>(i)].allowed_ends.empty();
           });
}

StepOutput CanvasLoop::Live::output() {
    return {argmax.data(), canvas.data(), accepted.data(), entropy.data(), logprob.empty() ? nullptr : logprob.data()};
}

dg_noise CanvasLoop::noise_of(Live &live, const dg_noise *handed_in) const {
    live.last.step = step_;
    return handed_in ? *handed_in : live.philox_noise(session_.model().config().n_vocab);
}

void CanvasLoop::sample_here(const std::vector<int32_t> &going, const std::vector<int32_t> &segments,
                             const dg_noise *handed_in) {
    session_.denoise(ids_.data(), segments);
    conditioned_ = false;
    active_ = false; // until the sampler is through: it fails only on broken logits, and those end the canvases
    const auto began = std::chrono::steady_clock::now();
    const int32_t n_vocab = session_.model().config().n_vocab;
    float *logits = session_.logits();
    for (const int32_t i : going) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const dg_noise noise = noise_of(live, handed_in ? handed_in + i : nullptr);
        sample_step(logits, live.n_rows, n_vocab, live.sampling, step_, noise, live.rules(), session_.n_threads(),
                    scratch_, live.output());
        logits += static_cast<int64_t>(live.n_rows) * n_vocab;
        judge(live);
    }
    if (session_.profiled()) {
        session_.add_sampling_time(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
}

void CanvasLoop::sample_there(const std::vector<int32_t> &going, const std::vector<int32_t> &segments,
                              const dg_noise *handed_in) {
    std::vector<dg_noise> noises;
    RowInputs inputs;
    const bool any_watched = std::any_of(
        going.begin(), going.end(), [this](int32_t i) { return !canvases_[static_cast<size_t>(i)].watched.empty(); });
    for (const int32_t i : going) {
        Live &live = canvases_[static_cast<size_t>(i)];
        noises.push_back(noise_of(live, handed_in ? handed_in + i : nullptr));
        const RowRules rules = live.rules();
        const auto t = static_cast<float>(temperature(live.sampling, step_));
        for (int32_t row = 0; row < live.n_rows; ++row) {
            inputs.temperature.push_back(t);
            inputs.uniform.push_back(uniform_in_float(noises.back().uniform[row]));
            inputs.pinned.push_back(rules.is_pinned(row) ? rules.pinned[row] : 0);
            inputs.is_pinned.push_back(rules.is_pinned(row) ? 1.0f : 0.0f);
            if (any_watched) {
                inputs.watched.push_back(rules.watched ? std::max(0, rules.watched[row]) : 0);
            }
        }
    }
    const std::vector<RowResult> results = session_.denoise_and_sample(ids_.data(), segments, inputs);
    active_ = false; // as above
    const RowResult *result = results.data();
    for (size_t k = 0; k < going.size(); ++k) {
        Live &live = canvases_[static_cast<size_t>(going[k])];
        take_rows(result, live.n_rows, live.rules(), scratch_, live.output());
        result += live.n_rows;
        finish_step(live.n_rows, live.sampling, noises[k], live.rules(), scratch_, live.output());
        judge(live);
    }
}

void CanvasLoop::begin_kernels() {
    std::vector<cuda::DeviceLoop::Start> starts;
    for (const Live &live : canvases_) {
        starts.push_back({live.sampling, live.last.steps, live.seed, live.canvas_index, live.n_rows, live.rules(),
                          live.canvas.data()});
    }
    session_.kernels().begin(starts);
}

void CanvasLoop::read_kernels(int32_t index) {
    Live &live = canvases_[static_cast<size_t>(index)];
    const StepOutput out = live.output();
    session_.kernels().read(index, {out.argmax, out.canvas, out.accepted, out.entropy, out.logprob});
    check_pins(live);
}

// Between the passes nothing but decisions comes here, and the rows of what somebody watches.
void CanvasLoop::sample_by_kernels(const std::vector<int32_t> &going, const std::vector<int32_t> &segments,
                                   const dg_noise *handed_in) {
    session_.denoise_placed(segments);
    active_ = false; // as above
    const auto began = std::chrono::steady_clock::now();
    session_.kernels().step(handed_in);
    conditioned_ = !session_.kernels().wants_dense_signal();
    for (const int32_t i : going) {
        Live &live = canvases_[static_cast<size_t>(i)];
        const cuda::Canvas::Decision &decision = session_.kernels().decision(i);
        live.last.step = step_;
        live.last.mean_entropy = decision.mean_entropy;
        live.last.converged = decision.converged != 0;
        live.last.finished = decision.finished != 0;
        if (!live.quiet || live.last.finished) {
            read_kernels(i);
        }
        live.goes_on = !live.last.finished;
    }
    if (session_.profiled()) {
        session_.add_sampling_time(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
}

void CanvasLoop::check_pins(const Live &live) const {
    const RowRules rules = live.rules();
    for (int32_t row = 0; row < live.n_rows; ++row) {
        const auto at = static_cast<size_t>(row);
        if (rules.is_pinned(row) && (live.canvas[at] != rules.pinned[row] || live.argmax[at] != rules.pinned[row])) {
            throw Error(DG_ERROR_INTERNAL, format("the pinned row %d was changed", row));
        }
    }
}

void CanvasLoop::judge(Live &live) const {
    check_pins(live);
    const RowRules rules = live.rules();
    dg_step &out = live.last;
    out.mean_entropy = mean_entropy(live.entropy.data(), rules.pinned, live.n_rows);
    const bool stable = live.history.observe(live.argmax.data(), live.n_rows);
    out.converged = stable && out.mean_entropy < live.sampling.confidence_threshold;
    out.finished = out.converged || step_ + 1 == out.steps;
    live.goes_on = !out.finished;
}

} // namespace dg
