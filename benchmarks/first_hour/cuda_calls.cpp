// Counts calls of CUDA's runtime. Loaded before it (LD_PRELOAD), each function counts and calls the runtime's own. No
// header of CUDA's is needed: handles are pointers, and the one struct that is passed by value is three numbers.
// cuBLAS has a runtime of its own inside: what it launches is not seen.
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <initializer_list>

namespace {

struct Dim3 {
    unsigned x, y, z;
};

// In the order of launches.py.
enum Count {
    LAUNCHES,
    CAPTURED,
    GRAPH_LAUNCHES,
    CAPTURES,
    INSTANCES,
    UPDATES,
    TO_DEVICE,
    TO_HOST,
    WAITS,
    ALLOCATIONS,
    N
};

std::atomic<long long> counts[N];
std::atomic<int> capturing;

void add(Count count, long long n = 1) { counts[count] += n; }

void add_launch() { add(capturing > 0 ? CAPTURED : LAUNCHES); }

// The runtime's function. Python opens the extension, and the runtime with it, for itself alone, so that what follows
// this library in the common list may lack it: then it is asked by its name.
void *next(const char *name) {
    if (void *found = dlsym(RTLD_NEXT, name)) {
        return found;
    }
    for (const char *runtime : {"libcudart.so.13", "libcudart.so.12"}) {
        if (void *library = dlopen(runtime, RTLD_NOLOAD | RTLD_NOW)) {
            if (void *found = dlsym(library, name)) {
                return found;
            }
        }
    }
    std::fprintf(stderr, "cuda_calls: the CUDA runtime has no %s\n", name);
    std::abort();
}

enum Kind { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2 };

void add_copy(int kind, std::size_t size) {
    if (kind == HOST_TO_DEVICE || kind == DEVICE_TO_HOST) {
        add(kind == HOST_TO_DEVICE ? TO_DEVICE : TO_HOST, static_cast<long long>(size));
    }
}

} // namespace

#define NEXT(name) reinterpret_cast<decltype(&name)>(real)
#define FORWARD(name)                                                                                                  \
    static void *const real = next(#name);                                                                             \
    return NEXT(name)

extern "C" {

void cuda_calls(long long *out) {
    for (int i = 0; i < N; ++i) {
        out[i] = counts[i];
    }
}

int cudaLaunchKernel(const void *function, Dim3 grid, Dim3 block, void **arguments, std::size_t shared, void *stream) {
    add_launch();
    FORWARD(cudaLaunchKernel)(function, grid, block, arguments, shared, stream);
}
// What code of nvcc 13 calls in its place.
int __cudaLaunchKernel(void *kernel, Dim3 grid, Dim3 block, void **arguments, std::size_t shared, void *stream) {
    add_launch();
    FORWARD(__cudaLaunchKernel)(kernel, grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const void *config, const void *function, void **arguments) {
    add_launch();
    FORWARD(cudaLaunchKernelExC)(config, function, arguments);
}
int cudaLaunchCooperativeKernel(const void *function, Dim3 grid, Dim3 block, void **arguments, std::size_t shared,
                                void *stream) {
    add_launch();
    FORWARD(cudaLaunchCooperativeKernel)(function, grid, block, arguments, shared, stream);
}
int cudaGraphLaunch(void *graph, void *stream) {
    add(GRAPH_LAUNCHES);
    FORWARD(cudaGraphLaunch)(graph, stream);
}
int cudaStreamBeginCapture(void *stream, int mode) {
    add(CAPTURES);
    ++capturing;
    FORWARD(cudaStreamBeginCapture)(stream, mode);
}
int cudaStreamEndCapture(void *stream, void **graph) {
    --capturing;
    FORWARD(cudaStreamEndCapture)(stream, graph);
}
int cudaGraphInstantiate(void **out, void *graph, unsigned long long flags) {
    add(INSTANCES);
    FORWARD(cudaGraphInstantiate)(out, graph, flags);
}
int cudaGraphExecUpdate(void *instance, void *graph, void *info) {
    add(UPDATES);
    FORWARD(cudaGraphExecUpdate)(instance, graph, info);
}
int cudaMemcpyAsync(void *to, const void *from, std::size_t size, int kind, void *stream) {
    add_copy(kind, size);
    FORWARD(cudaMemcpyAsync)(to, from, size, kind, stream);
}
int cudaMemcpy2DAsync(void *to, std::size_t to_pitch, const void *from, std::size_t from_pitch, std::size_t width,
                      std::size_t height, int kind, void *stream) {
    add_copy(kind, width * height);
    FORWARD(cudaMemcpy2DAsync)(to, to_pitch, from, from_pitch, width, height, kind, stream);
}
int cudaStreamSynchronize(void *stream) {
    add(WAITS);
    FORWARD(cudaStreamSynchronize)(stream);
}
int cudaMalloc(void **out, std::size_t size) {
    add(ALLOCATIONS);
    FORWARD(cudaMalloc)(out, size);
}
}
