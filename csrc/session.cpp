#include "session.h"

#include "error.h"
#include "parallel.h"
#include "process.h"
#include "sampler.h"
#include "soft.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

namespace dg {
namespace {

constexpr int32_t DEFAULT_CONTEXT = 8192;
constexpr int32_t MOST_ROWS = 1 << 16;
// Canvases side by side go through the layers so many rows at a time. Eight canvases of 256 rows (724 M parameters,
// Q8_0) took 1.09 times what they took one after the other in one pass of 2048 rows, and 1.03 times in passes of 512:
// the work is arithmetic, and larger intermediate tensors leave the processor's cache.
constexpr int32_t PASS_ROWS = 256;
constexpr auto POLL_INTERVAL = std::chrono::milliseconds(20);

ggml_type cache_type(int32_t type) {
    switch (type) {
        case DG_KV_F32: return GGML_TYPE_F32;
        case DG_KV_F16: return GGML_TYPE_F16;
        case DG_KV_BF16: return GGML_TYPE_BF16;
        case DG_KV_Q8_0: return GGML_TYPE_Q8_0;
    }
    throw Error(DG_ERROR_ARGUMENT, format("type_kv is %d: it must be one of dg_kv_type", type));
}

int32_t checked(const char *name, int32_t value, int32_t least, int32_t most) {
    if (value < least || value > most) {
        throw Error(DG_ERROR_ARGUMENT, format("%s is %d: it must be from %d to %d", name, value, least, most));
    }
    return value;
}

// Bytes for the intermediate tensors of `graph`, which are allocated too unless this is a prediction.
size_t reserve(ggml_gallocr_t allocator, const Graph &graph, bool allocate) {
    size_t size = 0;
    if (!allocate) {
        ggml_gallocr_reserve_n_size(allocator, graph.nodes, nullptr, nullptr, &size);
        return size;
    }
    if (!ggml_gallocr_reserve(allocator, graph.nodes)) {
        throw Error(DG_ERROR_MEMORY,
                    "memory for intermediate tensors was refused; a smaller n_ctx or n_batch needs less");
    }
    return ggml_gallocr_get_buffer_size(allocator, 0);
}

// Gives the graph's tensors their places; within what was reserved, nothing is allocated.
void place(ggml_gallocr_t allocator, const Graph &graph) {
    if (!ggml_gallocr_alloc_graph(allocator, graph.nodes)) {
        throw Error(DG_ERROR_MEMORY, "memory for intermediate tensors was refused");
    }
}

// As many as this process may use, but no more than the work of a step is worth: barriers cost a small model more than
// a second thread brings it, and everything when another process wants the core (vendor/patches).
int32_t default_threads(const Model &model) {
    const dg_config &c = model.config();
    const double flop_per_step = 2.0 * static_cast<double>(model.active_parameters()) * c.canvas_length;
    const double worth = flop_per_step / 1e9;
    const double available = std::max(1u, std::thread::hardware_concurrency());
    return static_cast<int32_t>(std::clamp(worth, 1.0, available));
}

} // namespace

int32_t Session::context_size(const Model &model, int32_t asked) {
    const dg_config &c = model.config();
    checked("n_ctx", asked, 0, INT32_MAX);
    const int32_t n_ctx = asked > 0 ? asked : std::min(DEFAULT_CONTEXT, c.n_ctx_train);
    if (n_ctx < c.canvas_length + 1) {
        throw Error(DG_ERROR_CONTEXT,
                    format("n_ctx is %d: a prefix of one token and the canvas need %d", n_ctx, c.canvas_length + 1));
    }
    if (n_ctx > c.n_ctx_train) {
        throw Error(DG_ERROR_CONTEXT, format("n_ctx is %d: the file's context_length is %d", n_ctx, c.n_ctx_train));
    }
    return n_ctx;
}

Session::Session(std::shared_ptr<const Model> model, const dg_session_options &options, DryRun)
    : model_(std::move(model)), n_ctx_(context_size(*model_, options.n_ctx)),
      n_batch_(std::min(checked("n_batch", options.n_batch, 1, 1 << 20), n_ctx_)),
      n_threads_(checked("n_threads", options.n_threads, 0, GGML_MAX_N_THREADS)),
      n_rows_(checked("n_rows", options.n_rows, 0, MOST_ROWS)), type_kv_(cache_type(options.type_kv)),
      own_operators_(has_own_operators() && !options.ggml_operators) {
    if (n_threads_ == 0) {
        n_threads_ = default_threads(*model_);
    }
    const int32_t canvas = model_->config().canvas_length;
    n_rows_ = n_rows_ == 0 ? canvas : checked("n_rows", n_rows_, canvas, MOST_ROWS);
}

Session::Session(std::shared_ptr<const Model> model, const dg_session_options &options)
    : Session(std::move(model), options, DryRun{}) {
    plan(false);
    check_memory(format("a session (KV cache %zu bytes, intermediate tensors and inputs %zu, logits %zu)",
                        memory_.kv_cache, memory_.compute, memory_.logits),
                 memory_.kv_cache + memory_.compute + memory_.logits);
    plan(true);
    start_threads();
    tokens_.reserve(static_cast<size_t>(n_ctx_));
}

Session::~Session() { stop_threads(); }

void Session::start_threads() {
    process_ = process_id();
    backend_.reset(ggml_backend_cpu_init());
    if (!backend_) {
        throw Error(DG_ERROR_MEMORY, "memory for ggml's CPU backend was refused");
    }
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads_);
    params.poll = 1; // idle threads sleep after some 2 ms instead of ggml's 100: a desktop program is mostly idle
    threadpool_ = ggml_threadpool_new(&params);
    if (!threadpool_) {
        throw Error(DG_ERROR_MEMORY, format("%d threads were refused", n_threads_));
    }
    ggml_backend_cpu_set_threadpool(backend_.get(), threadpool_);
    ggml_backend_cpu_set_n_threads(backend_.get(), n_threads_);
    ggml_backend_cpu_set_abort_callback(
        backend_.get(), [](void *self) { return static_cast<Session *>(self)->should_stop(); }, this);
}

