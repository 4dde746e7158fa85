#include "cuda/device_loop.h"

#include "base/error.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dg::cuda {
namespace {

// Places in one allocation, each aligned for any type.
class Layout {
  public:
    template <typename T> size_t add(size_t n) {
        const size_t at = size_;
        size_ += (n * sizeof(T) + 15) / 16 * 16;
        return at;
    }
    size_t size() const { return size_; }

  private:
    size_t size_ = 0;
};

// Where in their memory the rows' candidates are.
struct CandidateRoom {
    Layout layout;
    size_t tokens;
    size_t probabilities;
    size_t counts;

    CandidateRoom(int32_t n_rows, int32_t capacity)
        : tokens(layout.add<int32_t>(static_cast<size_t>(n_rows) * static_cast<size_t>(capacity))),
          probabilities(layout.add<float>(static_cast<size_t>(n_rows) * static_cast<size_t>(capacity))),
          counts(layout.add<int32_t>(static_cast<size_t>(n_rows))) {}
};

// Each row's ids ascending and once: draws go by id.
void sort_allowed(const RowRules &rules, int32_t n_rows, std::vector<int32_t> &ends, std::vector<int32_t> &ids) {
    for (int32_t row = 0; row < n_rows; ++row) {
        const int32_t n = rules.n_allowed(row);
        const auto first = static_cast<std::ptrdiff_t>(ids.size());
        if (n > 0) {
            ids.insert(ids.end(), rules.allowed(row), rules.allowed(row) + n);
            std::sort(ids.begin() + first, ids.end());
            ids.erase(std::unique(ids.begin() + first, ids.end()), ids.end());
        }
        ends.push_back(static_cast<int32_t>(ids.size()));
    }
}

} // namespace

int32_t candidate_capacity(int32_t n_vocab) { return std::min(CAPACITY, n_vocab); }

size_t candidate_bytes(int32_t n_rows, int32_t capacity) { return CandidateRoom(n_rows, capacity).layout.size(); }

DeviceLoop::DeviceLoop(Device &device, const Target &target) : device_(device), target_(target) {
    if (target.n_vocab > MAX_VOCAB) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    format("a vocabulary of %d: the device's sampler takes %d at most", target.n_vocab, MAX_VOCAB));
    }
    step_.n_vocab = target.n_vocab;
    step_.softcap = target.softcap;
    step_.logits = target.logits;
    if (!target.signal) {
        return;
    }
    step_.keeps_logits = true; // for rows that turn out to be flat
    step_.n_embd = target.n_embd;
    step_.signal = target.signal;
    if (!target.embedding) {
        return;
    }
    const CandidateRoom room(target.n_rows, target.capacity);
    auto *data = static_cast<char *>(target.candidates);
    step_.tokens = reinterpret_cast<int32_t *>(data + room.tokens);
    step_.probabilities = reinterpret_cast<float *>(data + room.probabilities);
    step_.counts = reinterpret_cast<int32_t *>(data + room.counts);
    step_.capacity = target.capacity;
    step_.lost = target.lost;
    step_.embedding = static_cast<const uint8_t *>(target.embedding);
    step_.embedding_type = target.embedding_type;
    step_.embedding_scale = std::sqrt(static_cast<float>(target.n_embd));
}

DeviceLoop::~DeviceLoop() = default;

