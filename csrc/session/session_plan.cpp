// What a session holds for its whole life: cache, inputs, the memory of its largest graphs, threads.
#include "session/session.h"

#include "base/error.h"
#include "base/process.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>

namespace dg {
namespace {

constexpr size_t MOST_IO = 32;                                  // tensors that graphs read and write, on one device
constexpr const char *IO = "a canvas of logits and the inputs"; // they, in messages

} // namespace

// Cache, inputs and the memory of the largest graphs: what a session holds for its whole life.
void Session::plan(bool allocate) {
    io_buffers_.clear();
    io_contexts_.clear();
    io_ = {};
    memory_ = {};
    fallbacks_.clear();
    cache_ = std::make_unique<KvCache>(*model_, figures_, allocate);
    make_io(allocate);
    make_executors(allocate);
    if (allocate) {
        stepper_->allocated();
    }
    memory_.compute += io_bytes() - ggml_nbytes(io_.step->logits);
    memory_.weights = model_->files().n_bytes();
    for (size_t i = 0; i < model_->devices().size(); ++i) {
        memory_.weights_on_devices += model_->weights_on(static_cast<int32_t>(i));
    }
    memory_.signal_copy = model_->signal_copy_bytes();
    memory_.weights_mapped = model_->files().mapped() ? memory_.weights : 0;
    memory_.kv_cache = cache_->bytes();
    memory_.logits = ggml_nbytes(io_.step->logits);
}

void Session::make_executors(bool allocate) {
    make_pass_executor(allocate);
    if (model_->config().has_self_conditioning) {
        std::vector<Graph> signal;
        signal.push_back(build_signal(*model_, io_, 0, 0, figures_.pass_rows));
        if (io_.step->flat_rows) {
            signal.push_back(build_flat_signal(*model_, io_, figures_.pass_rows));
        }
        signals_ = make_executor(signal, allocate);
    }
    memory_.weights = model_->files().n_bytes();
}

void Session::make_pass_executor(bool allocate) {
    const int32_t canvas = model_->config().canvas_length;
    const int32_t longest_chunk = figures_.longest_chunk();
    std::vector<int32_t> canvases(static_cast<size_t>(figures_.pass_rows / canvas), canvas);
    if (figures_.pass_rows % canvas > 0) {
        canvases.push_back(figures_.pass_rows % canvas);
    }
    Pass chunk = {Mode::ENCODE, figures_.n_ctx - canvas - longest_chunk, {longest_chunk}};
    Pass texts = {Mode::SCORE, figures_.n_ctx - canvas, canvases};
    Pass steps = {Mode::DENOISE, figures_.n_ctx - canvas, canvases};
    texts.watched = io_.step->sample.watched != nullptr;
    steps.sampled = stepper_->kind().sampled;
    steps.watched = stepper_->kind().watched;
    std::vector<Graph> largest;
    for (const Pass &pass : {chunk, texts, steps}) {
        largest.push_back(build_pass(*model_, *cache_, io_, pass, nullptr, adapters_.get()));
    }
    // Whole canvases have the largest nodes, as many segments as there can be the most.
    const int32_t n_short = std::min(MOST_SEGMENTS, figures_.pass_rows) - 1;
    std::vector<int32_t> many(static_cast<size_t>(n_short), 1);
    many.push_back(std::min(canvas, figures_.pass_rows - n_short));
    steps.segments = many;
    largest.push_back(build_pass(*model_, *cache_, io_, steps, nullptr, adapters_.get()));
    passes_ = make_executor(largest, allocate);
}

std::unique_ptr<Executor> Session::make_executor(const std::vector<Graph> &largest, bool allocate) {
    int n_nodes = 0;
    for (const Graph &graph : largest) {
        n_nodes = std::max(n_nodes, ggml_graph_size(graph.nodes));
    }
    check_memory(format("a session's scheduler, for graphs of %d nodes,", n_nodes),
                 Executor::headers(static_cast<size_t>(n_nodes)));
    auto executor = std::make_unique<Executor>(backends_, static_cast<size_t>(n_nodes));
    size_t bytes = 0;
    for (const Graph &graph : largest) {
        for (const auto &[device, what] : executor->missing(graph)) {
            const std::string line = model_->devices()[static_cast<size_t>(device)].name + " lacks " + what;
            if (std::find(fallbacks_.begin(), fallbacks_.end(), line) == fallbacks_.end()) {
                fallbacks_.push_back(line);
            }
        }
        if (allocate) {
            executor->reserve(graph);
        } else {
            bytes = std::max(bytes, executor->measure(graph));
        }
    }
    memory_.compute += allocate ? executor->bytes() : bytes;
    return executor;
}

void Session::make_io(bool allocate) {
    const dg_config &c = model_->config();
    const Placement &placement = model_->placement();
    const int64_t pass = figures_.largest_pass();
    ggml_init_params params = {};
    params.mem_size = MOST_IO * ggml_tensor_overhead();
    params.no_alloc = true;
    for (size_t i = 0; i < backends_.size(); ++i) {
        io_contexts_.emplace_back(ggml_init(params));
        if (!io_contexts_.back()) {
            throw Error(DG_ERROR_MEMORY, "memory for input headers was refused");
        }
    }
    const auto on = [&](int32_t device) { return io_contexts_[static_cast<size_t>(device)].get(); };
    int64_t widest = 0;
    for (const LayerWeights &layer : model_->weights().layers) {
        widest = std::max(widest, layer.head_dim * c.n_head);
    }
    io_.devices.resize(backends_.size());
    for (size_t i = 0; i < placement.layers.size(); ++i) {
        for (const int32_t device : {placement.layers[i], placement.cache[i]}) {
            DeviceIo &io = io_.devices[static_cast<size_t>(device)];
            if (io.positions) {
                continue;
            }
            ggml_context *ctx = on(device);
            io.positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
            io.slots_full = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
            io.slots_sliding = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
            if (!own_operators_ || device != model_->devices().cpu()) {
                io.mask_full = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, int64_t{cache_->slots(false)} * pass);
                io.mask_sliding = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, int64_t{cache_->slots(true)} * pass);
            }
            io.attended = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, widest, figures_.pass_rows);
        }
    }
    io_.ids = ggml_new_tensor_1d(on(placement.input), GGML_TYPE_I32, std::max<int64_t>(pass, figures_.n_rows));
    io_.logit_rows = ggml_new_tensor_1d(on(placement.head), GGML_TYPE_I32, figures_.n_rows);
    io_.signal = ggml_new_tensor_2d(on(placement.layers.front()), GGML_TYPE_F32, c.n_embd, figures_.n_rows);
    if (own_operators_) {
        io_.scratch =
            ggml_new_tensor_2d(on(model_->devices().cpu()), GGML_TYPE_F32, scratch_floats(*model_), n_threads_);
    }
    stepper_->declare(on(placement.head));
    io_.step = &stepper_->io();
    if (allocate) {
        for (size_t i = 0; i < io_contexts_.size(); ++i) {
            allocate_io(static_cast<int32_t>(i));
        }
        return;
    }
    // Planning asks on which device a tensor has memory, never where.
    static char placeholder;
    const auto pretend = [&](ggml_tensor *t, int32_t device) {
        t->data = &placeholder;
        t->buffer = io_buffers_[static_cast<size_t>(device)].get();
    };
    for (size_t i = 0; i < io_contexts_.size(); ++i) {
        const auto device = static_cast<int32_t>(i);
        io_buffers_.emplace_back(ggml_backend_buft_alloc_buffer(model_->devices().buffer_type(device), 1));
        ggml_context *ctx = on(device);
        model_->devices().check_sizes(ctx, device, IO);
        for (ggml_tensor *t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            pretend(t, device);
        }
    }
    for (size_t i = 0; i < placement.layers.size(); ++i) {
        pretend(cache_->layers()[i].k, placement.cache[i]);
        pretend(cache_->layers()[i].v, placement.cache[i]);
    }
}