// In a fork, the parent's threads do not exist, and waiting for their end would take for ever: what is left of them is
// given up.
void Session::stop_threads() {
    if (process_ != process_id()) {
        backend_.release();
    } else if (threadpool_) {
        ggml_backend_cpu_set_threadpool(backend_.get(), nullptr);
        ggml_threadpool_free(threadpool_);
    }
    threadpool_ = nullptr;
}

dg_memory Session::predict(const std::shared_ptr<const Model> &model, const dg_session_options &options) {
    Session session(model, options, DryRun{});
    session.plan(false);
    return session.memory_;
}

int32_t Session::largest_segment() const { return std::max(n_batch_, model_->config().canvas_length); }

int32_t Session::canvas_pass() const { return std::min(n_rows_, std::max(PASS_ROWS, model_->config().canvas_length)); }

int32_t Session::largest_pass() const { return std::max(n_batch_, canvas_pass()); }

// Cache, inputs and the memory of the largest graphs: what a session holds for its whole life.
void Session::plan(bool allocate) {
    const int32_t canvas = model_->config().canvas_length;
    // A scored text writes one row behind itself.
    cache_ = std::make_unique<KvCache>(*model_, n_ctx_, largest_segment() + 1, type_kv_, allocate);
    make_io(allocate);

    ggml_backend_buffer_type_t host = ggml_backend_cpu_buffer_type();
    pass_allocator_.reset(ggml_gallocr_new(host));
    soft_allocator_.reset(ggml_gallocr_new(host));
    const int32_t longest_chunk = std::min(n_batch_, n_ctx_ - canvas);
    std::vector<int32_t> canvases(static_cast<size_t>(canvas_pass() / canvas), canvas);
    if (canvas_pass() % canvas > 0) {
        canvases.push_back(canvas_pass() % canvas);
    }
    const Pass largest[] = {{Mode::ENCODE, n_ctx_ - canvas - longest_chunk, {longest_chunk}, 0},
                            {Mode::SCORE, n_ctx_ - canvas, canvases, 0},
                            {Mode::DENOISE, n_ctx_ - canvas, canvases, 0}};
    memory_.compute = 0;
    for (const Pass &pass : largest) {
        const Graph graph = build_pass(*model_, *cache_, io_, pass);
        memory_.compute = std::max(memory_.compute, reserve(pass_allocator_.get(), graph, allocate));
    }
    if (model_->config().has_self_conditioning) {
        const Graph graph = build_soft_embedding(*model_, io_, 0, canvas_pass());
        memory_.compute += reserve(soft_allocator_.get(), graph, allocate);
    }
    memory_.compute += io_bytes() - ggml_nbytes(io_.logits);
    memory_.weights = model_->files().n_bytes();
    memory_.weights_mapped = model_->files().mapped() ? memory_.weights : 0;
    memory_.kv_cache = cache_->bytes();
    memory_.logits = logits_size(n_rows_);
}

