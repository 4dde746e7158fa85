#include "session/session.h"

#include "base/cores.h"
#include "base/error.h"
#include "base/parallel.h"
#include "base/positions.h"
#include "base/process.h"
#include "cpu/levels.h"
#include "cpu/self_conditioning.h"
#include "sample/sampler.h"
#include "session/steppers.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace dg {
namespace {

constexpr size_t MOST_GRAPHS = 8;       // that are kept; each is a few MB at 30 layers
constexpr int32_t FLAT_ROWS = -1;       // key of graphs that make the signal of rows that are listed
constexpr int32_t MASK_PIECE = 1 << 18; // elements of a mask that are made and sent at a time
constexpr auto POLL_INTERVAL = std::chrono::milliseconds(20);

void upload(ggml_tensor *tensor, const void *data, size_t size) { ggml_backend_tensor_set(tensor, data, 0, size); }

void upload(ggml_tensor *tensor, const std::vector<int32_t> &values) {
    upload(tensor, values.data(), values.size() * sizeof values[0]);
}

// As many as this process can keep busy, but no more than the work of a step is worth: barriers cost a small model more
// than a second thread brings it, and everything when another process wants the core (vendor/patches).
int32_t default_threads(const Model &model) {
    const dg_config &c = model.config();
    const double flop_per_step = 2.0 * static_cast<double>(model.active_parameters()) * c.canvas_length;
    const double worth = flop_per_step / 1e9;
    return static_cast<int32_t>(std::clamp(worth, 1.0, static_cast<double>(usable_cores())));
}

} // namespace

Session::Session(std::shared_ptr<const Model> model, const dg_session_options &options, DryRun)
    : model_(std::move(model)), figures_(model_->config(), options), n_threads_(options.n_threads),
      own_operators_(model_->kernels() && !options.ggml_operators), sampler_(resolve_sampler(*model_, options.sampler)),
      stepper_(make_stepper(*this, *model_, sampler_)) {
    check_range("n_threads", n_threads_, {0, GGML_MAX_N_THREADS});
    if (n_threads_ == 0) {
        n_threads_ = default_threads(*model_);
    }
    backends_ = model_->devices().start();
}

Session::Session(std::shared_ptr<const Model> model, const dg_session_options &options)
    : Session(std::move(model), options, DryRun{}) {
    plan(false);
    check_memory(format("a session (KV cache %zu bytes, intermediate tensors and inputs %zu, logits %zu)",
                        memory_.kv_cache, memory_.compute, memory_.logits),
                 host_bytes());
    plan(true);
    start_threads();
    tokens_.reserve(static_cast<size_t>(figures_.n_ctx));
}

Session::~Session() { stop_threads(); }

dg_memory Session::predict(const std::shared_ptr<const Model> &model, const dg_session_options &options) {
    Session session(model, options, DryRun{});
    session.plan(false);
    return session.memory_;
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
    std::vector<int32_t> positions;
    std::vector<int32_t> slots_full;
    std::vector<int32_t> slots_sliding;
    for (const int32_t rows : pass.segments) {
        for (int32_t i = 0; i < rows; ++i) {
            const int32_t position = pass.first_position() + i;
            const bool repeated = pass.mode == Mode::SCORE && i == 0;
            const int32_t written = repeated ? pass.end(rows) : position;
            positions.push_back(position);
            slots_full.push_back(cache_->slot(false, written));
            slots_sliding.push_back(cache_->slot(true, written));
        }
    }
    for (const DeviceIo &io : io_.devices) {
        if (io.positions) {
            upload(io.positions, positions);
            upload(io.slots_full, slots_full);
            upload(io.slots_sliding, slots_sliding);
        }
    }
    if (std::any_of(io_.devices.begin(), io_.devices.end(), [](const DeviceIo &io) { return io.mask_full; })) {
        for (const bool sliding : {false, true}) {
            int32_t first = 0;
            for (const int32_t rows : pass.segments) {
                set_mask(pass, first, rows, sliding);
                first += rows;
            }
        }
    }
}

