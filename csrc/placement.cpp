#include "placement.h"

#include "cache.h"
#include "error.h"
#include "model.h"
#include "names.h"
#include "sampler_graph.h"
#include "session.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dg {
namespace {

// Of what a device reports free, for what nobody counts: contexts, alignment, other programs.
constexpr double USABLE = 0.95;

size_t layer_bytes(const Sizes &sizes, size_t layer, const dg_model_options &options) {
    const Sizes::Layer &l = sizes.layers[layer];
    const bool experts_too = static_cast<int64_t>(layer) >= options.n_cpu_moe;
    return l.weights + (experts_too ? l.experts : 0) + (options.offload_kv ? l.cache : 0);
}

// What is left for layers on each device.
std::vector<double> rooms(const Sizes &sizes, const Devices &devices) {
    std::vector<double> room;
    for (size_t i = 0; i < devices.size(); ++i) {
        const bool main = i + 1 == devices.size();
        const double taken = static_cast<double>(sizes.compute + (main ? sizes.head + sizes.sampler : 0));
        room.push_back(std::max(0.0, USABLE * static_cast<double>(devices[i].free) - taken));
    }
    return room;
}

std::vector<double> shares(const std::vector<double> &room, const Devices &devices, const dg_model_options &options) {
    if (options.n_tensor_split == 0) {
        const double all = std::accumulate(room.begin(), room.end(), 0.0);
        return all > 0.0 ? room : std::vector<double>(room.size(), 1.0);
    }
    if (static_cast<size_t>(options.n_tensor_split) != devices.size()) {
        throw Error(DG_ERROR_ARGUMENT,
                    format("tensor_split has %d parts: there are %zu devices", options.n_tensor_split, devices.size()));
    }
    std::vector<double> parts(options.tensor_split, options.tensor_split + options.n_tensor_split);
    const auto bad = [](double part) { return !std::isfinite(part) || part < 0.0; };
    if (std::any_of(parts.begin(), parts.end(), bad) || std::accumulate(parts.begin(), parts.end(), 0.0) <= 0.0) {
        throw Error(DG_ERROR_ARGUMENT, "tensor_split must hold numbers >= 0, one of them more");
    }
    // The caller counts devices as they are listed; here the main one has moved to the end.
    if (options.main_gpu >= 0) {
        std::rotate(parts.begin() + options.main_gpu, parts.begin() + options.main_gpu + 1, parts.end());
    }
    return parts;
}

// Cuts the last `n` layers into stretches whose sizes are as `shares`; device of each of them.
std::vector<int32_t> cut(const Sizes &sizes, const std::vector<double> &share, size_t n,
                         const dg_model_options &options) {
    const size_t first = sizes.layers.size() - n;
    double bytes = 0.0;
    for (size_t i = first; i < sizes.layers.size(); ++i) {
        bytes += static_cast<double>(layer_bytes(sizes, i, options));
    }
    const double all = std::accumulate(share.begin(), share.end(), 0.0);
    std::vector<int32_t> device;
    double done = 0.0;
    for (size_t i = first; i < sizes.layers.size(); ++i) {
        const double size = static_cast<double>(layer_bytes(sizes, i, options));
        const double middle = (done + size / 2) / bytes * all;
        size_t d = 0;
        for (double end = share[0]; d + 1 < share.size() && middle >= end; end += share[d]) {
            ++d;
        }
        device.push_back(static_cast<int32_t>(d));
        done += size;
    }
    return device;
}

bool fits(const Sizes &sizes, const std::vector<double> &room, const std::vector<int32_t> &device,
          const dg_model_options &options) {
    std::vector<double> left = room;
    const size_t first = sizes.layers.size() - device.size();
    for (size_t i = 0; i < device.size(); ++i) {
        left[static_cast<size_t>(device[i])] -= static_cast<double>(layer_bytes(sizes, first + i, options));
    }
    return std::all_of(left.begin(), left.end(), [](double bytes) { return bytes >= 0.0; });
}

} // namespace