size_t Session::io_bytes() const {
    size_t bytes = 0;
    for (ggml_tensor *t = ggml_get_first_tensor(io_context_.get()); t; t = ggml_get_next_tensor(io_context_.get(), t)) {
        bytes += ggml_nbytes(t);
    }
    return bytes;
}

void Session::make_io(bool allocate) {
    const dg_config &c = model_->config();
    const int64_t pass = largest_pass();
    ggml_init_params params = {};
    params.mem_size = 16 * ggml_tensor_overhead();
    params.no_alloc = true;
    io_context_.reset(ggml_init(params));
    if (!io_context_) {
        throw Error(DG_ERROR_MEMORY, "memory for input headers was refused");
    }
    ggml_context *ctx = io_context_.get();
    io_.ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
    io_.positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
    io_.slots_full = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
    io_.slots_sliding = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, pass);
    int64_t widest = 0;
    for (const LayerWeights &layer : model_->weights().layers) {
        widest = std::max(widest, layer.head_dim * c.n_head);
    }
    if (own_operators_) {
        io_.scratch = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, scratch_floats(*model_), n_threads_);
    } else {
        io_.mask_full = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, int64_t{cache_->slots(false)} * pass);
        io_.mask_sliding = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, int64_t{cache_->slots(true)} * pass);
    }
    io_.attended = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, widest, canvas_pass());
    io_.soft = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_embd, n_rows_);
    io_.logits = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.n_vocab, n_rows_);
    if (allocate) {
        io_buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type()));
        if (!io_buffer_) {
            throw Error(DG_ERROR_MEMORY,
                        format("%zu bytes for a canvas of logits and the inputs were refused",
                               ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, ggml_backend_cpu_buffer_type())));
        }
        condition_on_nothing();
    } else {
        // Planning asks only whether a tensor has memory, never where.
        static char placeholder;
        for (ggml_tensor *t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            t->data = &placeholder;
        }
        for (const CacheLayer &layer : cache_->layers()) {
            layer.k->data = &placeholder;
            layer.v->data = &placeholder;
        }
    }
}

void Session::set_past(int32_t n) { n_past_.store(n, std::memory_order_relaxed); }

void Session::check_ids(const char *what, const int32_t *ids, int32_t n) const {
    const int32_t n_vocab = model_->config().n_vocab;
    for (int32_t i = 0; i < n; ++i) {
        if (ids[i] < 0 || ids[i] >= n_vocab) {
            throw Error(DG_ERROR_ARGUMENT,
                        format("%s[%d] is %d: a token id must be from 0 to %d", what, i, ids[i], n_vocab - 1));
        }
    }
}

// ------------------------------------------------------------------------------------------------------ passes

void Session::set_pass_inputs(const Pass &pass) {
    auto *positions = static_cast<int32_t *>(io_.positions->data);
    auto *slots_full = static_cast<int32_t *>(io_.slots_full->data);
    auto *slots_sliding = static_cast<int32_t *>(io_.slots_sliding->data);
    int32_t first = 0;
    for (const int32_t rows : pass.segments) {
        for (int32_t i = 0; i < rows; ++i) {
            const int32_t position = pass.first_position() + i;
            const bool repeated = pass.mode == Mode::SCORE && i == 0;
            const int32_t written = repeated ? pass.end(rows) : position;
            positions[first + i] = position;
            slots_full[first + i] = cache_->slot(false, written);
            slots_sliding[first + i] = cache_->slot(true, written);
        }
        for (const bool sliding : {false, true}) {
            if (!io_.scratch && needs_mask(*model_, pass, sliding)) {
                set_mask(pass, first, rows, sliding);
            }
        }
        first += rows;
    }
}

