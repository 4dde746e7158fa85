// Which device each part of a model lies and is computed on.
//
// Layers stand in a row: those that fit nowhere else on the CPU, then the devices', one after the other, so that a pass
// crosses from device to device once. The last device is the main one: it has the head too, where logits are made,
// sampled and turned into the self-conditioning signal, and they never leave it. A device that takes part once in a
// pass has one graph, which an RPC server need not be sent again.
#pragma once

#include "devices.h"
#include "diffgguf.h"

#include <cstdint>
#include <vector>

namespace dg {

class Model;

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
    struct Layer {
        size_t weights = 0; // without the experts
        size_t experts = 0;
        size_t cache = 0;
    };
    std::vector<Layer> layers;
    size_t head = 0;    // the embedding and the logits
    size_t compute = 0; // intermediate tensors of a pass; each device that takes part needs them
    size_t sampler = 0; // and those of the sampler and the self-conditioning signal
};

// Of a model whose keys are read, before its tensors are bound.
Sizes sizes_of(const Model &model, const dg_session_options &session);

// Throws ARGUMENT for options out of range. Only "as many as fit" looks at what is free: a number is
// done as it was asked for.
Placement place_layers(const Sizes &sizes, const Devices &devices, const dg_model_options &options);

} // namespace dg
