#include "base/log_capture.h"

#include "base/gpu_failure.h"

#include "ggml.h"

#include <cstring>
#include <mutex>

namespace dg {
namespace {

thread_local LogCapture *current_log = nullptr;
thread_local bool guarded = false;
thread_local std::string gpu_error; // what ggml's GPU backends log before they give up: "CUDA error: out of memory"

struct Listener {
    dg_log log = nullptr;
    void *user = nullptr;
};

std::mutex listener_mutex;
Listener listener;

void on_log(ggml_log_level level, const char *text, void * /*user*/) {
    if (current_log) {
        current_log->append(text);
    }
    if (level == GGML_LOG_LEVEL_ERROR && std::strstr(text, " error: ")) {
        gpu_error.assign(text, std::strcspn(text, "\n"));
    }
    Listener told;
    {
        const std::lock_guard<std::mutex> lock(listener_mutex);
        told = listener;
    }
    if (told.log) {
        told.log(static_cast<int32_t>(level), text, told.user);
    }
}

void on_abort(const char *message) {
    if (guarded && std::strstr(message, "Remote RPC server")) {
        throw Error(DG_ERROR_DEVICE, "the connection to an RPC server was lost");
    }
    if (guarded && !gpu_error.empty() && std::strstr(message, " error")) {
        std::string reason;
        std::swap(reason, gpu_error);
        if (reason.find("out of memory") != std::string::npos) {
            throw Error(DG_ERROR_MEMORY, "the GPU refused memory in the middle of a pass (" + reason +
                                             "); fewer n_gpu_layers, a smaller n_ctx or n_batch need less");
        }
        throw gpu_failure(reason);
    }
    if (guarded) {
        // What ggml asserts of its small allocations (headers, graphs), and of pthread_create.
        const bool refused = std::strstr(message, "!= NULL") || std::strstr(message, "rc == 0");
        throw Error(refused ? DG_ERROR_MEMORY : DG_ERROR_INTERNAL, std::string("ggml gave up: ") + message);
    }
}

} // namespace

void initialize_ggml() {
    static std::once_flag once;
    std::call_once(once, [] {
        // glibc makes a thread's copy of this library's thread-local data when the thread first touches some, and ends
        // the process where it has no memory. The thread that loads the library does so now, while there still is some.
        guarded = false;
        ggml_log_set(on_log, nullptr);
        ggml_set_abort_callback(on_abort);
    });
}

void set_log(dg_log log, void *user) {
    initialize_ggml();
    const std::lock_guard<std::mutex> lock(listener_mutex);
    listener = {log, user};
}

LogCapture::LogCapture() : outer_(current_log) { current_log = this; }

LogCapture::~LogCapture() { current_log = outer_; }

std::string LogCapture::last_line(const std::string &otherwise) const {
    std::string text = text_;
    while (!text.empty() && text.back() == '\n') {
        text.pop_back();
    }
    const size_t line = text.rfind('\n');
    text = line == std::string::npos ? text : text.substr(line + 1);
    const size_t name = text.find(": ");
    if (name != std::string::npos && text.compare(0, 4, "gguf") == 0) {
        text = text.substr(name + 2);
    }
    return text.empty() ? otherwise : text;
}

AbortGuard::AbortGuard() : outer_(guarded) { guarded = true; }

AbortGuard::~AbortGuard() { guarded = outer_; }

} // namespace dg
