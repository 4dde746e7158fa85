// The CUDA kernels' bodies on the host, for tests/test_kernels.py: C functions that ctypes can call. Compiled by the
// test itself, with csrc/cuda/device_loop.cpp, host_device.cpp and what these need.
#include "cuda/device_loop.h"
#include "host_device.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace dg::cuda;

// Counts what a captured graph of launches must not have.
class CountingDevice final : public HostDevice {
  public:
    int32_t n_uploads = 0;
    int32_t n_arguments = 0; // how often a launch's arguments were not those of the launch before

    void upload(void *to, const void *from, size_t n_bytes) override {
        ++n_uploads;
        HostDevice::upload(to, from, n_bytes);
    }
    void launch(const Step &step) override {
        if (std::memcmp(&step, &last_, sizeof step) != 0) {
            ++n_arguments;
            std::memcpy(&last_, &step, sizeof step);
        }
        HostDevice::launch(step);
    }

  private:
    Step last_ = {};
};

struct Loop {
    CountingDevice device;
    std::vector<char> candidates;
    DeviceLoop loop;
    std::string error;
    explicit Loop(DeviceLoop::Target target)
        : candidates(candidate_bytes(target.n_rows, target.capacity), '\xA5'), loop(device, with_candidates(target)) {}
    DeviceLoop::Target with_candidates(DeviceLoop::Target target) {
        target.candidates = candidates.data();
        return target;
    }
};

template <typename F> int guarded(Loop *l, const F &f) {
    try {
        f();
        return 0;
    } catch (const std::exception &error) {
        l->error = error.what();
        return 1;
    }
}

} // namespace

extern "C" {

// Rows one by one, without rules of a canvas; arrays [n_rows]. allowed: null, or [n_allowed] for every row.
void dgk_rows(float *logits, int32_t n_rows, int32_t n_vocab, float softcap, float temperature, const double *u,
              const int32_t *pinned, const int32_t *watched, const int32_t *allowed, int32_t n_allowed,
              int keeps_logits, int backwards, int32_t *argmax, int32_t *draw, double *entropy, double *logprob,
              uint8_t *broken, int32_t capacity, double lost, int32_t *tokens, float *probabilities, int32_t *counts) {
    RowBlock block;
    block.backwards = backwards != 0;
    const auto shared = std::make_unique<RowShared>();
    for (int32_t row = 0; row < n_rows; ++row) {
        const RowInput in = {logits + int64_t{row} * n_vocab,
                             n_vocab,
                             softcap,
                             temperature,
                             u[row],
                             pinned ? pinned[row] : -1,
                             watched != nullptr,
                             watched ? watched[row] : -1,
                             allowed,
                             n_allowed,
                             keeps_logits != 0};
        const int64_t place = int64_t{row} * capacity;
        process_row(block, *shared, in, {tokens + place, probabilities + place, counts + row, capacity, lost});
        argmax[row] = shared->out.argmax;
        draw[row] = shared->out.draw;
        entropy[row] = shared->out.entropy;
        logprob[row] = shared->out.logprob;
        broken[row] = shared->out.broken ? 1 : 0;
    }
}

// A row of `n` weights.
void dgk_dequantize(int32_t type, const uint8_t *row, int32_t n, float *out) {
    with_type(static_cast<RowType>(type), [&](auto tag) {
        for (int32_t i = 0; i < n; ++i) {
            out[i] = weight_at<decltype(tag)::value>(row, i);
        }
    });
}

Loop *dgk_loop_new(int32_t n_rows, int32_t n_vocab, float softcap, float *logits, int32_t *ids, float *soft,
                   const uint8_t *embedding, int32_t type, int32_t n_embd, int32_t capacity, double lost,
                   int backwards) {
    auto *l = new Loop({n_rows, n_vocab, softcap, logits, ids, soft, embedding, static_cast<RowType>(type), n_embd,
                        nullptr, capacity, lost});
    l->device.backwards = backwards != 0;
    return l;
}
void dgk_loop_free(Loop *l) { delete l; }
const char *dgk_loop_error(const Loop *l) { return l->error.c_str(); }

int dgk_loop_begin(Loop *l, const dg_canvas_options *options, int32_t n) {
    return guarded(l, [&] {
        std::vector<dg::CanvasStart> starts;
        for (int32_t i = 0; i < n; ++i) {
            const dg_canvas_options &o = options[i];
            const int32_t cap = o.sampling.max_steps;
            const int32_t n_steps = cap > 0 && cap < o.sampling.steps ? cap : o.sampling.steps;
            starts.push_back({o.sampling,
                              n_steps,
                              o.seed,
                              o.canvas_index,
                              o.n_rows,
                              {o.pinned, o.watched, o.allowed_ends, o.allowed_ids},
                              o.canvas});
        }
        l->loop.begin(starts);
    });
}
int dgk_loop_place(Loop *l, const int32_t *which, int32_t n) {
    return guarded(l, [&] { l->loop.place({which, which + n}); });
}
int dgk_loop_step(Loop *l, const dg_noise *noise) {
    return guarded(l, [&] { l->loop.step(noise); });
}
int32_t dgk_loop_uploads(const Loop *l) { return l->device.n_uploads; }
int32_t dgk_loop_arguments(const Loop *l) { return l->device.n_arguments; }
int32_t dgk_loop_flat(const Loop *l, int32_t *rows) {
    const FlatRows flat = l->loop.flat_rows();
    std::copy(flat.rows.begin(), flat.rows.end(), rows);
    return static_cast<int32_t>(flat.rows.size());
}
int dgk_loop_read(Loop *l, int32_t index, int32_t *argmax, int32_t *canvas, uint8_t *accepted, double *entropy,
                  double *logprob, double *mean_entropy, int32_t *flags) {
    return guarded(l, [&] {
        l->loop.read(index, {argmax, canvas, accepted, entropy, logprob});
        const Canvas::Decision &d = l->loop.decision(index);
        *mean_entropy = d.mean_entropy;
        flags[0] = d.converged;
        flags[1] = d.finished;
    });
}

} // extern "C"