// The mask of one segment, which begins at row `first` of the pass.
void Session::set_mask(const Pass &pass, int32_t first, int32_t rows, bool sliding) {
    const ggml_fp16_t visible = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY);
    const int32_t end = pass.end(rows);
    const int32_t n_slots = cache_->visible_rows(sliding, end);
    const int32_t window = model_->config().sliding_window;
    std::vector<int32_t> held(static_cast<size_t>(n_slots));
    for (int32_t slot = 0; slot < n_slots; ++slot) {
        held[static_cast<size_t>(slot)] = cache_->position(sliding, slot, end);
    }
    auto *mask = static_cast<ggml_fp16_t *>((sliding ? io_.mask_sliding : io_.mask_full)->data) +
                 int64_t{first} * cache_->slots(sliding);
    for (int32_t i = 0; i < rows; ++i) {
        // The canvas has no window inside: all its rows look back from its first one.
        const int32_t last = pass.causal() ? pass.first_position() + i : end - 1;
        const int32_t anchor = pass.causal() ? last : pass.n_past;
        const int32_t oldest = sliding ? std::max(0, anchor - (window - 1)) : 0;
        ggml_fp16_t *row = mask + int64_t{i} * n_slots;
        for (int32_t slot = 0; slot < n_slots; ++slot) {
            const int32_t position = held[static_cast<size_t>(slot)];
            row[slot] = position >= oldest && position <= last ? visible : hidden;
        }
    }
}

// Graph and inputs of a pass, but for its ids.
void Session::prepare(const Pass &pass) {
    ready_ = {};
    pass_graph_ = build_pass(*model_, *cache_, io_, pass, importance_.get());
    place(pass_allocator_.get(), pass_graph_);
    set_pass_inputs(pass);
    cache_->wrote(pass.mode == Mode::SCORE ? pass.end() + 1 : pass.end());
}

void Session::collect(bool on) {
    ready_ = {}; // its graph points to the sums that go
    pass_graph_ = {};
    importance_ = on ? std::make_unique<Importance>() : nullptr;
}

bool Session::should_stop() {
    if (cancelled_.load(std::memory_order_relaxed)) {
        return true;
    }
    if (poll_) {
        const auto now = std::chrono::steady_clock::now();
        if (now - last_poll_ >= POLL_INTERVAL) {
            last_poll_ = now;
            if (poll_(poll_user_) != 0) {
                cancel();
                return true;
            }
        }
    }
    return false;
}

void Session::compute(const Graph &graph) {
    model_->files().check_unchanged();
    if (process_ != process_id()) {
        stop_threads();
        start_threads();
    }
    for (const std::unique_ptr<Work> &work : graph.work) {
        work->next.store(0, std::memory_order_relaxed);
    }
    if (profiled_) {
        run_timed(graph);
    } else {
        run(graph.nodes);
    }
}

void Session::run(ggml_cgraph *nodes) {
    const ggml_status status = should_stop() ? GGML_STATUS_ABORTED : ggml_backend_graph_compute(backend_.get(), nodes);
    switch (status) {
        case GGML_STATUS_SUCCESS: return;
        case GGML_STATUS_ABORTED: clear_cancel(); throw Error(DG_ERROR_CANCELLED, "cancelled");
        case GGML_STATUS_ALLOC_FAILED: throw Error(DG_ERROR_MEMORY, "memory for ggml's work buffer was refused");
        case GGML_STATUS_FAILED: break;
    }
    throw Error(DG_ERROR_INTERNAL, "ggml failed to compute a graph");
}

void Session::profile(bool on) {
    profiled_ = on;
    timings_ = {};
}