// The mask of one segment, which begins at row `first` of the pass.
void Session::set_mask(const Pass &pass, int32_t first, int32_t rows, bool sliding) {
    const ggml_fp16_t visible = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t hidden = ggml_fp32_to_fp16(-INFINITY);
    const int32_t end = pass.end(rows);
    const int32_t n_slots = cache_->view_rows(sliding, end);
    const int32_t window = sliding ? model_->config().sliding_window : 0;
    std::vector<int32_t> held(static_cast<size_t>(n_slots));
    for (int32_t slot = 0; slot < n_slots; ++slot) {
        held[static_cast<size_t>(slot)] = cache_->position(sliding, slot, end);
    }
    const size_t offset = static_cast<size_t>(first) * static_cast<size_t>(cache_->slots(sliding));
    std::vector<ggml_fp16_t> mask; // of some rows: an RPC server's is copied once more on its way
    mask.reserve(std::max(held.size(), std::min(size_t{MASK_PIECE}, static_cast<size_t>(rows) * held.size())));
    for (int32_t i = 0; i < rows; ++i) {
        const Span seen = seen_by(pass.first_position() + i, pass.causal(), pass.n_past, end, window);
        for (const int32_t position : held) {
            mask.push_back(position >= seen.oldest && position <= seen.newest ? visible : hidden);
        }
        if (i + 1 < rows && mask.size() + held.size() <= size_t{MASK_PIECE}) {
            continue;
        }
        const size_t done = static_cast<size_t>(i + 1) * held.size() - mask.size();
        for (const DeviceIo &io : io_.devices) {
            if (io.mask_full) {
                ggml_backend_tensor_set(sliding ? io.mask_sliding : io.mask_full, mask.data(),
                                        (offset + done) * sizeof mask[0], mask.size() * sizeof mask[0]);
            }
        }
        mask.clear();
    }
}

// Makes the graph of `key` the last of those that are kept. The tensors of a graph that one backend computes whole keep
// their places in the executor's memory when another graph is placed there, and several can be kept: a step of two
// passes built two graphs, 3 ms of it at 30 layers, and a GPU captured each of them anew. Of graphs that are cut
// between backends, the one that was placed last is the only one.
template <typename Key, typename Build>
void Session::make_last(KeptGraphs<Key> &graphs, const Key &key, Executor &executor, const Build &build) {
    const auto found = std::find_if(graphs.begin(), graphs.end(), [&](const auto &kept) { return kept.first == key; });
    if (found != graphs.end()) {
        std::rotate(found, found + 1, graphs.end());
        return;
    }
    graphs.erase(std::remove_if(graphs.begin(), graphs.end(), [](const auto &kept) { return kept.second.whole < 0; }),
                 graphs.end());
    if (graphs.size() == MOST_GRAPHS) {
        graphs.erase(graphs.begin());
    }
    Graph graph = build();
    const size_t bytes = executor.bytes();
    executor.place(graph);
    if (executor.bytes() != bytes) { // it was more than had been reserved: the others' places are gone
        graphs.clear();
    }
    graphs.emplace_back(key, std::move(graph));
}

// Graph and inputs of a pass, but for its ids.
void Session::prepare(const Pass &pass) {
    renew_in_fork();
    // The CPU's own attention has the positions in its graph, and reads no more than it sees.
    const std::vector<int32_t> &caches = model_->placement().cache;
    const bool exact = own_operators_ && std::count(caches.begin(), caches.end(), model_->devices().cpu()) > 0;
    const Pass shape = exact ? pass : cache_->furthest(pass);
    make_last(pass_graphs_, shape, *passes_,
              [&] { return build_pass(*model_, *cache_, io_, shape, importance_.get(), adapters_.get()); });
    if (!inputs_ || !inputs_->has_inputs_of(pass)) {
        inputs_.reset();
        set_pass_inputs(pass);
        inputs_ = pass;
    }
    cache_->wrote(pass.mode == Mode::SCORE ? pass.end() + 1 : pass.end());
}

// Nothing is sent where the same rows get logits as in the step before.
void Session::set_logit_rows(const Pass &pass) {
    const std::vector<int32_t> &rows = pass.logit_rows;
    logit_rows_.resize(static_cast<size_t>(figures_.n_rows), -1);
    const auto place = logit_rows_.begin() + pass.first_row;
    if (std::equal(rows.begin(), rows.end(), place)) {
        return;
    }
    ggml_backend_tensor_set(io_.logit_rows, rows.data(), static_cast<size_t>(pass.first_row) * sizeof rows[0],
                            rows.size() * sizeof rows[0]);
    std::copy(rows.begin(), rows.end(), place);
}

