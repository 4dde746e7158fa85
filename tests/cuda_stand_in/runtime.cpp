// A stand-in for the CUDA runtime and cuBLAS, for tests/test_cuda_stand_in.py: preloaded, it is one device whose memory
// the host cannot touch. What ggml's kernels would compute is left out; this project's own kernels run, serially, by
// the bodies that the GPU would run. Everything that is asked of the device is counted.
//
// What is tested that way is all that surrounds the kernels in a build for CUDA: where weights, cache and buffers lie,
// what crosses to the host and when, what is launched with which arguments, and whether ggml replays its CUDA graph.
//
// STAND_IN_MEMORY: the device's bytes. STAND_IN_FAILS: from so many waits for a stream on, every call reports an error,
// as a GPU does whose kernel went astray. STAND_IN_COUNTS: our kernels are counted and do nothing either, for models
// whose rows would take them minutes.
//
// Before the rows of a step are sampled, the pass's logits are written as a function of row, token and step that the
// test knows, so that what comes out can be computed elsewhere.
#include "host_device.h"

#include <cuda_runtime_api.h>

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

using dg::cuda::Step;

constexpr size_t ARENA = size_t{4} << 30; // of address space
constexpr size_t ALIGNMENT = 4096;

long long from_environment(const char *name, long long otherwise) {
    const char *value = std::getenv(name);
    return value ? std::atoll(value) : otherwise;
}

size_t memory_size() {
    static const auto size = static_cast<size_t>(from_environment("STAND_IN_MEMORY", ARENA));
    return size;
}

cudaError_t status = cudaSuccess; // of every call, once the device has failed

struct Counts {
    long long to_host; // bytes, and calls
    long long to_device;
    long long n_to_host;
    long long n_to_device;
    long long n_allocations;
    long long n_foreign_kernels; // launched one by one, not from a graph
    long long n_row_kernels;
    long long n_canvas_kernels;
    long long n_gather_kernels;
    long long n_captures;
    long long n_instances;
    long long n_updates;
    long long n_graph_launches;
    long long n_captured; // operations in the graph that was captured last
    long long held;       // bytes
    long long n_sgemm;    // products of float32 matrices that cuBLAS is asked for, one by one or captured: in TF32
} counts;

// ------------------------------------------------------------------------------------------------------- memory