Canvas DeviceLoop::make_canvas(const CanvasStart &start, int32_t first_row) {
    if (start.n_rows > MAX_ROWS) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    format("a canvas of %d rows: the device's sampler takes %d at most", start.n_rows, MAX_ROWS));
    }
    const auto n = static_cast<size_t>(start.n_rows);
    const RowRules &rules = start.rules;
    std::vector<int32_t> sorted_ends;
    std::vector<int32_t> sorted_ids;
    sort_allowed(rules, start.n_rows, sorted_ends, sorted_ids);
    Layout layout;
    const size_t argmax = layout.add<int32_t>(n); // the first four are read together
    const size_t accepted = layout.add<uint8_t>(n);
    const size_t entropy = layout.add<double>(n);
    const size_t logprob = layout.add<double>(n);
    const size_t last_argmax = layout.add<int32_t>(n);
    const size_t draws = layout.add<int32_t>(n);
    const size_t uniform = layout.add<double>(n);
    const size_t renoise = layout.add<int32_t>(n);
    const size_t pinned = layout.add<int32_t>(n);
    const size_t watched = layout.add<int32_t>(n);
    const size_t ends = layout.add<int32_t>(n);
    const size_t ids = layout.add<int32_t>(sorted_ids.size());
    memories_.push_back(std::make_unique<Memory>(device_, layout.size()));
    char *data = memories_.back()->data();
    uniform_.push_back(reinterpret_cast<double *>(data + uniform));
    renoise_.push_back(reinterpret_cast<int32_t *>(data + renoise));
    const auto room = [data](size_t at) { return reinterpret_cast<int32_t *>(data + at); };
    const auto copy = [&](size_t at, const int32_t *from, size_t count) -> const int32_t * {
        if (!from) {
            return nullptr;
        }
        if (count > 0) {
            device_.upload(data + at, from, count * sizeof(int32_t));
        }
        return room(at);
    };
    Canvas c = {};
    c.seed = start.seed;
    c.t_min = start.sampling.t_min;
    c.t_max = start.sampling.t_max;
    c.entropy_bound = start.sampling.entropy_bound;
    c.confidence_threshold = start.sampling.confidence_threshold;
    c.canvas_index = start.canvas_index;
    c.steps = start.sampling.steps;
    c.n_steps = start.n_steps;
    c.stability_threshold = start.sampling.stability_threshold;
    c.n_rows = start.n_rows;
    c.first_row = first_row;
    c.n_vocab = target_.n_vocab;
    c.pinned = copy(pinned, rules.pinned, n);
    c.watched = copy(watched, rules.watched, n);
    if (rules.allowed_ends) {
        c.allowed_ends = copy(ends, sorted_ends.data(), n);
        c.allowed_ids = copy(ids, sorted_ids.data(), sorted_ids.size());
    }
    c.ids = target_.ids + first_row;
    device_.upload(c.ids, start.canvas, n * sizeof(int32_t));
    // What is read before the first step: the canvas as its own argmax, nothing accepted, no entropy.
    const std::vector<char> zeros(layout.size());
    device_.upload(data, zeros.data(), pinned);
    c.argmax = room(argmax);
    device_.upload(c.argmax, start.canvas, n * sizeof(int32_t));
    c.last_argmax = room(last_argmax);
    c.draws = room(draws);
    c.accepted = reinterpret_cast<uint8_t *>(data + accepted);
    c.entropy = reinterpret_cast<double *>(data + entropy);
    c.logprob = rules.watched ? reinterpret_cast<double *>(data + logprob) : nullptr;
    return c;
}

void DeviceLoop::begin(const std::vector<CanvasStart> &starts) {
    canvases_.clear();
    placed_.clear();
    memories_.clear();
    forget_places();
    rules_.clear();
    uniform_.clear();
    renoise_.clear();
    step_.n_canvases = 0;
    step_.n_rows = 0;
    std::vector<Canvas> canvases;
    int32_t n_rows = 0;
    for (const CanvasStart &start : starts) {
        if (start.n_rows > target_.n_rows - n_rows) {
            throw Error(DG_ERROR_ARGUMENT, format("the canvases have more rows than the session's %d", target_.n_rows));
        }
        canvases.push_back(make_canvas(start, n_rows));
        n_rows += start.n_rows;
    }
    canvases_memory_ = std::make_unique<Memory>(device_, starts.size() * sizeof(Canvas));
    places_memory_ = std::make_unique<Memory>(device_, static_cast<size_t>(n_rows) * sizeof(int32_t));
    canvases_ = std::move(canvases);
    for (size_t i = 0; i < starts.size(); ++i) {
        placed_.push_back(static_cast<int32_t>(i));
    }
    upload_canvases();
}