int32_t Session::set_adapters(const Adapters &adapters, const std::vector<float> &scales) {
    Adapters acting;
    std::vector<float> factors;
    for (size_t i = 0; i < adapters.size(); ++i) {
        if (adapters[i]->model() != model_) {
            throw Error(DG_ERROR_ARGUMENT, format("adapter %zu was opened for another model", i));
        }
        if (!std::isfinite(scales[i])) {
            throw Error(DG_ERROR_ARGUMENT, format("scale %zu is not a finite number", i));
        }
        if (std::count(adapters.begin(), adapters.end(), adapters[i]) > 1) {
            throw Error(DG_ERROR_ARGUMENT, format("adapter %zu is named twice", i));
        }
        if (scales[i] != 0.0f) {
            acting.push_back(adapters[i]);
            factors.push_back(scales[i]);
        }
    }
    if (importance_ && !acting.empty()) {
        throw Error(DG_ERROR_ARGUMENT,
                    "importance is collected of the bare model: end that, or leave the adapters out");
    }
    renew_in_fork();
    pass_graphs_.clear();
    if (acting.empty()) {
        activate(nullptr);
    } else if (adapters_ && adapters_->set().adapters() == acting) {
        adapters_->set_scales(factors);
    } else {
        activate(std::make_unique<ActiveAdapters>(AdapterSet::of(acting), factors));
    }
    const uint64_t key = dg::encoder_key(acting, factors);
    if (key == encoder_key_) {
        return 0;
    }
    const std::vector<int32_t> kept = tokens_;
    truncate(0);
    encoder_key_ = key;
    if (!kept.empty()) {
        encode(kept.data(), static_cast<int32_t>(kept.size()));
    }
    return static_cast<int32_t>(kept.size());
}

// What a failure leaves is what was there.
void Session::activate(std::unique_ptr<ActiveAdapters> adapters) {
    pass_graphs_.clear();
    std::swap(adapters_, adapters);
    memory_.adapters = adapters_ ? adapters_->bytes() : 0;
    std::vector<uint64_t> ids;
    for (const std::shared_ptr<const Adapter> &adapter : adapters_ ? adapters_->set().adapters() : Adapters()) {
        ids.push_back(adapter->id());
    }
    if (ids.empty() || ids == reserved_) {
        return;
    }
    try {
        const size_t rest = memory_.compute - passes_->bytes();
        make_pass_executor(true);
        memory_.compute = rest + passes_->bytes();
        reserved_ = std::move(ids);
    } catch (...) {
        std::swap(adapters_, adapters);
        memory_.adapters = adapters_ ? adapters_->bytes() : 0;
        throw;
    }
}

