// What every function of the C boundary begins with: exceptions become a status and a message, a second thread is
// turned away from a busy session. And what the public header's opaque types are.
#pragma once

#include "adapter/adapter.h"
#include "base/error.h"
#include "base/log_capture.h"
#include "cpu/levels.h"
#include "diffgguf.h"
#include "file/gguf_head.h"
#include "model/devices.h"
#include "model/model.h"
#include "session/loop.h"
#include "session/session.h"

#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <string>

struct dg_file {
    std::shared_ptr<const dg::GgufHead> head;
};

struct dg_model {
    std::shared_ptr<const dg::Model> model;
    dg_file file;
};

struct dg_adapter {
    std::shared_ptr<const dg::Adapter> adapter;
};

struct dg_session {
    dg::Session session;
    dg::CanvasLoop loop;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;

    dg_session(std::shared_ptr<const dg::Model> model, const dg_session_options &options)
        : session(std::move(model), options), loop(session) {}
};

namespace dg::api {

// One line, whatever a file's strings or a path that the message quotes hold: no control character passes.
void write_message(const char *message, char *err, size_t err_size) noexcept;

// Throws ARGUMENT for a null pointer.
void require(const void *pointer, const char *name);

// Without ggml's initialisation: for what only reads its tables.
template <typename Body> dg_status guarded_plain(char *err, size_t err_size, const Body &body) {
    write_message("", err, err_size);
    try {
        body();
        return DG_OK;
    } catch (const dg::Error &error) {
        write_message(error.what(), err, err_size);
        return error.status();
    } catch (const std::bad_alloc &) {
        write_message("an allocation was refused", err, err_size);
        return DG_ERROR_MEMORY;
    } catch (const std::exception &error) {
        write_message(error.what(), err, err_size);
        return DG_ERROR_INTERNAL;
    } catch (...) {
        if (!std::current_exception()) {
            // None of C++'s: the poll function ended its thread, as CPython ends daemon threads that want the GIL while
            // it exits. glibc ends the process where such an unwinding stops.
            throw;
        }
        write_message("an unknown exception", err, err_size);
        return DG_ERROR_INTERNAL;
    }
}

template <typename Body> dg_status guarded(char *err, size_t err_size, const Body &body) {
    return guarded_plain(err, err_size, [&] {
        dg::check_processor(); // before any code of ggml's
        dg::initialize_ggml();
        const dg::AbortGuard no_abort;
        body();
    });
}

// Runs `body` as the one thread that speaks to the model's devices.
template <typename Body> void with_devices(const dg::Model &model, const Body &body) {
    const dg::Devices &devices = model.devices();
    const dg::Devices::Turn turn(devices);
    try {
        body();
    } catch (const dg::Error &error) {
        if (error.status() != DG_ERROR_DEVICE || dg::has_gpu_failed()) {
            throw;
        }
        throw dg::Error(DG_ERROR_DEVICE, std::string(error.what()) + " (of " + devices.servers() +
                                             "); close the model, and open it again when all servers answer");
    }
}

// Runs `body` as the one thread inside the session.
template <typename Body> dg_status inside(dg_session *session, char *err, size_t err_size, const Body &body) {
    return guarded(err, err_size, [&] {
        require(session, "session");
        if (session->busy.test_and_set(std::memory_order_acquire)) {
            throw dg::Error(DG_ERROR_BUSY, "another thread is inside this session");
        }
        struct Leave {
            std::atomic_flag &busy;
            ~Leave() { busy.clear(std::memory_order_release); }
        } const leave{session->busy};
        with_devices(session->session.model(), body);
    });
}

} // namespace dg::api
