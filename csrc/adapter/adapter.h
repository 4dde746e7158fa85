// Low-rank adapters: pairs of factors beside the matrices of one model. What matrix W makes of x becomes
//
//     W x + B (scales * (A x))
//
// with A [in, R] and B [R, out] in ggml's order (of experts [in, R, E] and [R, out, E]), in float32, where the matrix
// is. Denoise passes use the decoder's set; passes over the prompt, finished canvases and scored texts the encoder's.
#pragma once

#include "base/low_rank.h"
#include "model/model.h"

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace dg {

// One pair. Gate and up of the experts are one, [in, R, E] and [R, 2X, E], however file and model spell them.
struct AdapterPair {
    const ggml_tensor *base; // the matrix; of a gate and up that the model keeps apart, the gate
    int32_t device;
    bool in[2]; // the sets that it belongs to
    ggml_tensor *a;
    ggml_tensor *b;
    std::vector<float> scales; // [R]: alpha / rank
};

// Pairs put together along the rank, for the tensors a [in, R, E] and b [R, out, E]: A's rows one behind the other, B's
// columns side by side.
class StackedFactors {
  public:
    StackedFactors(ggml_tensor *a, ggml_tensor *b);
    // The next pair: a [in, rank, E], and b [rank, n_out, E], which makes rows first_out and after.
    void add(const std::vector<float> &a, const std::vector<float> &b, int64_t rank, int64_t n_out,
             int64_t first_out = 0);
    // Into the tensors.
    void store() const;

  private:
    ggml_tensor *a_;
    ggml_tensor *b_;
    std::vector<float> a_values_;
    std::vector<float> b_values_;
    int64_t done_ = 0; // of the rank
};

// An opened adapter. Immutable; keeps its model alive.
class Adapter {
  public:
    // A GGUF adapter in `path`, or, where there are any, in the `size` bytes at `data`, which are read here and not
    // kept; `name` begins the messages. `region`: a dg_region. Throws IO, MEMORY, FORMAT, UNSUPPORTED, ARGUMENT.
    Adapter(std::shared_ptr<const Model> model, const std::string &path, const void *data, size_t size,
            const std::string &name, int32_t region);

    uint64_t id() const { return id_; } // no other adapter of this process has it
    const std::shared_ptr<const Model> &model() const { return model_; }
    const std::vector<AdapterPair> &pairs() const { return pairs_; }
    const std::vector<int32_t> &ranks() const { return ranks_; } // ascending
    const std::string &base() const { return base_; }            // what it was trained on, as far as the file says
    dg_adapter_info info() const { return info_; }
    // Of what acts on the cache: the encoder's pairs of the layers. 0 when there are none.
    uint64_t encoder_hash() const { return encoder_hash_; }

  private:
    friend class AdapterReader;

    uint64_t id_;
    std::shared_ptr<const Model> model_;
    std::unique_ptr<DeviceWeights> tensors_;
    std::vector<AdapterPair> pairs_;
    std::vector<int32_t> ranks_;
    std::string base_;
    dg_adapter_info info_ = {};
    uint64_t encoder_hash_ = 0;
};

using Adapters = std::vector<std::shared_ptr<const Adapter>>;

// Adapters that run together: for each matrix and set their factors, stacked along the rank in the order of the list,
// so that five adapters take as many operators as one. Immutable, and shared by all sessions that run the same list.
class AdapterSet {
  public:
    struct Part {
        size_t adapter; // in the list
        const AdapterPair *pair;
    };
    struct Stack {
        const ggml_tensor *base;
        int32_t device;
        ggml_tensor *a;
        ggml_tensor *b;
        std::vector<Part> parts;
    };

    static std::shared_ptr<const AdapterSet> of(const Adapters &adapters);
    explicit AdapterSet(const Adapters &adapters);

    const Adapters &adapters() const { return adapters_; }
    const std::vector<Stack> &stacks() const { return stacks_; }
    // The stack beside a matrix in a set's passes: its index, -1 when there is none.
    int32_t find(const ggml_tensor *base, bool encoder) const;
    // Of what was made by stacking: nothing for one adapter.
    size_t bytes() const;

  private:
    Adapters adapters_;
    std::unique_ptr<DeviceWeights> tensors_;
    std::vector<Stack> stacks_;
    std::unordered_map<const ggml_tensor *, std::array<int32_t, 2>> index_;
};

// A session's adapters: a set, and the scales that the session gives its members.
class ActiveAdapters {
  public:
    ActiveAdapters(std::shared_ptr<const AdapterSet> set, const std::vector<float> &scales);

    const AdapterSet &set() const { return *set_; }
    void set_scales(const std::vector<float> &scales);
    // Null when nothing acts there.
    const LowRank *find(const ggml_tensor *base, bool encoder) const;
    size_t bytes() const;

  private:
    std::shared_ptr<const AdapterSet> set_;
    std::unique_ptr<DeviceWeights> tensors_;
    std::vector<LowRank> low_; // of each stack
};

// What a cache that was written with these adapters depends on; 0: no more than the model.
uint64_t encoder_key(const Adapters &adapters, const std::vector<float> &scales);

} // namespace dg