void Session::collect(bool on) {
    if (on && adapters_) {
        throw Error(DG_ERROR_ARGUMENT, "importance is collected of the bare model: this session runs adapters");
    }
    pass_graphs_.clear(); // they point to the sums that go
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

void Session::compute(Executor &executor, const Graph &graph) {
    model_->files().check_unchanged();
    for (const std::unique_ptr<Work> &work : graph.work) {
        work->next.store(0, std::memory_order_relaxed);
        work->unsound.store(false, std::memory_order_relaxed);
    }
    if (profiled_) {
        run_timed(graph);
    } else {
        try {
            run([&] { return executor.compute(graph); });
        } catch (const Error &error) {
            if (error.status() != DG_ERROR_CANCELLED && !model_->devices().empty()) {
                set_aside();
            }
            throw;
        }
    }
    if (std::any_of(graph.work.begin(), graph.work.end(),
                    [](const auto &work) { return work->unsound.load(std::memory_order_relaxed); })) {
        throw Error(DG_ERROR_INTERNAL,
                    "an activation is NaN or infinite: the weights hold such numbers, or lead to them");
    }
}

// Behind a pass that failed on a device no graph is used again, and none is freed before the session. ggml's CUDA
// backend knows a graph by the address of its first node and captures it when it comes the second time. An error in the
// middle of a capture leaves a counter of ggml's raised, and then every backend waits forever when it is freed: so the
// next try has to come as a new graph, which is only launched.
void Session::set_aside() {
    const auto set = [this](auto &graphs) {
        for (auto &kept : graphs) {
            failed_graphs_.push_back(std::move(kept.second));
        }
        graphs.clear();
    };
    set(pass_graphs_);
    set(signal_graphs_);
}

template <typename Compute> void Session::run(const Compute &compute) {
    const ggml_status status = should_stop() ? GGML_STATUS_ABORTED : compute();
    switch (status) {
        case GGML_STATUS_SUCCESS: return;
        case GGML_STATUS_ABORTED: clear_cancel(); throw Error(DG_ERROR_CANCELLED, "cancelled");
        case GGML_STATUS_ALLOC_FAILED: throw Error(DG_ERROR_MEMORY, "memory for ggml's work buffer was refused");
        case GGML_STATUS_FAILED: break;
    }
    throw Error(DG_ERROR_INTERNAL, "ggml failed to compute a graph");
}

void Session::profile(bool on) {
    if (on && !model_->devices().empty()) {
        throw Error(DG_ERROR_UNSUPPORTED, "the parts of a step are timed on the CPU alone; use n_gpu_layers=0");
    }
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
        run([&] { return ggml_backend_graph_compute(backends_.back().get(), one); });
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
    if (n > figures_.n_ctx - canvas - n_past()) {
        throw Error(
            DG_ERROR_CONTEXT,
            format("%d tokens after a prefix of %d do not fit: with the canvas of %d, n_ctx %d leaves room for %d", n,
                   n_past(), canvas, figures_.n_ctx, std::max(0, figures_.n_ctx - canvas - n_past())));
    }
    for (int32_t done = 0; done < n; done += figures_.n_batch) {
        encode_chunk(ids + done, std::min(figures_.n_batch, n - done));
    }
}

void Session::encode_chunk(const int32_t *ids, int32_t n) {
    const Pass pass = {Mode::ENCODE, n_past(), {n}};
    prepare(pass);
    upload(io_.ids, ids, static_cast<size_t>(n) * sizeof *ids);
    compute_pass();
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
    const int32_t most = figures_.n_ctx - n_past();
    for (int32_t i = 0; i < n_texts; ++i) {
        if (lengths[i] < 1 || lengths[i] > model_->config().canvas_length) {
            throw Error(DG_ERROR_ARGUMENT, format("text %d has %d tokens: it must have from 1 to the canvas length, %d",
                                                  i, lengths[i], model_->config().canvas_length));
        }
        if (lengths[i] > most) {
            throw Error(DG_ERROR_CONTEXT,
                        format("text %d has %d tokens: after a prefix of %d, n_ctx %d has room for %d", i, lengths[i],
                               n_past(), figures_.n_ctx, most));
        }
    }
    check_ids("ids", ids, std::accumulate(lengths, lengths + n_texts, 0));
    for (int32_t done = 0; done < n_texts;) {
        int32_t n = 0;
        int32_t rows = 0;
        while (done + n < n_texts && n < MOST_SEGMENTS && rows + lengths[done + n] <= figures_.pass_rows) {
            rows += lengths[done + n++];
        }
        score_batch(ids, lengths + done, n, logprob);
        ids += rows;
        logprob += rows;
        done += n;
    }
}

void Session::score_batch(const int32_t *ids, const int32_t *lengths, int32_t n_texts, double *logprob) {
    Pass pass = {Mode::SCORE, n_past(), {lengths, lengths + n_texts}};
    pass.watched = io_.step->sample.watched != nullptr;
    prepare(pass);
    // Row i predicts id i: it reads the one before.
    std::vector<int32_t> inputs(static_cast<size_t>(pass.rows()));
    std::copy(ids, ids + pass.rows() - 1, inputs.begin() + 1);
    for (int32_t i = 0, first = 0; i < n_texts; first += lengths[i++]) {
        inputs[static_cast<size_t>(first)] = tokens_.back();
    }
    upload(io_.ids, inputs);
    if (pass.watched) {
        upload(io_.step->sample.watched, ids, static_cast<size_t>(pass.rows()) * sizeof *ids);
    }
    compute_pass();
    if (pass.watched) {
        for (const RowResult &row : read_results(io_.step->sample, pass.rows())) {
            if (!row.before.sound()) {
                throw_unsound_row();
            }
            *logprob++ = row.logprob();
        }
        return;
    }
    const int32_t n_vocab = model_->config().n_vocab;
    const auto *logits = static_cast<const float *>(io_.step->logits->data);
    parallel_rows(pass.rows(), n_vocab, n_threads_, [&](int32_t row) {
        logprob[row] =
            log_probability(logit_kernels(model_->kernels()), logits + int64_t{row} * n_vocab, n_vocab, ids[row]);
    });
}

void Session::check_canvases(const std::vector<int32_t> &segments) const {
    const Pass whole = {Mode::DENOISE, n_past(), segments};
    if (n_past() == 0) {
        throw Error(DG_ERROR_ARGUMENT, "nothing is encoded yet: a canvas needs a prefix of at least one token");
    }
    if (whole.rows() > figures_.n_rows) {
        throw Error(DG_ERROR_ARGUMENT, format("the canvases have %d rows together: this session was made for n_rows %d",
                                              whole.rows(), figures_.n_rows));
    }
    if (whole.end() > figures_.n_ctx) {
        throw Error(DG_ERROR_CONTEXT, format("a canvas of %d after a prefix of %d does not fit n_ctx %d",
                                             whole.end() - n_past(), n_past(), figures_.n_ctx));
    }
}

// A device makes a new graph for each number of rows that get logits: a GPU launches its kernels one by one first and
// then captures them, an RPC server is sent it whole. So passes of as many rows have four graphs at most.
int32_t Session::block_of_logits(int32_t rows) const {
    const bool on_cpu = model_->placement().head == model_->devices().cpu();
    return on_cpu ? ROW_BLOCK : whole_blocks((rows + 3) / 4);
}

// Calls `run` for one pass after the other, each with its graph ready and its ids in place, where they are not already:
// `ids` is null then.
void Session::each_pass(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted, Pass pass,
                        const std::function<void(const Pass &)> &run) {
    check_canvases(segments);
    renew_in_fork();
    pass.mode = Mode::DENOISE;
    pass.n_past = n_past();
    for (size_t i = 0; i < segments.size(); ++i) {
        pass.segments.push_back(segments[i]);
        const int32_t rows = pass.rows();
        const bool more = pass.segments.size() < size_t{MOST_SEGMENTS} && i + 1 < segments.size();
        if (more && rows + segments[i + 1] <= figures_.pass_rows) {
            continue;
        }
        pass.first_logit = io_.step->logits->ne[1] == figures_.n_rows ? pass.first_row : 0;
        if (wanted && !importance_) { // which counts all rows
            pass.logit_rows = rows_with_logits(wanted + pass.first_row, rows, block_of_logits(rows));
        }
        prepare(pass);
        set_logit_rows(pass);
        if (ids) {
            ggml_backend_tensor_set(io_.ids, ids + pass.first_row, static_cast<size_t>(pass.first_row) * sizeof *ids,
                                    static_cast<size_t>(rows) * sizeof *ids);
        }
        run(pass);
        pass.first_row += rows;
        pass.segments.clear();
    }
}

void Session::compute_signal(int32_t first_row, int32_t first_logit, int32_t n_rows) {
    renew_in_fork();
    const bool on_cpu = model_->placement().head == model_->devices().cpu();
    if (io_.scratch && io_.longest_embedding == 0.0f && on_cpu) {
        io_.longest_embedding = longest_row(*model_->kernels(), model_->weights().token_embd, n_threads_);
    }
    make_last(signal_graphs_, {first_row, n_rows}, *signals_,
              [&] { return build_signal(*model_, io_, first_row, first_logit, n_rows); });
    compute(*signals_, signal_graphs_.back().second);
}

void Session::compute_signal(const std::vector<int32_t> &rows, const std::vector<int32_t> &logits) {
    const StepIo &io = *io_.step;
    const auto most = static_cast<size_t>(figures_.pass_rows);
    for (size_t first = 0; first < rows.size(); first += most) {
        const size_t n = std::min(most, rows.size() - first);
        const int32_t n_made = std::min(figures_.pass_rows, whole_blocks(static_cast<int32_t>(n)));
        // What fills the last block up is the first row again.
        const auto part = [&](const std::vector<int32_t> &of) {
            const auto begin = of.begin() + static_cast<std::ptrdiff_t>(first);
            std::vector<int32_t> values(begin, begin + static_cast<std::ptrdiff_t>(n));
            values.resize(static_cast<size_t>(n_made), values.front());
            return values;
        };
        upload(io.flat_rows, part(rows));
        upload(io.flat_logits, part(logits));
        make_last(signal_graphs_, {FLAT_ROWS, n_made}, *signals_,
                  [&] { return build_flat_signal(*model_, io_, n_made); });
        compute(*signals_, signal_graphs_.back().second);
    }
}

void Session::truncate(int32_t n) {
    if (n < 0 || n > n_past()) {
        throw Error(DG_ERROR_ARGUMENT, format("n is %d: the prefix has %d tokens", n, n_past()));
    }
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