// One operator at a time. What ggml fuses in a whole graph is not fused here, which costs about a percent of a step.
void Session::run_timed(const Graph &graph) {
    ggml_init_params params = {};
    params.mem_size = ggml_graph_overhead_custom(1, false) + ggml_tensor_overhead();
    params.no_alloc = true;
    const ggml_context_ptr context(ggml_init(params));
    if (!context) {
        throw Error(DG_ERROR_MEMORY, "memory for a graph of one operator was refused");
    }
    ggml_cgraph *one = ggml_new_graph_custom(context.get(), 1, false);
    for (int i = 0; i < ggml_graph_n_nodes(graph.nodes); ++i) {
        ggml_tensor *node = ggml_graph_node(graph.nodes, i);
        if (node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE ||
            node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE) {
            continue;
        }
        ggml_graph_clear(one);
        ggml_graph_add_node(one, node);
        const auto began = std::chrono::steady_clock::now();
        run(one);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        switch (part_of(node)) {
            case Part::OTHER: timings_.other += seconds; break;
            case Part::PRODUCTS: timings_.products += seconds; break;
            case Part::EXPERTS: timings_.experts += seconds; break;
            case Part::ATTENTION: timings_.attention += seconds; break;
            case Part::HEAD: timings_.head += seconds; break;
            case Part::SELF_CONDITIONING: timings_.self_conditioning += seconds; break;
        }
    }
}

void Session::encode(const int32_t *ids, int32_t n) {
    if (n < 1) {
        throw Error(DG_ERROR_ARGUMENT, format("n is %d: there must be at least one token to encode", n));
    }
    check_ids("ids", ids, n);
    const int32_t canvas = model_->config().canvas_length;
    if (n > n_ctx_ - canvas - n_past()) {
        throw Error(
            DG_ERROR_CONTEXT,
            format("%d tokens after a prefix of %d do not fit: with the canvas of %d, n_ctx %d leaves room for %d", n,
                   n_past(), canvas, n_ctx_, std::max(0, n_ctx_ - canvas - n_past())));
    }
    for (int32_t done = 0; done < n; done += n_batch_) {
        encode_chunk(ids + done, std::min(n_batch_, n - done));
    }
}

void Session::encode_chunk(const int32_t *ids, int32_t n) {
    const Pass pass = {Mode::ENCODE, n_past(), {n}, 0};
    prepare(pass);
    std::memcpy(io_.ids->data, ids, static_cast<size_t>(n) * sizeof *ids);
    compute(pass_graph_);
    tokens_.insert(tokens_.end(), ids, ids + n);
    set_past(pass.end());
}

void Session::score(const int32_t *ids, const int32_t *lengths, int32_t n_texts, double *logprob) {
    if (n_past() == 0) {
        throw Error(DG_ERROR_ARGUMENT, "nothing is encoded yet: a text is scored after a prefix of at least one token");
    }
    if (n_texts < 0) {
        throw Error(DG_ERROR_ARGUMENT, format("n_texts is %d: it must be 0 or more", n_texts));
    }
    const int32_t most = n_ctx_ - n_past();
    for (int32_t i = 0; i < n_texts; ++i) {
        if (lengths[i] < 1 || lengths[i] > model_->config().canvas_length) {
            throw Error(DG_ERROR_ARGUMENT, format("text %d has %d tokens: it must have from 1 to the canvas length, %d",
                                                  i, lengths[i], model_->config().canvas_length));
        }
        if (lengths[i] > most) {
            throw Error(DG_ERROR_CONTEXT,
                        format("text %d has %d tokens: after a prefix of %d, n_ctx %d has room for %d", i, lengths[i],
                               n_past(), n_ctx_, most));
        }
    }
    check_ids("ids", ids, std::accumulate(lengths, lengths + n_texts, 0));
    for (int32_t done = 0; done < n_texts;) {
        int32_t n = 0;
        int32_t rows = 0;
        while (done + n < n_texts && rows + lengths[done + n] <= canvas_pass()) {
            rows += lengths[done + n++];
        }
        score_batch(ids, lengths + done, n, logprob);
        ids += rows;
        logprob += rows;
        done += n;
    }
}

