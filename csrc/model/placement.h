// Which device each part of a model lies and is computed on.
//
// Layers stand in a row: those that fit nowhere else on the CPU, then the devices', one after the other, so that a pass
// crosses from device to device once. The last device is the main one: it has the head too, where logits are made,
// sampled and turned into the self-conditioning signal, and they never leave it. A device that takes part once in a
// pass has one graph, which an RPC server need not be sent again.
//
// Without a number from the caller, what goes there is what fits (dg_plan_layers in diffgguf.h). Its order goes by
// operations per byte. In a denoise step of 256 rows all weights are read once, those of the experts too (256 rows
// choose 8 of 128 experts each, so nearly every one is chosen), but an expert meets 16 rows where a dense matrix meets
// 256. So first the buffers and the head, without which the loop cannot stay on the device, then whole layers without
// their experts, each with its part of the cache, then experts; all from the last layer backwards.
#pragma once

#include "diffgguf.h"
#include "file/gguf_files.h"
#include "model/devices.h"

#include <cstdint>
#include <vector>

namespace dg {

struct Placement {
    // Of each layer: attention, norms and the dense MLP; the experts; the KV cache.
    std::vector<int32_t> layers;
    std::vector<int32_t> experts;
    std::vector<int32_t> cache;
    int32_t input = 0; // the embedding's rows of the ids
    int32_t head = 0;  // the head, the sampler, the self-conditioning signal
};

// Bytes, from the file and the session that is to be expected.
struct Sizes {
    std::vector<dg_layer_bytes> layers;
    size_t head = 0; // the embedding, and its transposed copy where there is one
    dg_needs needs = {};
};

// What a device has to offer.
struct Room {
    size_t free = 0;
    bool remote = false; // behind an RPC server
};

struct Plan {
    int32_t n_cpu_moe = 0;
    std::vector<int32_t> devices; // of the last layers, those that lie on one
};

// Of a model whose keys are read, before its tensors are bound.
Sizes sizes_of(const GgufFiles &files, const dg_config &config, const std::vector<dg_layer_config> &layers,
               const dg_model_options &options);

// Throws ARGUMENT for numbers below those that mean something.
void check_placing(const dg_model_options &options);
// The devices that the options ask for, the main one last. Throws as check_placing does, ARGUMENT for options that have
// nothing to place, UNSUPPORTED for devices that are not there, IO for a server that does not answer.
std::unique_ptr<const Devices> open_devices(const dg_model_options &options);

// As dg_plan_layers. Only "as many as fit" looks at what is free: a number is done as it was asked for.
Plan plan_layers(const Sizes &sizes, const std::vector<Room> &rooms, const dg_model_options &options);
size_t reserve();

// The plan, carried out.
Placement place_layers(const Sizes &sizes, const Devices &devices, const dg_model_options &options);

} // namespace dg
