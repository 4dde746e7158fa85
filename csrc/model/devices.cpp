#include "model/devices.h"

#include "base/error.h"
#include "model/local_devices.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <thread>

namespace dg {
namespace {

using AddServer = ggml_backend_reg_t (*)(const char *endpoint);
using StartServer = void (*)(const char *endpoint, const char *cache_dir, size_t n_threads, size_t n_devices,
                             ggml_backend_dev_t *devices);

void *rpc_function(const char *name) {
    const ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    void *function = rpc ? ggml_backend_reg_get_proc_address(rpc, name) : nullptr;
    if (!function) {
        throw Error(DG_ERROR_UNSUPPORTED,
                    "this build has no RPC backend; in the source folder, CMAKE_ARGS=\"-DGGML_RPC=ON\" pip install . "
                    "makes one that has it");
    }
    return function;
}

void check_endpoint(const std::string &endpoint) {
    const size_t colon = endpoint.find(':');
    const std::string port = colon == std::string::npos ? "" : endpoint.substr(colon + 1);
    const bool digits = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
    if (colon == 0 || !digits || std::stoi(port) < 1 || std::stoi(port) > 65535) {
        throw Error(DG_ERROR_ARGUMENT, "rpc names \"" + endpoint + "\": it must be host:port, as in 127.0.0.1:50052");
    }
}

std::recursive_mutex &connection(const std::string &endpoint) {
    static std::mutex mutex;
    static std::map<std::string, std::recursive_mutex> connections;
    const std::lock_guard<std::mutex> lock(mutex);
    return connections[endpoint];
}

// This machine's GPUs that a model may lie on.
std::vector<ggml_backend_dev_t> local_gpus() {
    std::vector<ggml_backend_dev_t> handles;
    std::vector<LocalDevice> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        const ggml_backend_dev_t handle = ggml_backend_dev_get(i);
        const enum ggml_backend_dev_type type = ggml_backend_dev_type(handle);
        if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            ggml_backend_dev_props properties = {};
            ggml_backend_dev_get_props(handle, &properties);
            handles.push_back(handle);
            devices.push_back(
                {type == GGML_BACKEND_DEVICE_TYPE_IGPU, properties.device_id ? properties.device_id : ""});
        }
    }
    std::vector<ggml_backend_dev_t> usable;
    for (const size_t i : usable_devices(devices)) {
        usable.push_back(handles[i]);
    }
    return usable;
}

Device described(ggml_backend_dev_t handle, const std::string &endpoint) {
    Device device = {handle, ggml_backend_dev_name(handle), endpoint};
    ggml_backend_dev_memory(handle, &device.free, &device.total);
    return device;
}

} // namespace

Devices::Devices(const std::vector<std::string> &rpc, bool local) {
    for (const std::string &endpoint : rpc) {
        check_endpoint(endpoint);
        if (std::count(rpc.begin(), rpc.end(), endpoint) > 1) {
            throw Error(DG_ERROR_ARGUMENT, "rpc names " + endpoint + " twice");
        }
        connections_.push_back(&connection(endpoint));
    }
    std::sort(connections_.begin(), connections_.end());
    const Turn turn(*this);
    for (const std::string &endpoint : rpc) {
        bool answered = false;
        try {
            answered = add_server(endpoint);
        } catch (const Error &error) {
            if (error.status() != DG_ERROR_DEVICE) { // it took the connection, and said nothing
                throw;
            }
        }
        if (!answered) {
            throw Error(DG_ERROR_IO, "no RPC server answers at " + endpoint +
                                         "; start one there with: pydiffgguf "
                                         "rpc-server --port N");
        }
    }
    if (local && has_gpu_failed()) {
        throw gpu_failure("it did so earlier");
    }
    if (local) {
        for (const ggml_backend_dev_t handle : local_gpus()) {
            list_.push_back(described(handle, ""));
        }
    }
}

bool Devices::add_server(const std::string &endpoint) {
    const auto add = reinterpret_cast<AddServer>(rpc_function("ggml_backend_rpc_add_server"));
    // ggml remembers a server that answered once; only its devices' memory is asked for again, and 0 is no answer.
    const ggml_backend_reg_t server = add(endpoint.c_str());
    Device last = {};
    for (size_t i = 0; server && i < ggml_backend_reg_dev_count(server); ++i) {
        last = described(ggml_backend_reg_dev_get(server, i), endpoint);
        list_.push_back(last);
    }
    if (last.total == 0) {
        return false;
    }
    held_.emplace_back(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(last.handle), 1));
    return true;
}

