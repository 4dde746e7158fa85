// What gpu_first_hour.py asks of csrc/cuda on a GPU: one step's results, and the time of each launch. Compiled by the
// script into a library, together with csrc/cuda/cuda_device.cu.
#include "cuda/device.h"
#include "cuda/launch.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace dg::cuda;

void check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Freed with the process: a benchmark runs once.
template <typename T> T *room(Device &device, size_t n, const T *from = nullptr) {
    auto *memory = static_cast<T *>(device.allocate(n * sizeof(T)));
    if (from) {
        device.upload(memory, from, n * sizeof(T));
    }
    return memory;
}

// The median of `repeat` launches, in milliseconds.
template <typename Launch> double median_ms(int32_t repeat, const Launch &launch) {
    cudaEvent_t begin;
    cudaEvent_t end;
    check(cudaEventCreate(&begin), "an event");
    check(cudaEventCreate(&end), "an event");
    std::vector<float> times;
    for (int32_t i = 0; i <= repeat; ++i) {
        check(cudaEventRecord(begin, nullptr), "an event");
        check(launch(), "a launch");
        check(cudaEventRecord(end, nullptr), "an event");
        check(cudaEventSynchronize(end), "a kernel");
        float ms = 0.0f;
        check(cudaEventElapsedTime(&ms, begin, end), "an event");
        if (i > 0) { // the first one loads the kernel
            times.insert(std::upper_bound(times.begin(), times.end(), ms), ms);
        }
    }
    return static_cast<double>(times[times.size() / 2]);
}

} // namespace

// One canvas of n_rows x n_vocab logits at temperature `t`, no softcap; handed-in draws. argmax, ids, counts: [n_rows];
// entropy: [n_rows]; soft: [n_rows, n_embd]; ms: of dg_sample_rows that keeps the logits, the same without, of
// dg_finish_canvases, of dg_gather_signal. Returns 0, or 1 and a message of up to 255 characters.
extern "C" int gpu_step(const float *logits, int32_t n_rows, int32_t n_vocab, double t, double entropy_bound,
                        const double *uniform, const int32_t *renoise, const uint8_t *embedding, int32_t type,
                        int32_t n_embd, int32_t capacity, int32_t repeat, int32_t *argmax, int32_t *ids,
                        double *entropy, int32_t *counts, float *soft, double *ms, char *message) {
    try {
        const auto device = make_cuda_device(0);
        const auto rows = static_cast<size_t>(n_rows);
        const auto candidates = rows * static_cast<size_t>(capacity);
        const auto row_type = static_cast<RowType>(type);
        const auto embedding_bytes = static_cast<size_t>(n_vocab) * static_cast<size_t>(row_bytes(row_type, n_embd));
        Canvas c = {};
        c.t_min = c.t_max = t;
        c.entropy_bound = entropy_bound;
        c.steps = c.n_steps = 1 << 30;
        c.n_rows = n_rows;
        c.n_vocab = n_vocab;
        c.uniform = room(*device, rows, uniform);
        c.renoise = room(*device, rows, renoise);
        c.ids = room<int32_t>(*device, rows);
        c.argmax = room<int32_t>(*device, rows);
        c.last_argmax = room<int32_t>(*device, rows);
        c.draws = room<int32_t>(*device, rows);
        c.accepted = room<uint8_t>(*device, rows);
        c.entropy = room<double>(*device, rows);
        Step step = {};
        step.canvases = room(*device, 1, &c);
        step.n_canvases = 1;
        step.n_rows = n_rows;
        step.n_vocab = n_vocab;
        step.logits = room(*device, rows * static_cast<size_t>(n_vocab), logits);
        step.tokens = room<int32_t>(*device, candidates);
        step.probabilities = room<float>(*device, candidates);
        step.counts = room<int32_t>(*device, rows);
        step.capacity = capacity;
        step.lost = dg::signal_error(row_type > RowType::BF16) * dg::SHORTEST_SIGNAL;
        step.embedding = room(*device, embedding_bytes, embedding);
        step.embedding_type = row_type;
        step.n_embd = n_embd;
        step.embedding_scale = 1.0f;
        step.signal = room<float>(*device, rows * static_cast<size_t>(n_embd));

        device->launch(step);
        device->download(argmax, c.argmax, rows * sizeof *argmax);
        device->download(ids, c.ids, rows * sizeof *ids);
        device->download(entropy, c.entropy, rows * sizeof *entropy);
        device->download(counts, step.counts, rows * sizeof *counts);
        device->download(soft, step.signal, rows * static_cast<size_t>(n_embd) * sizeof *soft);

        Step keeps = step; // last, for it divides the logits again and again: slower rows would be no surprise
        keeps.keeps_logits = true;
        ms[1] = median_ms(repeat, [&] { return launch_rows(step, nullptr); });
        ms[2] = median_ms(repeat, [&] { return launch_canvases(step, nullptr); });
        ms[3] = median_ms(repeat, [&] { return launch_gather(step, nullptr); });
        ms[0] = median_ms(repeat, [&] { return launch_rows(keeps, nullptr); });
        return 0;
    } catch (const std::exception &error) {
        std::snprintf(message, 256, "%s", error.what());
        return 1;
    }
}