char *arena() {
    static char *memory =
        static_cast<char *>(mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory;
}

bool is_device(const void *pointer) {
    const auto *p = static_cast<const char *>(pointer);
    return p >= arena() && p < arena() + ARENA;
}

std::map<char *, size_t> blocks; // those that are held

// While one lives, this file may touch the device's memory: the block that holds `pointer`, or all.
class Access {
  public:
    Access() { protect(PROT_READ | PROT_WRITE); }
    explicit Access(const void *pointer) : pointer_(pointer) { protect(PROT_READ | PROT_WRITE); }
    ~Access() { protect(PROT_NONE); }
    Access(const Access &) = delete;
    Access &operator=(const Access &) = delete;

  private:
    const void *pointer_ = nullptr;

    void protect(int how) const {
        for (const auto &[block, size] : blocks) {
            if (!pointer_ || (pointer_ >= block && pointer_ < block + size)) {
                mprotect(block, size, how);
            }
        }
    }
};

cudaError_t allocate(void **out, size_t size) {
    size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (status != cudaSuccess) {
        return status;
    }
    char *at = arena();
    for (const auto &[block, n] : blocks) { // the first gap that it fits into
        if (static_cast<size_t>(block - at) >= size) {
            break;
        }
        at = block + n;
    }
    if (size > memory_size() - static_cast<size_t>(at - arena())) {
        return cudaErrorMemoryAllocation;
    }
    blocks[at] = size;
    counts.held += static_cast<long long>(size);
    ++counts.n_allocations;
    *out = at;
    return cudaSuccess;
}

void copy(void *to, const void *from, size_t size) {
    if (is_device(from) && !is_device(to)) {
        counts.to_host += static_cast<long long>(size);
        ++counts.n_to_host;
    } else if (is_device(to) && !is_device(from)) {
        counts.to_device += static_cast<long long>(size);
        ++counts.n_to_device;
    }
    const Access access_to(to);
    const Access access_from(from);
    std::memmove(to, from, size);
}

// ------------------------------------------------------------------------------------------------------ kernels

std::map<const void *, std::string> &kernels() {
    static std::map<const void *, std::string> names;
    return names;
}

bool capturing = false;
long long n_captured = 0;

void fill_logits(const Step &step, uint32_t launch) {
    for (int32_t row = 0; row < step.n_rows; ++row) {
        float *z = step.logits + int64_t{row} * step.n_vocab;
        for (int32_t v = 0; v < step.n_vocab; ++v) {
            uint32_t x = static_cast<uint32_t>(row) * static_cast<uint32_t>(step.n_vocab) + static_cast<uint32_t>(v) +
                         launch * 7919u;
            x *= 2654435761u;
            x ^= x >> 16;
            x *= 2246822519u;
            x ^= x >> 13;
            z[v] = static_cast<float>(x % 8192u) / 128.0f - 32.0f;
        }
    }
}

void require(bool holds, const char *what) {
    if (!holds) {
        std::fprintf(stderr, "the stand-in device: %s\n", what);
        std::abort();
    }
}

cudaError_t launch(const void *function, dim3 grid, dim3 block, void **arguments) {
    const auto found = kernels().find(function);
    require(found != kernels().end(), "an unknown kernel was launched");
    const std::string &name = found->second;
    const bool rows = name.find("dg_sample_rows") != std::string::npos;
    const bool canvases = name.find("dg_finish_canvases") != std::string::npos;
    const bool gather = name.find("dg_gather_signal") != std::string::npos;
    if (!rows && !canvases && !gather) {
        ++(capturing ? n_captured : counts.n_foreign_kernels);
        return cudaSuccess;
    }
    require(!capturing, "one of our kernels was captured");
    const Access access;
    const Step &step = *static_cast<const Step *>(arguments[0]);
    const auto n_blocks = static_cast<int32_t>(grid.x);
    require(grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1, "a launch in more than one dimension");
    static const bool only_counts = from_environment("STAND_IN_COUNTS", 0) != 0;
    if (only_counts) {
        ++(rows ? counts.n_row_kernels : canvases ? counts.n_canvas_kernels : counts.n_gather_kernels);
    } else if (rows) {
        require(n_blocks == dg::cuda::row_blocks(step) && block.x == dg::cuda::ROW_THREADS, "dg_sample_rows' launch");
        fill_logits(step, static_cast<uint32_t>(counts.n_row_kernels++));
        dg::cuda::run_rows(step, false);
    } else if (canvases) {
        require(n_blocks == dg::cuda::canvas_blocks(step) && block.x == dg::cuda::CANVAS_THREADS,
                "dg_finish_canvases' launch");
        ++counts.n_canvas_kernels;
        dg::cuda::run_canvases(step, false);
    } else {
        require(n_blocks == dg::cuda::gather_blocks(step) && block.x == dg::cuda::GATHER_THREADS,
                "dg_gather_signal's launch");
        ++counts.n_gather_kernels;
        dg::cuda::run_gather(step, false);
    }
    return cudaSuccess;
}

struct Configuration {
    dim3 grid;
    dim3 block;
    size_t shared;
    cudaStream_t stream;
};
std::vector<Configuration> configurations;

template <typename T> T handle() { return reinterpret_cast<T>(new char); } // anything that is not null

} // namespace

extern "C" {

void stand_in_counts(Counts *out) { *out = counts; }

// ------------------------------------------------------------------------------------------- what nvcc's code calls

void **__cudaRegisterFatBinary(void *) { return handle<void **>(); }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *,
                            int *) {
    kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st *stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid;
    *block = c.block;
    *shared = c.shared;
    *static_cast<cudaStream_t *>(stream) = c.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function) {
    *out = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t, cudaStream_t) {
    return launch(kernel, grid, block, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch(function, config->gridDim, config->blockDim, arguments);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t,
                                        cudaStream_t) {
    return launch(function, grid, block, arguments);
}

// --------------------------------------------------------------------------------------------------- the device

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *out, int) { // a small RTX 4090
    std::memset(out, 0, sizeof *out);
    std::strcpy(out->name, "stand-in");
    out->totalGlobalMem = memory_size();
    out->sharedMemPerBlock = 48 << 10;
    out->sharedMemPerBlockOptin = 99 << 10;
    out->sharedMemPerMultiprocessor = 100 << 10;
    out->regsPerBlock = 65536;
    out->warpSize = 32;
    out->maxThreadsPerBlock = 1024;
    out->maxThreadsPerMultiProcessor = 1536;
    out->multiProcessorCount = 128;
    out->major = 8;
    out->minor = 9;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 99 << 10; break;
        case cudaDevAttrMultiProcessorCount: *value = 128; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int) {
    std::snprintf(out, static_cast<size_t>(size), "0000:00:00.0");
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *out, int, int) {
    *out = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return status; }
