#include "model/placement.h"

#include "base/error.h"
#include "file/names.h"
#include "model/model.h"
#include "pass/cache.h"
#include "pass/graph.h"
#include "sample/sampler_graph.h"
#include "session/kernel_device.h"
#include "session/session.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>

namespace dg {
namespace {

// What a device's driver, its context, loaded kernels and a matrix library's workspace take: 0.3 to 0.5 GB with CUDA,
// by reports; more is taken by a desktop on the same card.
constexpr size_t RESERVE = 500'000'000;

void check_range(const char *name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
        throw Error(DG_ERROR_ARGUMENT,
                    format("%s is %" PRId64 ": it must be from %" PRId64 " to %" PRId64, name, value, least, most));
    }
}

void check_figures(const dg_config &c, const std::vector<dg_layer_config> &layers) {
    check_range("n_layer", c.n_layer, 1, MAX_LAYERS);
    check_range("n_embd", c.n_embd, 1, MAX_WIDTH);
    check_range("n_vocab", c.n_vocab, 2, MAX_VOCAB);
    check_range("n_head", c.n_head, 1, MAX_HEADS);
    check_range("n_ff", c.n_ff, 1, MAX_WIDTH);
    check_range("n_ff_exp", c.n_ff_exp, 1, MAX_WIDTH);
    check_range("n_expert", c.n_expert, 1, MAX_EXPERTS);
    check_range("n_expert_used", c.n_expert_used, 1, c.n_expert);
    check_range("sliding_window", c.sliding_window, 2, MAX_CONTEXT);
    check_range("canvas_length", c.canvas_length, 1, MAX_CANVAS);
    check_range("n_ctx_train", c.n_ctx_train, c.canvas_length + 1, MAX_CONTEXT);
    for (const dg_layer_config &layer : layers) {
        check_range("n_head_kv", layer.n_head_kv, 1, c.n_head);
        check_range("head_dim", layer.head_dim, 1, MAX_HEAD_DIM);
    }
}

// Of a session on devices, which compute with ggml's operators. Numbers of floats are at least what ggml's allocator
// comes to for the largest graphs (tests/test_fit.py): it leaves holes, so that some tensors count more often than they
// exist.
class Needs {
  public:
    Needs(const dg_config &config, const std::vector<dg_layer_config> &layers, const dg_session_options &options)
        : c_(config), layers_(layers), n_ctx_(Session::context_size(config, options.n_ctx)),
          n_batch_(Session::batch_size(n_ctx_, options.n_batch)), n_rows_(Session::row_count(config, options.n_rows)),
          pass_rows_(Session::canvas_pass(config, n_rows_)), type_kv_(Session::cache_type(options.type_kv)),
          with_kernels_(options.sampler == DG_SAMPLER_AUTO || options.sampler == DG_SAMPLER_KERNELS) {}

    std::vector<size_t> cache() const {
        const size_t alignment = ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
        std::vector<size_t> bytes;
        for (const dg_layer_config &layer : layers_) {
            KvCache::check_type(type_kv_, layer.head_dim);
            const size_t row = ggml_row_size(type_kv_, int64_t{layer.head_dim} * layer.n_head_kv);
            bytes.push_back(2 * GGML_PAD(row * static_cast<size_t>(slots(layer.sliding)), alignment));
        }
        return bytes;
    }

    dg_needs sums() const {
        dg_needs needs = {};
        needs.n_ctx = n_ctx_;
        needs.n_rows = n_rows_;
        // What is drawn by operators has the logits of a pass, not of all rows.
        const int32_t rows = with_kernels_ ? n_rows_ : pass_rows_;
        needs.logits = sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(c_.n_vocab);
        needs.passes = sizeof(float) * static_cast<size_t>(inputs() + intermediate());
        needs.sampling = sampling();
        return needs;
    }

  private:
    const dg_config &c_;
    const std::vector<dg_layer_config> &layers_;
    const int32_t n_ctx_;
    const int32_t n_batch_;
    const int32_t n_rows_;
    const int32_t pass_rows_; // of canvases, in one graph
    const ggml_type type_kv_;
    const bool with_kernels_; // the sampler's, or nobody knows