void Session::allocate_io(int32_t device) {
    ggml_context *ctx = io_contexts_[static_cast<size_t>(device)].get();
    if (!ggml_get_first_tensor(ctx)) {
        return;
    }
    io_buffers_.push_back(model_->devices().allocate(ctx, device, IO));
    if (device != model_->devices().cpu()) {
        ggml_backend_buffer_clear(io_buffers_.back().get(), 0); // of rows that no pass has written, none is a NaN
    }
}

size_t Session::io_bytes() const {
    size_t bytes = 0;
    for (size_t i = 0; i < io_contexts_.size(); ++i) {
        bytes += io_bytes_on(i);
    }
    return bytes;
}

size_t Session::io_bytes_on(size_t device) const { return tensor_bytes(io_contexts_[device].get()); }

// What of all that is in this process's memory for certain: with devices, intermediate tensors may be anywhere.
size_t Session::host_bytes() const {
    if (model_->devices().empty()) {
        return memory_.kv_cache + memory_.compute + memory_.logits;
    }
    const auto cpu = static_cast<size_t>(model_->devices().cpu());
    return cache_->bytes_on(cpu) + io_bytes_on(cpu);
}

void Session::start_threads() {
    process_ = process_id();
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads_);
    params.poll = 1; // idle threads sleep after some 2 ms instead of ggml's 100: a desktop program is mostly idle
    threadpool_ = ggml_threadpool_new(&params);
    if (!threadpool_) {
        throw Error(DG_ERROR_MEMORY, format("%d threads were refused", n_threads_));
    }
    ggml_backend_t cpu = backends_.back().get();
    ggml_backend_cpu_set_threadpool(cpu, threadpool_);
    ggml_backend_cpu_set_n_threads(cpu, n_threads_);
    ggml_backend_cpu_set_abort_callback(
        cpu, [](void *self) { return static_cast<Session *>(self)->should_stop(); }, this);
}

// In a fork, the parent's threads do not exist, and waiting for their end would take for ever: what is left of them is
// given up.
void Session::stop_threads() {
    if (threadpool_ && process_ != process_id()) {
        backends_.back().release();
    } else if (threadpool_) {
        ggml_backend_cpu_set_threadpool(backends_.back().get(), nullptr);
        ggml_threadpool_free(threadpool_);
    }
    threadpool_ = nullptr;
}

// A fork has a CPU backend and threads of its own, and graphs are placed anew on it. Devices it cannot have: what the
// parent holds there is the parent's, and so is its connection.
void Session::renew_in_fork() {
    if (process_ == process_id()) {
        return;
    }
    if (!model_->devices().empty()) {
        throw Error(DG_ERROR_DEVICE, "a fork cannot use its parent's devices: open the model in the new process");
    }
    stop_threads();
    backends_ = model_->devices().start();
    pass_graphs_.clear();
    signal_graphs_.clear();
    make_executors(true);
    start_threads();
}

} // namespace dg
