// Rows spread over threads. Results do not depend on how: a row is computed whole, by one thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace dg {

// Calls body(row) for every row of `n_cols` values. The first exception is rethrown on the caller's thread.
template <typename Body> void parallel_rows(int32_t n_rows, int32_t n_cols, int32_t n_threads, const Body &body) {
    // Starting a thread costs about as much as 20,000 logits: a small canvas is done alone.
    const int64_t worth = static_cast<int64_t>(n_rows) * n_cols / 65536 + 1;
    const auto n = static_cast<int32_t>(std::min<int64_t>({n_threads, worth, n_rows}));
    if (n <= 1) {
        for (int32_t row = 0; row < n_rows; ++row) {
            body(row);
        }
        return;
    }
    std::atomic<int32_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    const auto work = [&] {
        try {
            for (int32_t row = next++; row < n_rows; row = next++) {
                body(row);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failure_mutex);
            if (!failure) {
                failure = std::current_exception();
            }
            next = n_rows;
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(static_cast<size_t>(n - 1));
    try {
        for (int32_t i = 1; i < n; ++i) {
            threads.emplace_back(work);
        }
    } catch (const std::system_error &) {
        // No more threads to be had: those that started, and this one, do the work.
    }
    work();
    for (std::thread &thread : threads) {
        thread.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

} // namespace dg