Devices::~Devices() {
    const Turn turn(*this);
    held_.clear();
}

bool Devices::is_of(int32_t device, const char *backend) const {
    return device != cpu() &&
           std::strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(list_[static_cast<size_t>(device)].handle)),
                       backend) == 0;
}

bool Devices::is_cuda(int32_t device) const { return is_of(device, "CUDA"); }

bool Devices::is_remote(int32_t device) const {
    return device != cpu() && !list_[static_cast<size_t>(device)].endpoint.empty();
}

bool Devices::waits_for_reads(int32_t device) const { return is_remote(device) || is_of(device, "Vulkan"); }

ggml_backend_buffer_type_t Devices::buffer_type(int32_t device) const {
    return device == cpu() ? ggml_backend_cpu_buffer_type()
                           : ggml_backend_dev_buffer_type(list_[static_cast<size_t>(device)].handle);
}

void Devices::check_sizes(ggml_context *ctx, int32_t device, const std::string &what) const {
    if (device == cpu()) {
        return;
    }
    const Device &d = list_[static_cast<size_t>(device)];
    for (ggml_tensor *t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        // Vulkan's answer for a tensor that is no operation's result goes by its size alone. Where it is no, ggml gives
        // up at the first graph that has the tensor.
        if (!ggml_backend_dev_supports_op(d.handle, t)) {
            throw Error(DG_ERROR_UNSUPPORTED,
                        format("device %s takes no tensor of %zu bytes, and there is one among %s; "
                               "n_gpu_layers=0 leaves all to the CPU",
                               d.name.c_str(), ggml_nbytes(t), what.c_str()));
        }
    }
}

BufferPtr Devices::allocate(ggml_context *ctx, int32_t device, const std::string &what) const {
    check_sizes(ctx, device, what);
    const ggml_backend_buffer_type_t type = buffer_type(device);
    BufferPtr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx, type));
    if (!buffer) {
        const std::string name = device == cpu() ? "the CPU" : "device " + list_[static_cast<size_t>(device)].name;
        throw Error(DG_ERROR_MEMORY, format("%s refused %zu bytes for %s%s", name.c_str(),
                                            ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, type), what.c_str(),
                                            device == cpu() ? "" : "; fewer n_gpu_layers need less"));
    }
    return buffer;
}

std::vector<BackendPtr> Devices::start() const {
    std::vector<BackendPtr> backends;
    for (const Device &device : list_) {
        backends.emplace_back(ggml_backend_dev_init(device.handle, nullptr));
        if (!backends.back()) {
            throw Error(DG_ERROR_MEMORY, "device " + device.name + " was refused");
        }
    }
    backends.emplace_back(ggml_backend_cpu_init());
    if (!backends.back()) {
        throw Error(DG_ERROR_MEMORY, "memory for ggml's CPU backend was refused");
    }
    return backends;
}

void Devices::move_to_end(size_t index) {
    const auto first = list_.begin() + static_cast<std::ptrdiff_t>(index);
    std::rotate(first, first + 1, list_.end());
}

std::string Devices::servers() const {
    std::string text;
    for (const Device &device : list_) {
        if (!device.endpoint.empty() && text.find(device.endpoint) == std::string::npos) {
            text += (text.empty() ? "" : ", ") + device.endpoint;
        }
    }
    return text;
}

Devices::Turn::Turn(const Devices &devices) {
    for (std::recursive_mutex *connection : devices.connections_) {
        locks_.emplace_back(*connection);
    }
}

size_t tensor_bytes(ggml_context *ctx) {
    size_t bytes = 0;
    for (ggml_tensor *t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        bytes += ggml_nbytes(t);
    }
    return bytes;
}

void serve(const std::string &endpoint, int32_t n_threads) {
    check_endpoint(endpoint);
    const auto start = reinterpret_cast<StartServer>(rpc_function("ggml_backend_rpc_start_server"));
    std::vector<ggml_backend_dev_t> devices = local_gpus();
    if (devices.empty()) {
        devices.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    }
    const unsigned threads =
        n_threads > 0 ? static_cast<unsigned>(n_threads) : std::max(1u, std::thread::hardware_concurrency());
    ggml_log_set(
        [](ggml_log_level level, const char *text, void *) {
            if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR || level == GGML_LOG_LEVEL_CONT) {
                std::fputs(text, stderr);
            }
        },
        nullptr);
    start(endpoint.c_str(), nullptr, threads, devices.size(), devices.data());
    throw Error(DG_ERROR_IO, "cannot listen on " + endpoint +
                                 ": the port is taken, or the address is not one of this "
                                 "machine's");
}

} // namespace dg
