// The devices that a model may lie on besides the CPU: ggml's GPU backends that were compiled in, and what RPC servers
// offer. All of them are reached through ggml's backend interface; nothing here knows what a device is.
#pragma once

#include "base/backend_handles.h"
#include "ggml-backend.h"

#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace dg {

struct Device {
    ggml_backend_dev_t handle;
    std::string name;     // "CUDA0"; "RPC0" for the first device behind a server
    std::string endpoint; // "host:port" of its RPC server, or empty
    size_t free = 0;      // bytes, as reported when the model was opened
    size_t total = 0;
};

// The devices of one model. Immutable; a device's index is its place here, and the CPU's is size().
class Devices {
  public:
    // `local`: those that are in this machine. Throws IO for a server that does not answer, UNSUPPORTED for servers
    // without an RPC backend, ARGUMENT for what is no host:port.
    Devices(const std::vector<std::string> &rpc, bool local);
    ~Devices();
    Devices(const Devices &) = delete;
    Devices &operator=(const Devices &) = delete;

    size_t size() const { return list_.size(); }
    bool empty() const { return list_.empty(); }
    int32_t cpu() const { return static_cast<int32_t>(list_.size()); }
    const Device &operator[](size_t i) const { return list_[i]; }
    // Whether ggml's CUDA backend has it, in this process; the CPU's index is no such device.
    bool is_cuda(int32_t device) const;
    // Whether it is behind a server: one thread at a time may speak to that.
    bool is_remote(int32_t device) const;
    // Whether each read of its memory is a wait, however little is read: for a server's answer, or for Vulkan's fence.
    bool waits_for_reads(int32_t device) const;
    ggml_backend_buffer_type_t buffer_type(int32_t device) const;
    // Throws UNSUPPORTED where one of ctx's tensors is larger than a device takes; `what` they are, for the message.
    void check_sizes(ggml_context *ctx, int32_t device, const std::string &what) const;
    // Memory for all of ctx's tensors on a device. Throws as check_sizes does, and MEMORY where the device refuses.
    BufferPtr allocate(ggml_context *ctx, int32_t device, const std::string &what) const;
    // One for each, the CPU last.
    std::vector<BackendPtr> start() const;
    // Puts the device that had this index last.
    void move_to_end(size_t index);
    // What is known of the servers, for messages; empty without any.
    std::string servers() const;

    // ggml speaks to a server over one connection, whoever speaks, and takes no lock: a second thread's words would
    // mix with the first one's. While a Turn lives, no other thread speaks to the servers of these devices.
    class Turn {
      public:
        explicit Turn(const Devices &devices);

      private:
        std::vector<std::unique_lock<std::recursive_mutex>> locks_;
    };

  private:
    bool is_of(int32_t device, const char *backend) const;
    bool add_server(const std::string &endpoint);

    std::vector<Device> list_;
    std::vector<BufferPtr> held_; // a byte on each server: ggml hangs up when it holds nothing there
    std::vector<std::recursive_mutex *> connections_; // in one order for all, so that two models cannot lock each other
};

// Bytes of all tensors that were made in `ctx`.
size_t tensor_bytes(ggml_context *ctx);

// Serves this machine's devices (its CPU when there are none) to other machines, for as long as the
// process lives; ggml prints a line for each client. Whoever can reach the port can read and write this process's
// memory: there is no authentication. Throws IO when the port cannot be had.
void serve(const std::string &endpoint, int32_t n_threads);

} // namespace dg
