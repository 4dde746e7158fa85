// The kernels, whose bodies are in row.h, canvas.h and gather.h, and the device that launches them.
#include "cuda/device.h"
#include "cuda/launch.h"

#include "base/gpu_failure.h"

#include <cuda_runtime.h>

namespace dg::cuda {
namespace {

// Two blocks a multiprocessor: at most 64 registers a thread, and 256 rows are one wave on 128 multiprocessors or more.
__global__ void __launch_bounds__(ROW_THREADS, 2) dg_sample_rows(const Step step) {
    __shared__ RowShared shared;
    RowBlock block;
    step_row(block, shared, step, static_cast<int32_t>(blockIdx.x));
}

__global__ void __launch_bounds__(CANVAS_THREADS) dg_finish_canvases(const Step step) {
    __shared__ CanvasShared shared;
    CanvasBlock block;
    step_canvas(block, shared, step, static_cast<int32_t>(blockIdx.x));
}

template <RowType TYPE> __global__ void __launch_bounds__(GATHER_THREADS) dg_gather_signal(const Step step) {
    GatherBlock block;
    step_gather<TYPE>(block, step, static_cast<int32_t>(blockIdx.x));
}

void check(cudaError_t status, const char *what) {
    if (status != cudaSuccess) {
        cudaGetLastError(); // it would be reported again by the next call
        const std::string reason = format("CUDA: %s: %s", what, cudaGetErrorString(status));
        throw status == cudaErrorMemoryAllocation ? Error(DG_ERROR_MEMORY, reason) : gpu_failure(reason);
    }
}

class CudaDevice final : public Device {
  public:
    explicit CudaDevice(int index) : index_(index) {
        select();
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream was refused");
    }
    ~CudaDevice() override { cudaStreamDestroy(stream_); }
    CudaDevice(const CudaDevice &) = delete;
    CudaDevice &operator=(const CudaDevice &) = delete;

    void *allocate(size_t n_bytes) override {
        select();
        void *memory = nullptr;
        check(cudaMalloc(&memory, n_bytes), format("%zu bytes were refused", n_bytes).c_str());
        return memory;
    }
    void release(void *memory) noexcept override { cudaFree(memory); }
    void upload(void *to, const void *from, size_t n_bytes) override {
        copy(to, from, n_bytes, cudaMemcpyHostToDevice);
    }
    void download(void *to, const void *from, size_t n_bytes) override {
        copy(to, from, n_bytes, cudaMemcpyDeviceToHost);
    }
    void move(void *to, const void *from, size_t n_bytes) override {
        // Overlapping ranges are copied by way of a third place.
        void *between = allocate(n_bytes);
        cudaError_t status = cudaMemcpyAsync(between, from, n_bytes, cudaMemcpyDeviceToDevice, stream_);
        if (status == cudaSuccess) {
            status = cudaMemcpyAsync(to, between, n_bytes, cudaMemcpyDeviceToDevice, stream_);
        }
        if (status == cudaSuccess) {
            status = cudaStreamSynchronize(stream_);
        }
        release(between);
        check(status, "a copy on the device failed");
    }
    void launch(const Step &step) override {
        select();
        check(launch_rows(step, stream_), "dg_sample_rows was not launched");
        check(launch_canvases(step, stream_), "dg_finish_canvases was not launched");
        check(launch_gather(step, stream_), "dg_gather_signal was not launched");
    }

  private:
    int index_;
    cudaStream_t stream_ = nullptr;

    void select() { check(cudaSetDevice(index_), "the device cannot be used"); }
    void copy(void *to, const void *from, size_t n_bytes, cudaMemcpyKind kind) {
        select();
        check(cudaMemcpyAsync(to, from, n_bytes, kind, stream_), "a copy was refused");
        check(cudaStreamSynchronize(stream_), "a copy or what ran before it failed");
    }
};

} // namespace

cudaError_t launch_rows(const Step &step, cudaStream_t stream) {
    dg_sample_rows<<<static_cast<unsigned>(row_blocks(step)), ROW_THREADS, 0, stream>>>(step);
    return cudaGetLastError();
}

cudaError_t launch_canvases(const Step &step, cudaStream_t stream) {
    dg_finish_canvases<<<static_cast<unsigned>(canvas_blocks(step)), CANVAS_THREADS, 0, stream>>>(step);
    return cudaGetLastError();
}

cudaError_t launch_gather(const Step &step, cudaStream_t stream) {
    const int32_t blocks = gather_blocks(step);
    if (blocks == 0) {
        return cudaSuccess;
    }
    with_type(step.embedding_type, [&](auto tag) {
        dg_gather_signal<decltype(tag)::value><<<static_cast<unsigned>(blocks), GATHER_THREADS, 0, stream>>>(step);
    });
    return cudaGetLastError();
}

std::unique_ptr<Device> make_cuda_device(int index) { return std::make_unique<CudaDevice>(index); }

} // namespace dg::cuda