void DeviceLoop::upload_canvases() {
    step_.canvases = reinterpret_cast<Canvas *>(canvases_memory_->data());
    step_.n_canvases = static_cast<int32_t>(canvases_.size());
    step_.n_rows = canvases_.empty() ? 0 : canvases_.back().first_row + canvases_.back().n_rows;
    if (!canvases_.empty()) {
        device_.upload(step_.canvases, canvases_.data(), canvases_.size() * sizeof(Canvas));
    }
}

size_t DeviceLoop::place_of(int32_t index) const {
    const auto found = std::find(placed_.begin(), placed_.end(), index);
    if (found == placed_.end()) {
        throw Error(DG_ERROR_ARGUMENT, format("canvas %d is not under way", index));
    }
    return static_cast<size_t>(found - placed_.begin());
}

void DeviceLoop::place(const std::vector<int32_t> &which) {
    if (which == placed_) {
        return;
    }
    std::vector<Canvas> canvases;
    int32_t to = 0;
    for (const int32_t index : which) {
        Canvas c = canvases_[place_of(index)];
        if (c.first_row != to) {
            int32_t *ids = target_.ids + to;
            device_.move(ids, c.ids, static_cast<size_t>(c.n_rows) * sizeof(int32_t));
            if (step_.signal) {
                const auto width = static_cast<size_t>(target_.n_embd);
                device_.move(step_.signal + static_cast<size_t>(to) * width,
                             step_.signal + static_cast<size_t>(c.first_row) * width,
                             static_cast<size_t>(c.n_rows) * width * sizeof(float));
            }
            c.ids = ids;
            c.first_row = to;
        }
        to += c.n_rows;
        canvases.push_back(c);
    }
    canvases_ = std::move(canvases);
    placed_ = which;
    forget_places();
    upload_canvases();
}

void DeviceLoop::set_rules(int32_t index, const RowRules &rules) {
    Canvas &c = canvases_[place_of(index)];
    const auto n = static_cast<size_t>(c.n_rows);
    std::vector<int32_t> sorted_ends;
    std::vector<int32_t> sorted_ids;
    sort_allowed(rules, c.n_rows, sorted_ends, sorted_ids);
    Layout layout;
    const size_t pinned = layout.add<int32_t>(n);
    const size_t ends = layout.add<int32_t>(n);
    const size_t ids = layout.add<int32_t>(sorted_ids.size());
    auto memory = std::make_unique<Memory>(device_, layout.size());
    const auto put = [&](size_t at, const std::vector<int32_t> &from) {
        auto *to = reinterpret_cast<int32_t *>(memory->data() + at);
        if (!from.empty()) {
            device_.upload(to, from.data(), from.size() * sizeof(int32_t));
        }
        return to;
    };
    c.pinned = rules.pinned ? put(pinned, std::vector<int32_t>(rules.pinned, rules.pinned + n)) : nullptr;
    c.allowed_ends = rules.allowed_ends ? put(ends, sorted_ends) : nullptr;
    c.allowed_ids = rules.allowed_ends ? put(ids, sorted_ids) : nullptr;
    for (int32_t row = 0; row < c.n_rows; ++row) {
        if (rules.is_pinned(row)) {
            device_.upload(c.ids + row, rules.pinned + row, sizeof(int32_t));
            device_.upload(c.argmax + row, rules.pinned + row, sizeof(int32_t));
        }
    }
    const std::vector<int32_t> nothing(n, -1); // that any argmax differs from
    device_.upload(c.last_argmax, nothing.data(), n * sizeof(int32_t));
    c.n_equal = 0;
    c.decision.converged = c.decision.finished = 0;
    rules_.resize(memories_.size());
    rules_[static_cast<size_t>(index)] = std::move(memory);
    upload_canvases();
}

