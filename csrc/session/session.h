// One timeline on a model: the prefix in the cache, the buffers, the graphs. One thread at a time; the C boundary
// guards that. Errors leave the state that diffgguf.h promises.
#pragma once

#include "adapter/adapter.h"
#include "model/figures.h"
#include "model/model.h"
#include "pass/cache.h"
#include "pass/executor.h"
#include "pass/graph.h"
#include "session/passes.h"
#include "session/stepper.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dg {

class Session final : private Passes {
  public:
    Session(std::shared_ptr<const Model> model, const dg_session_options &options);
    ~Session();
    Session(const Session &) = delete;
    Session &operator=(const Session &) = delete;

    // What a session would take, by the arithmetic that makes one.
    static dg_memory predict(const std::shared_ptr<const Model> &model, const dg_session_options &options);

    const Model &model() const override { return *model_; }
    std::shared_ptr<const Model> shared_model() const { return model_; }
    int32_t n_ctx() const { return figures_.n_ctx; }
    int32_t n_threads() const override { return n_threads_; }
    int32_t n_rows() const { return figures_.n_rows; }
    int32_t n_past() const { return n_past_.load(std::memory_order_relaxed); }
    const std::vector<int32_t> &tokens() const { return tokens_; }
    dg_memory memory() const { return memory_; }
    // One line for each kind of operator that a device lacks and the CPU does in its place, weights and all.
    const std::vector<std::string> &fallbacks() const { return fallbacks_; }

    void encode(const int32_t *ids, int32_t n);
    void truncate(int32_t n);
    void save(const std::string &path);
    void load(const std::string &path);

    // As dg_session_set_adapters; returns how many tokens were encoded again.
    int32_t set_adapters(const Adapters &adapters, const std::vector<float> &scales);
    uint64_t encoder_key() const { return encoder_key_; }

    // Encoder mode over texts side by side, each behind the prefix; keeps nothing. logprob[i]: the natural log of the
    // probability of ids[i] after the prefix and the ids before it in its text.
    void score(const int32_t *ids, const int32_t *lengths, int32_t n_texts, double *logprob);

    // What happens between two passes here: for CanvasLoop, and for single passes.
    Stepper &stepper() { return *stepper_; }
    dg_sampler sampler() const { return sampler_; }
    void check_ids(const char *what, const int32_t *ids, int32_t n) const;

    // From here on passes add up what they multiply weights by, from zero; or do so no longer.
    void collect(bool on);
    const Importance *importance() const { return importance_.get(); }

    // From here on, or no longer, the parts of steps are timed, from zero.
    void profile(bool on);
    bool profiled() const { return profiled_; }
    void add_sampling_time(double seconds) { timings_.sampling += seconds; }
    const dg_timings &timings() const { return timings_; }

    void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
    void clear_cancel() { cancelled_.store(false, std::memory_order_relaxed); }
    void set_poll(dg_poll poll, void *user) {
        poll_ = poll;
        poll_user_ = user;
    }

  private:
    struct DryRun {};
    Session(std::shared_ptr<const Model> model, const dg_session_options &options, DryRun);

    std::shared_ptr<const Model> model_;
    const SessionFigures figures_;
    int32_t n_threads_;
    bool own_operators_; // the CPU's (product.h); else ggml's alone
    dg_sampler sampler_; // not AUTO
    std::unique_ptr<KvCache> cache_;
    std::vector<BackendPtr> backends_;          // the CPU's is last
    std::vector<ggml_context_ptr> io_contexts_; // of each of them
    std::vector<BufferPtr> io_buffers_;
    GraphIo io_;
    std::unique_ptr<Stepper> stepper_;
    ggml_threadpool *threadpool_ = nullptr;
    int64_t process_ = 0; // whose threads they are: a fork has none of them
    std::unique_ptr<Executor> passes_;
    std::unique_ptr<Executor> signals_;
    // Graphs of passes and signals, placed; the one that was asked for last is the last.
    template <typename Key> using KeptGraphs = std::vector<std::pair<Key, Graph>>;
    KeptGraphs<Pass> pass_graphs_;                          // keys: of all passes with the same graph, one
    KeptGraphs<std::pair<int32_t, int32_t>> signal_graphs_; // first row, or FLAT_ROWS; rows
    std::vector<Graph> failed_graphs_;                      // see set_aside
    std::optional<Pass> inputs_;                            // whose positions, slots and masks are in io_
    std::vector<int32_t> logit_rows_;                       // what is in io_.logit_rows
    std::unique_ptr<Importance> importance_;
    std::unique_ptr<ActiveAdapters> adapters_; // null: none
    uint64_t encoder_key_ = 0;                 // of the prefix in the cache, too
    std::vector<uint64_t> reserved_; // ids of the adapters whose graphs passes_ has room for, as for the bare model's
    std::vector<int32_t> tokens_;
    std::atomic<int32_t> n_past_{0};
    dg_memory memory_ = {};
    std::vector<std::string> fallbacks_;
    bool profiled_ = false;
    dg_timings timings_ = {};
    std::atomic<bool> cancelled_{false};
    dg_poll poll_ = nullptr;
    void *poll_user_ = nullptr;
    std::chrono::steady_clock::time_point last_poll_{};

    // Segments of a pass, at most: each takes nodes of its own in every layer, for which the scheduler's table has
    // room.
    static constexpr int32_t MOST_SEGMENTS = 16;

    void plan(bool allocate);
    void make_io(bool allocate);
    void allocate_io(int32_t device);
    size_t io_bytes() const;
    size_t io_bytes_on(size_t device) const;
    size_t host_bytes() const;
    void start_threads();
    void stop_threads();
    void renew_in_fork();
    void make_executors(bool allocate);
    void make_pass_executor(bool allocate);
    void activate(std::unique_ptr<ActiveAdapters> adapters);
    std::unique_ptr<Executor> make_executor(const std::vector<Graph> &largest, bool allocate);
    void set_past(int32_t n);
    void set_pass_inputs(const Pass &pass);
    void set_mask(const Pass &pass, int32_t first, int32_t rows, bool sliding);
    template <typename Key, typename Build>
    void make_last(KeptGraphs<Key> &graphs, const Key &key, Executor &executor, const Build &build);
    void prepare(const Pass &pass);
    void set_logit_rows(const Pass &pass);
    int32_t block_of_logits(int32_t rows) const;
    void score_batch(const int32_t *ids, const int32_t *lengths, int32_t n_texts, double *logprob);
    void encode_chunk(const int32_t *ids, int32_t n);
    void check_canvases(const std::vector<int32_t> &segments) const;
    const SessionFigures &figures() const override { return figures_; }
    const GraphIo &io() const override { return io_; }
    void each_pass(const int32_t *ids, const std::vector<int32_t> &segments, const uint8_t *wanted, Pass kind,
                   const std::function<void(const Pass &)> &run) override;
    void compute_pass() override { compute(*passes_, pass_graphs_.back().second); }
    void compute_signal(int32_t first_row, int32_t first_logit, int32_t n_rows) override;
    void compute_signal(const std::vector<int32_t> &rows, const std::vector<int32_t> &logits) override;
    void compute(Executor &executor, const Graph &graph);
    void set_aside();
    template <typename Compute> void run(const Compute &compute);
    void run_timed(const Graph &graph);
    bool should_stop();
};

} // namespace dg
