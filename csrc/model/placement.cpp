#include "model/placement.h"

#include "base/error.h"
#include "file/names.h"
#include "model/needs.h"
#include "model/signal_copy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

namespace dg {
namespace {

// What a device's driver, its context, loaded kernels and a matrix library's workspace take: 0.3 to 0.5 GB with CUDA,
// by reports; more is taken by a desktop on the same card.
constexpr size_t RESERVE = 500'000'000;

constexpr const char *INSTALL = "make a build that has one, in the source folder: CMAKE_ARGS=\"-DGGML_CUDA=ON\" (or "
                                "-DGGML_METAL, -DGGML_VULKAN, -DGGML_HIP) pip install .; or name RPC servers";

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
               (options_.offload_kv ? static_cast<double>(l.cache) : 0.0) +
               static_cast<double>(options_.adapters) / static_cast<double>(sizes_.layers.size());
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

Sizes sizes_of(const GgufFiles &files, const dg_config &config, const std::vector<dg_layer_config> &layers,
               const dg_model_options &options) {
    Sizes sizes;
    std::vector<size_t> cache;
    sizes.needs = session_needs(config, layers, options.expected, cache);
    sizes.head = options.signal_copy ? signal_copy_bytes(config) : 0;
    for (const size_t bytes : cache) {
        sizes.layers.push_back({0, 0, bytes});
    }
    for (const FileTensor &found : files.tensors()) {
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

std::unique_ptr<const Devices> open_devices(const dg_model_options &options) {
    check_placing(options);
    if (options.n_gpu_layers == 0) {
        if (options.n_rpc > 0 || options.n_tensor_split > 0 || options.main_gpu >= 0) {
            throw Error(DG_ERROR_ARGUMENT, "n_gpu_layers is 0: rpc, tensor_split and main_gpu have nothing to place");
        }
        return std::make_unique<const Devices>(std::vector<std::string>(), false);
    }
    auto devices = std::make_unique<Devices>(
        std::vector<std::string>(options.rpc, options.rpc + static_cast<size_t>(options.n_rpc)), true);
    const bool asked = options.n_gpu_layers > 0 || options.n_tensor_split > 0 || options.main_gpu >= 0;
    if (devices->empty() && asked) {
        throw Error(
            DG_ERROR_UNSUPPORTED,
            format("n_gpu_layers, tensor_split and main_gpu need a device, and there is none here; %s", INSTALL));
    }
    if (options.main_gpu >= 0) {
        if (static_cast<size_t>(options.main_gpu) >= devices->size()) {
            throw Error(DG_ERROR_UNSUPPORTED, format("main_gpu is %d: there are %zu devices; %s", options.main_gpu,
                                                     devices->size(), INSTALL));
        }
        devices->move_to_end(static_cast<size_t>(options.main_gpu));
    }
    return devices;
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