Sizes sizes_of(const Model &model, const dg_session_options &options) {
    const dg_config &c = model.config();
    const int64_t n_ctx = Session::context_size(model, options.n_ctx);
    const int64_t rows = std::max(options.n_batch, c.canvas_length);
    const auto slots = [&](bool sliding) {
        return int64_t{KvCache::slots_for(c, sliding, static_cast<int32_t>(n_ctx), static_cast<int32_t>(rows) + 1)};
    };
    Sizes sizes;
    int64_t q_width = 0;
    int64_t kv_floats = 0; // of the largest layer's visible keys and values
    for (const LayerWeights &l : model.weights().layers) {
        const int64_t width = l.head_dim * l.n_head_kv;
        Sizes::Layer layer;
        layer.cache =
            2 * ggml_row_size(Session::cache_type(options.type_kv), width) * static_cast<size_t>(slots(l.sliding));
        sizes.layers.push_back(layer);
        q_width = std::max(q_width, l.head_dim * c.n_head);
        kv_floats = std::max(kv_floats, 4 * width * slots(l.sliding));
    }
    for (const FileTensor &found : model.files().tensors()) {
        const std::string name = ggml_get_name(found.tensor);
        const size_t bytes = ggml_nbytes(found.tensor);
        const size_t layer =
            name.compare(0, 4, "blk.") == 0 ? static_cast<size_t>(std::atoi(name.c_str() + 4)) : sizes.layers.size();
        if (layer < sizes.layers.size()) {
            const bool experts = name.find("_exps.weight") != std::string::npos;
            (experts ? sizes.layers[layer].experts : sizes.layers[layer].weights) += bytes;
        } else if (name == names::TOKEN_EMBD) {
            const int64_t n_vocab = found.tensor->ne[1];
            sizes.head += bytes + sizeof(float) * static_cast<size_t>(n_vocab * std::max(256, c.canvas_length));
        } else if (!sizes.layers.empty()) { // norms and the self-conditioning MLP, which go with the first layer
            sizes.layers.front().weights += bytes;
        }
    }
    // Floats of a row at its widest: scores with their softmax, or the experts, beside what waits for them.
    const int64_t attention = 2 * c.n_head * n_ctx + 3 * q_width;
    const int64_t experts = int64_t{c.n_expert_used} * (6 * int64_t{c.n_ff_exp} + 2 * int64_t{c.n_embd});
    const int64_t widest = std::max({attention, experts, 6 * int64_t{c.n_ff}}) + 8 * int64_t{c.n_embd};
    const int64_t masks = rows * (slots(false) + slots(true)) / 2; // half precision
    sizes.compute = sizeof(float) * static_cast<size_t>(rows * widest + kv_floats + masks);
    sizes.sampler = sample_bytes();
    return sizes;
}

Placement place_layers(const Sizes &sizes, const Devices &devices, const dg_model_options &options) {
    const size_t n_layers = sizes.layers.size();
    const int32_t cpu = devices.cpu();
    Placement placement;
    placement.layers.assign(n_layers, cpu);
    placement.experts = placement.cache = placement.layers;
    placement.input = placement.head = cpu;
    if (devices.empty() || options.n_gpu_layers == 0) {
        return placement;
    }
    const std::vector<double> room = rooms(sizes, devices);
    const std::vector<double> share = shares(room, devices, options);
    const bool automatic = options.n_gpu_layers < 0;
    size_t n = automatic ? n_layers : std::min(n_layers, static_cast<size_t>(options.n_gpu_layers));
    std::vector<int32_t> device = cut(sizes, share, n, options);
    while (automatic && n > 0 && !fits(sizes, room, device, options)) {
        device = cut(sizes, share, --n, options);
    }
    if (n == 0) {
        return placement;
    }
    const size_t first = n_layers - n;
    for (size_t i = 0; i < n; ++i) {
        placement.layers[first + i] = device[i];
        placement.experts[first + i] = static_cast<int64_t>(first + i) < options.n_cpu_moe ? cpu : device[i];
        placement.cache[first + i] = options.offload_kv ? device[i] : cpu;
    }
    placement.head = cpu - 1;
    // On another device than the head the embedding would be there twice; the file's own pages serve as well.
    placement.input = placement.layers.front() == placement.head ? placement.head : cpu;
    return placement;
}

} // namespace dg