void DeviceLoop::forget_places() {
    places_.clear();
    step_.places = nullptr;
}

void DeviceLoop::set_places(const std::vector<int32_t> &places) {
    if (places == places_) {
        return;
    }
    forget_places();
    if (std::is_sorted(places.begin(), places.end()) && places.front() == 0 && places.back() + 1 == step_.n_rows) {
        return; // each has that of its number
    }
    device_.upload(places_memory_->data(), places.data(), places.size() * sizeof places[0]);
    places_ = places;
    step_.places = reinterpret_cast<const int32_t *>(places_memory_->data());
}

void DeviceLoop::step(const dg_noise *noise) {
    bool changed = false;
    for (size_t i = 0; i < canvases_.size(); ++i) {
        Canvas &c = canvases_[i];
        const auto index = static_cast<size_t>(placed_[i]);
        const auto n = static_cast<size_t>(c.n_rows);
        changed = changed || (c.uniform != nullptr) != (noise != nullptr);
        c.uniform = noise ? uniform_[index] : nullptr;
        c.renoise = noise ? renoise_[index] : nullptr;
        if (noise) {
            device_.upload(uniform_[index], noise[index].uniform, n * sizeof(double));
            device_.upload(renoise_[index], noise[index].renoise, n * sizeof(int32_t));
        }
    }
    if (changed) {
        upload_canvases();
    }
    device_.launch(step_);
    device_.download(canvases_.data(), step_.canvases, canvases_.size() * sizeof(Canvas));
    for (const Canvas &c : canvases_) {
        if (c.decision.broken) {
            throw_unsound_row();
        }
    }
}

const Canvas::Decision &DeviceLoop::decision(int32_t index) const { return canvases_[place_of(index)].decision; }

bool DeviceLoop::has_flat_rows() const {
    return (step_.signal && !step_.embedding) ||
           std::any_of(canvases_.begin(), canvases_.end(), [](const Canvas &c) { return c.decision.flat != 0; });
}

FlatRows DeviceLoop::flat_rows() const {
    FlatRows flat;
    if (!has_flat_rows()) {
        return flat;
    }
    std::vector<int32_t> counts(static_cast<size_t>(step_.n_rows), step_.capacity + 1);
    if (step_.counts) {
        device_.download(counts.data(), step_.counts, counts.size() * sizeof counts[0]);
    }
    for (int32_t row = 0; row < step_.n_rows; ++row) {
        if (counts[static_cast<size_t>(row)] > step_.capacity) {
            flat.rows.push_back(row);
            flat.logits.push_back(places_.empty() ? row : places_[static_cast<size_t>(row)]);
        }
    }
    return flat;
}

void DeviceLoop::read(int32_t index, const CanvasRows &out) {
    const Canvas &c = canvases_[place_of(index)];
    const auto n = static_cast<size_t>(c.n_rows);
    // What a step leaves stands in one piece, the ids apart.
    const auto *first = reinterpret_cast<const char *>(c.argmax);
    const auto *last =
        c.logprob ? reinterpret_cast<const char *>(c.logprob + n) : reinterpret_cast<const char *>(c.entropy + n);
    std::vector<char> piece(static_cast<size_t>(last - first));
    device_.download(piece.data(), first, piece.size());
    const auto copy = [&](auto *to, const auto *from) {
        if (to && from) {
            std::memcpy(to, piece.data() + (reinterpret_cast<const char *>(from) - first), n * sizeof *to);
        }
    };
    copy(out.argmax, c.argmax);
    copy(out.accepted, c.accepted);
    copy(out.entropy, c.entropy);
    copy(out.logprob, c.logprob);
    if (out.canvas) {
        device_.download(out.canvas, c.ids, n * sizeof *out.canvas);
    }
}

} // namespace dg::cuda