    int64_t largest_pass() const { return std::max(n_batch_, pass_rows_); }

    int64_t slots(bool sliding) const {
        return KvCache::slots_for(c_, sliding, n_ctx_, std::max(n_batch_, c_.canvas_length) + 1);
    }

    // Session::make_io: positions, slots, masks of half precision, ids, several segments' outputs, the signal.
    int64_t inputs() const {
        int64_t widest = 0;
        for (const dg_layer_config &layer : layers_) {
            widest = std::max(widest, int64_t{layer.head_dim} * c_.n_head);
        }
        const int64_t masks = largest_pass() * (slots(false) + slots(true)) / 2;
        return 4 * std::max<int64_t>(largest_pass(), n_rows_) + masks + widest * pass_rows_ +
               int64_t{n_rows_} * c_.n_embd;
    }

    // The most floats that exist at a time within a layer.
    int64_t intermediate() const {
        const int64_t chunk = std::min(n_batch_, n_ctx_ - c_.canvas_length);
        const int64_t rows = std::max<int64_t>(chunk, pass_rows_);
        const int64_t experts = c_.n_expert_used * (5 * int64_t{c_.n_ff_exp} + c_.n_embd) + c_.n_expert;
        int64_t most = rows * (std::max(experts, 4 * int64_t{c_.n_ff}) + 4 * int64_t{c_.n_embd});
        for (const dg_layer_config &layer : layers_) {
            most = std::max({most, attention(layer, n_ctx_ - c_.canvas_length, chunk, chunk),
                             attention(layer, n_ctx_, c_.canvas_length, pass_rows_)});
        }
        return most;
    }

    // Scores [visible, rows of a segment, heads]; V in float32 as it lies in the cache, and transposed; beside them
    // what waits, and its holes, of all rows.
    int64_t attention(const dg_layer_config &layer, int64_t n_visible, int64_t segment, int64_t rows) const {
        const int64_t visible = std::min(n_visible, slots(layer.sliding));
        const int64_t q = int64_t{layer.head_dim} * c_.n_head;
        const int64_t kv = int64_t{layer.head_dim} * layer.n_head_kv;
        return visible * (segment * c_.n_head + 2 * kv) + rows * (2 * q + 2 * kv + 2 * int64_t{c_.n_embd});
    }

    // The sampler's operators are part of a pass's graph, and share its memory; the graph that makes a signal of logits
    // stands by itself.
    size_t sampling() const {
        const auto rows = static_cast<size_t>(n_rows_);
        size_t bytes = SampleIo::bytes(pass_rows_) + rows * (static_cast<size_t>(c_.n_embd) + 1) * sizeof(float);
        size_t in_pass = sample_bytes(c_.n_vocab, pass_rows_);
        if (c_.has_self_conditioning) {
            const size_t soft = soft_embedding_bytes(c_, pass_rows_);
            in_pass = std::max(in_pass, soft);
            bytes += soft + sizeof(float) * static_cast<size_t>(pass_rows_) * static_cast<size_t>(c_.n_vocab);
        }
        if (with_kernels_) {
            bytes += cuda::DeviceLoop::candidate_bytes(n_rows_, candidate_capacity(c_));
        }
        const size_t pass = sizeof(float) * static_cast<size_t>(intermediate());
        return bytes + (in_pass > pass ? in_pass - pass : 0);
    }
};

// Looks for the plan with the most on devices that has room.
class Planner {
  public:
    Planner(const Sizes &sizes, const std::vector<Room> &rooms, const dg_model_options &options)
        : sizes_(sizes), options_(options) {
        for (size_t i = 0; i < rooms.size(); ++i) {
            const bool main = i + 1 == rooms.size();
            const dg_needs &needs = sizes.needs;
            double left = static_cast<double>(rooms[i].free);
            for (const size_t taken : {RESERVE, needs.passes}) {
                left -= static_cast<double>(taken);
            }
            for (const size_t taken : {sizes.head, needs.logits, needs.sampling}) {
                left -= main ? static_cast<double>(taken) : 0.0;
            }
            left_.push_back(left);
            remote_ = remote_ || rooms[i].remote;
        }
        share_ = shares();
    }