void Session::score_batch(const int32_t *ids, const int32_t *lengths, int32_t n_texts, double *logprob) {
    const Pass pass = {Mode::SCORE, n_past(), {lengths, lengths + n_texts}, 0};
    prepare(pass);
    // Row i predicts id i: it reads the one before.
    auto *inputs = static_cast<int32_t *>(io_.ids->data);
    std::memcpy(inputs + 1, ids, static_cast<size_t>(pass.rows() - 1) * sizeof *ids);
    for (int32_t i = 0, first = 0; i < n_texts; first += lengths[i++]) {
        inputs[first] = tokens_.back();
    }
    compute(pass_graph_);
    const int32_t n_vocab = model_->config().n_vocab;
    parallel_rows(pass.rows(), n_vocab, n_threads_, [&](int32_t row) {
        logprob[row] = log_probability(logits() + int64_t{row} * n_vocab, n_vocab, ids[row]);
    });
}

void Session::denoise(const int32_t *ids, const std::vector<int32_t> &segments) {
    const Pass whole = {Mode::DENOISE, n_past(), segments, 0};
    if (n_past() == 0) {
        throw Error(DG_ERROR_ARGUMENT, "nothing is encoded yet: a canvas needs a prefix of at least one token");
    }
    if (whole.rows() > n_rows_) {
        throw Error(DG_ERROR_ARGUMENT, format("the canvases have %d rows together: this session was made for n_rows %d",
                                              whole.rows(), n_rows_));
    }
    if (whole.end() > n_ctx_) {
        throw Error(DG_ERROR_CONTEXT, format("a canvas of %d after a prefix of %d does not fit n_ctx %d",
                                             whole.end() - n_past(), n_past(), n_ctx_));
    }
    Pass pass = {Mode::DENOISE, n_past(), {}, 0};
    for (size_t i = 0; i < segments.size(); ++i) {
        pass.segments.push_back(segments[i]);
        const int32_t rows = pass.rows();
        if (i + 1 < segments.size() && rows + segments[i + 1] <= canvas_pass()) {
            continue;
        }
        if (!(ready_ == pass)) {
            prepare(pass);
            ready_ = pass;
        }
        std::memcpy(io_.ids->data, ids + pass.first_row, static_cast<size_t>(rows) * sizeof *ids);
        compute(pass_graph_);
        pass.first_row += rows;
        pass.segments.clear();
    }
}

void Session::condition_on_logits(int32_t n_rows) {
    if (!model_->config().has_self_conditioning) {
        return;
    }
#if DG_HAS_TILES
    if (io_.scratch && io_.longest_embedding == 0.0f) {
        io_.longest_embedding = longest_row(model_->weights().token_embd, n_threads_);
    }
#endif
    for (int32_t first = 0; first < n_rows; first += canvas_pass()) {
        const int32_t n = std::min(canvas_pass(), n_rows - first);
        if (soft_graph_rows_ != n || soft_graph_first_ != first) {
            soft_graph_rows_ = 0;
            soft_graph_ = build_soft_embedding(*model_, io_, first, n);
            place(soft_allocator_.get(), soft_graph_);
            soft_graph_first_ = first;
            soft_graph_rows_ = n;
        }
        compute(soft_graph_);
    }
}

void Session::condition_on_nothing() { std::memset(io_.soft->data, 0, ggml_nbytes(io_.soft)); }

void Session::move_condition(int32_t from, int32_t to, int32_t n) {
    const size_t row = io_.soft->nb[1];
    auto *rows = static_cast<char *>(io_.soft->data);
    std::memmove(rows + static_cast<size_t>(to) * row, rows + static_cast<size_t>(from) * row,
                 static_cast<size_t>(n) * row);
}

void Session::truncate(int32_t n) {
    if (n < 0 || n > n_past()) {
        throw Error(DG_ERROR_ARGUMENT, format("n is %d: the prefix has %d tokens", n, n_past()));
    }
    ready_ = {};
    if (n > 0 && !cache_->holds_window_before(n)) {
        const std::vector<int32_t> kept(tokens_.begin(), tokens_.begin() + n);
        truncate(0);
        encode(kept.data(), n);
        return;
    }
    tokens_.resize(static_cast<size_t>(n));
    set_past(n);
    if (n == 0) {
        cache_->clear();
    }
}

} // namespace dg