cudaError_t cudaPeekAtLastError() { return status; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an illegal memory access was encountered";
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *) {
    std::memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *, int, size_t, unsigned) {
    *out = 2;
    return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------- memory

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = memory_size();
    *free_bytes = memory_size() - static_cast<size_t>(counts.held);
    return status;
}
cudaError_t cudaMalloc(void **out, size_t size) { return allocate(out, size); }
cudaError_t cudaMallocManaged(void **out, size_t size, unsigned) { return allocate(out, size); }
cudaError_t cudaFree(void *memory) {
    if (const auto found = blocks.find(static_cast<char *>(memory)); found != blocks.end()) {
        counts.held -= static_cast<long long>(found->second);
        madvise(found->first, found->second, MADV_DONTNEED);
        blocks.erase(found);
    }
    return status;
}
cudaError_t cudaMallocHost(void **out, size_t size) {
    *out = std::malloc(size);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned) { return cudaMallocHost(out, size); }
cudaError_t cudaFreeHost(void *memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *) { return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void **out, void *memory, unsigned) {
    *out = memory;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t) {
    if (capturing) {
        require(is_device(to) && is_device(from), "a copy to or from the host was captured");
        ++n_captured;
        return cudaSuccess;
    }
    copy(to, from, size);
    return status;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    if (capturing) { // one operation, of whatever number of rows
        return cudaMemcpyAsync(to, from, width, kind, stream);
    }
    for (size_t row = 0; row < height; ++row) {
        cudaMemcpyAsync(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch,
                        width, kind, stream);
    }
    return cudaSuccess;
}
cudaError_t cudaMemset(void *memory, int value, size_t size) {
    const Access access(memory);
    std::memset(memory, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t) {
    if (capturing) {
        ++n_captured;
        return cudaSuccess;
    }
    return cudaMemset(memory, value, size);
}

// --------------------------------------------------------------------------------------- streams, events, graphs

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned) {
    *out = handle<cudaStream_t>();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return status; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    require(!capturing, "a stream was waited for during capture");
    static long long waits = from_environment("STAND_IN_FAILS", -1);
    if (waits >= 0 && waits-- == 0) {
        status = cudaErrorIllegalAddress;
    }
    return status;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
    *out = handle<cudaEvent_t>();
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return status; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    capturing = true;
    n_captured = 0;
    ++counts.n_captures;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *out) {
    *out = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *out) {
    capturing = false;
    counts.n_captured = n_captured;
    *out = handle<cudaGraph_t>();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t, unsigned long long) {
    ++counts.n_instances;
    *out = handle<cudaGraphExec_t>();
    return cudaSuccess;
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t, cudaGraph_t, cudaGraphExecUpdateResultInfo *) {
    ++counts.n_updates;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    ++counts.n_graph_launches;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// ------------------------------------------------------------------------------------------------------- cuBLAS
// Products as calls that do nothing; 0 is CUBLAS_STATUS_SUCCESS, and arguments are not looked at.

int cublasCreate_v2(void **out) {
    *out = handle<void *>();
    return 0;
}
int cublasDestroy_v2(void *) { return 0; }
int cublasSetStream_v2(void *, void *) { return 0; }
int cublasSetMathMode(void *, int) { return 0; }
const char *cublasGetStatusString(int) { return "a status of the stand-in device"; }
#define PRODUCT(name)                                                                                                  \
    int name() {                                                                                                       \
        ++(capturing ? n_captured : counts.n_foreign_kernels);                                                         \
        return 0;                                                                                                      \
    }
int cublasSgemm_v2() {
    ++counts.n_sgemm;
    ++(capturing ? n_captured : counts.n_foreign_kernels);
    return 0;
}
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasStrsmBatched)

} // extern "C"