    Plan plan() const {
        const auto n_layers = static_cast<int32_t>(sizes_.layers.size());
        const int32_t least = std::min(options_.n_cpu_moe, n_layers);
        if (options_.n_gpu_layers >= 0) {
            return {least, cut(std::min(options_.n_gpu_layers, n_layers), least)};
        }
        const int32_t most = remote_ ? least : n_layers;
        for (int32_t n_cpu_moe = least; n_cpu_moe <= most; ++n_cpu_moe) {
            const Plan whole = {n_cpu_moe, cut(n_layers, n_cpu_moe)};
            if (fits(whole)) {
                return whole;
            }
        }
        for (int32_t n = n_layers - 1; n > 0; --n) {
            const Plan part = {most, cut(n, most)};
            if (fits(part)) {
                return part;
            }
        }
        return {most, {}};
    }

  private:
    const Sizes &sizes_;
    const dg_model_options &options_;
    std::vector<double> left_; // for layers, on each device; negative where there is too little for anything
    std::vector<double> share_;
    bool remote_ = false;

    std::vector<double> shares() const {
        if (options_.n_tensor_split == 0) {
            std::vector<double> room;
            for (const double left : left_) {
                room.push_back(std::max(0.0, left));
            }
            const double all = std::accumulate(room.begin(), room.end(), 0.0);
            return all > 0.0 ? room : std::vector<double>(room.size(), 1.0);
        }
        if (static_cast<size_t>(options_.n_tensor_split) != left_.size()) {
            throw Error(DG_ERROR_ARGUMENT, format("tensor_split has %d parts: there are %zu devices",
                                                  options_.n_tensor_split, left_.size()));
        }
        std::vector<double> parts(options_.tensor_split, options_.tensor_split + options_.n_tensor_split);
        const auto bad = [](double part) { return !std::isfinite(part) || part < 0.0; };
        if (std::any_of(parts.begin(), parts.end(), bad) || std::accumulate(parts.begin(), parts.end(), 0.0) <= 0.0) {
            throw Error(DG_ERROR_ARGUMENT, "tensor_split must hold numbers >= 0, one of them more");
        }
        // The caller counts devices as they are listed; here the main one has moved to the end.
        if (options_.main_gpu >= 0) {
            std::rotate(parts.begin() + options_.main_gpu, parts.begin() + options_.main_gpu + 1, parts.end());
        }
        return parts;
    }

    double bytes(size_t layer, int32_t n_cpu_moe) const {
        const dg_layer_bytes &l = sizes_.layers[layer];
        const bool experts_too = layer >= static_cast<size_t>(n_cpu_moe);
        return static_cast<double>(l.weights) + (experts_too ? static_cast<double>(l.experts) : 0.0) +
               (options_.offload_kv ? static_cast<double>(l.cache) : 0.0);
    }

    // Cuts the last `n` layers into stretches whose sizes are as the shares; device of each of them.
    std::vector<int32_t> cut(int32_t n, int32_t n_cpu_moe) const {
        const size_t first = sizes_.layers.size() - static_cast<size_t>(n);
        double together = 0.0;
        for (size_t i = first; i < sizes_.layers.size(); ++i) {
            together += bytes(i, n_cpu_moe);
        }
        const double all = std::accumulate(share_.begin(), share_.end(), 0.0);
        std::vector<int32_t> device;
        double done = 0.0;
        for (size_t i = first; i < sizes_.layers.size(); ++i) {
            const double size = bytes(i, n_cpu_moe);
            const double middle = (done + size / 2) / together * all;
            size_t d = 0;
            for (double end = share_[0]; d + 1 < share_.size() && middle >= end; end += share_[d]) {
                ++d;
            }
            device.push_back(static_cast<int32_t>(d));
            done += size;
        }
        return device;
    }

    // The main device has the head, whether it has layers or not.
    bool fits(const Plan &plan) const {
        std::vector<double> left = left_;
        std::vector<bool> used(left.size());
        used.back() = true;
        const size_t first = sizes_.layers.size() - plan.devices.size();
        for (size_t i = 0; i < plan.devices.size(); ++i) {
            const auto device = static_cast<size_t>(plan.devices[i]);
            left[device] -= bytes(first + i, plan.n_cpu_moe);
            used[device] = true;
        }
        for (size_t i = 0; i < left.size(); ++i) {
            if (used[i] && left[i] < 0.0) {
                return false;
            }
        }
        return true;
    }
};

} // namespace

