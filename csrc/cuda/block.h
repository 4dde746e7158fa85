// A block of threads as kernel bodies see it: phases with a barrier behind each, values that each thread has for
// itself, and sums over warps. On the device these are threadIdx.x, __syncthreads and shuffles. On the host a phase is
// a loop over the threads, so the same bodies run in a test without a GPU; there the threads may also go backwards,
// which changes the result of a body whose threads race within a phase.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#    define DG_HD __host__ __device__ __forceinline__
#else
#    define DG_HD inline
#endif
#if defined(__CUDA_ARCH__)
#    define DG_UNROLL _Pragma("unroll") // arrays whose indices are then constants live in registers
#else
#    define DG_UNROLL
#endif

namespace dg::cuda {

constexpr int WARP = 32;

// One T for each of the block's N threads: a register on the device.
template <typename T, int N> class PerThread {
  public:
#if defined(__CUDA_ARCH__)
    DG_HD T &operator[](int) { return value_; }

  private:
    T value_;
#else
    DG_HD T &operator[](int thread) { return values_[thread]; }

  private:
    T values_[N];
#endif
};

template <int N> class Block {
  public:
    static constexpr int N_THREADS = N;
    static constexpr int N_WARPS = N / WARP;
    static_assert(N % WARP == 0 && N <= 1024, "whole warps, as many as a block may have");

    // Host only: the order in which the threads go through each phase.
    bool backwards = false;

    // f(thread) on every thread, then a barrier. Within it no thread reads what another one writes.
    template <typename F> DG_HD void phase(const F &f) const {
#if defined(__CUDA_ARCH__)
        f(static_cast<int>(threadIdx.x));
        __syncthreads();
#else
        for (int i = 0; i < N; ++i) {
            f(backwards ? N - 1 - i : i);
        }
#endif
    }

    // f(thread) on every thread, without a barrier: for what touches the thread's own values, and memory that no other
    // thread writes before the next phase ends.
    template <typename F> DG_HD void local(const F &f) const {
#if defined(__CUDA_ARCH__)
        f(static_cast<int>(threadIdx.x));
#else
        phase(f);
#endif
    }

    // Every thread's value becomes that of its whole warp: combine(a, b), associative up to rounding and commutative,
    // in a butterfly, so that all threads get the same bits, on the host too. All threads of the block take part.
    template <typename T, typename Combine> DG_HD void reduce_warps(PerThread<T, N> &values, const Combine &combine) {
#if defined(__CUDA_ARCH__)
        T value = values[0];
        DG_UNROLL
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            value = combine(value, shuffle_xor(value, distance));
        }
        values[0] = value;
#else
        for (int first = 0; first < N; first += WARP) {
            for (int distance = WARP / 2; distance > 0; distance /= 2) {
                T before[WARP];
                for (int lane = 0; lane < WARP; ++lane) {
                    before[lane] = values[first + lane];
                }
                for (int lane = 0; lane < WARP; ++lane) {
                    values[first + lane] = combine(before[lane], before[lane ^ distance]);
                }
            }
        }
#endif
    }

    // Every thread's value becomes the sum of those of the lanes before it in its warp.
    DG_HD void sum_lanes_before(PerThread<int32_t, N> &values) {
#if defined(__CUDA_ARCH__)
        const int lane = static_cast<int>(threadIdx.x) % WARP;
        int32_t through = values[0];
        DG_UNROLL
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int32_t other = __shfl_up_sync(0xFFFFFFFFu, through, distance);
            through += lane >= distance ? other : 0;
        }
        values[0] = through - values[0];
#else
        for (int first = 0; first < N; first += WARP) {
            int32_t before = 0;
            for (int lane = 0; lane < WARP; ++lane) {
                const int32_t own = values[first + lane];
                values[first + lane] = before;
                before += own;
            }
        }
#endif
    }

  private:
#if defined(__CUDA_ARCH__)
    // Of any struct of whole 32-bit words.
    template <typename T> static DG_HD T shuffle_xor(const T &value, int distance) {
        static_assert(sizeof(T) % sizeof(uint32_t) == 0, "whole words");
        union Words {
            T whole;
            uint32_t words[sizeof(T) / sizeof(uint32_t)];
            DG_HD Words() {}
        } in, out;
        in.whole = value;
        DG_UNROLL
        for (size_t i = 0; i < sizeof(T) / sizeof(uint32_t); ++i) {
            out.words[i] = __shfl_xor_sync(0xFFFFFFFFu, in.words[i], distance);
        }
        return out.whole;
    }
#endif
};

} // namespace dg::cuda
