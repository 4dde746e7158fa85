#include "host_device.h"

#include "base/error.h"

#include <cstdlib>
#include <cstring>

namespace dg::cuda {
namespace {

// As on a GPU, a block finds in its shared memory what the last one left.
template <typename B, typename Shared, typename Body> void run(int32_t n_blocks, bool backwards, const Body &body) {
    B block;
    block.backwards = backwards;
    const auto shared = std::make_unique<Shared>();
    for (int32_t i = 0; i < n_blocks; ++i) {
        body(block, *shared, i);
    }
}

} // namespace

void run_rows(const Step &step, bool backwards) {
    run<RowBlock, RowShared>(row_blocks(step), backwards,
                             [&](RowBlock &block, RowShared &shared, int32_t i) { step_row(block, shared, step, i); });
}

void run_canvases(const Step &step, bool backwards) {
    run<CanvasBlock, CanvasShared>(
        canvas_blocks(step), backwards,
        [&](CanvasBlock &block, CanvasShared &shared, int32_t i) { step_canvas(block, shared, step, i); });
}

void run_gather(const Step &step, bool backwards) {
    with_type(step.embedding_type, [&](auto tag) {
        run<GatherBlock, int>(gather_blocks(step), backwards, [&](GatherBlock &block, int &, int32_t i) {
            step_gather<decltype(tag)::value>(block, step, i);
        });
    });
}

// Filled with what is no sensible number, so that nothing relies on zeros.
void *HostDevice::allocate(size_t n_bytes) {
    void *memory = std::malloc(n_bytes + 1);
    if (!memory) {
        throw Error(DG_ERROR_MEMORY, format("%zu bytes were refused", n_bytes));
    }
    return std::memset(memory, 0xA5, n_bytes + 1);
}

void HostDevice::release(void *memory) noexcept { std::free(memory); }

void HostDevice::upload(void *to, const void *from, size_t n_bytes) { std::memcpy(to, from, n_bytes); }

void HostDevice::download(void *to, const void *from, size_t n_bytes) { std::memcpy(to, from, n_bytes); }

void HostDevice::move(void *to, const void *from, size_t n_bytes) { std::memmove(to, from, n_bytes); }

void HostDevice::launch(const Step &step) {
    run_rows(step, backwards);
    run_canvases(step, backwards);
    run_gather(step, backwards);
}

} // namespace dg::cuda