size_t reserve() { return RESERVE; }

dg_needs session_needs(const dg_config &config, const std::vector<dg_layer_config> &layers,
                       const dg_session_options &session, std::vector<size_t> &cache) {
    check_figures(config, layers);
    const Needs needs(config, layers, session);
    cache = needs.cache();
    return needs.sums();
}

Sizes sizes_of(const Model &model, const dg_session_options &session) {
    std::vector<dg_layer_config> layers;
    for (const LayerWeights &l : model.weights().layers) {
        layers.push_back({l.sliding, static_cast<int32_t>(l.n_head_kv), static_cast<int32_t>(l.head_dim)});
    }
    Sizes sizes;
    std::vector<size_t> cache;
    sizes.needs = session_needs(model.config(), layers, session, cache);
    for (const size_t bytes : cache) {
        sizes.layers.push_back({0, 0, bytes});
    }
    for (const FileTensor &found : model.files().tensors()) {
        const std::string name = ggml_get_name(found.tensor);
        const size_t bytes = ggml_nbytes(found.tensor);
        const size_t layer =
            name.compare(0, 4, "blk.") == 0 ? static_cast<size_t>(std::strtol(name.c_str() + 4, nullptr, 10)) : 0;
        if (name == names::TOKEN_EMBD) {
            sizes.head += bytes;
        } else if (layer < sizes.layers.size()) {
            const bool experts = name.find("_exps.weight") != std::string::npos;
            (experts ? sizes.layers[layer].experts : sizes.layers[layer].weights) += bytes;
        }
    }
    return sizes;
}

void check_placing(const dg_model_options &options) {
    const auto check = [](const char *name, int32_t value, int32_t least, const char *meaning) {
        if (value < least) {
            throw Error(DG_ERROR_ARGUMENT, format("%s is %d: it must be %s", name, value, meaning));
        }
    };
    check("n_gpu_layers", options.n_gpu_layers, -1, "-1 (as many as fit) or more");
    check("n_cpu_moe", options.n_cpu_moe, 0, "0 or more");
    check("main_gpu", options.main_gpu, -1, "-1 (the last) or more");
}

Plan plan_layers(const Sizes &sizes, const std::vector<Room> &rooms, const dg_model_options &options) {
    if (rooms.empty() || options.n_gpu_layers == 0) {
        return {std::min(options.n_cpu_moe, static_cast<int32_t>(sizes.layers.size())), {}};
    }
    if (options.main_gpu >= 0 && static_cast<size_t>(options.main_gpu) >= rooms.size()) {
        throw Error(DG_ERROR_ARGUMENT, format("main_gpu is %d: there are %zu devices", options.main_gpu, rooms.size()));
    }
    return Planner(sizes, rooms, options).plan();
}

Placement place_layers(const Sizes &sizes, const Devices &devices, const dg_model_options &options) {
    std::vector<Room> rooms;
    for (size_t i = 0; i < devices.size(); ++i) {
        rooms.push_back({devices[i].free, !devices[i].endpoint.empty()});
    }
    const Plan plan = plan_layers(sizes, rooms, options);
    const size_t n_layers = sizes.layers.size();
    const int32_t cpu = devices.cpu();
    Placement placement;
    placement.layers.assign(n_layers, cpu);
    placement.experts = placement.cache = placement.layers;
    placement.input = placement.head = cpu;
    if (plan.devices.empty()) {
        return placement;
    }
    const size_t first = n_layers - plan.devices.size();
    for (size_t i = first; i < n_layers; ++i) {
        const int32_t device = plan.devices[i - first];
        placement.layers[i] = device;
        placement.experts[i] = i < static_cast<size_t>(plan.n_cpu_moe) ? cpu : device;
        placement.cache[i] = options.offload_kv ? device : cpu;
    }
    placement.head = cpu - 1;
    // On another device than the head the embedding would be there twice; the file's own pages serve as well.
    placement.input = placement.layers.front() == placement.head ? placement.head : cpu;
    return placement;
}

} // namespace dg
