// Reads a GGUF adapter: llama.cpp's keys and names, and a region, which it lacks (docs/ADAPTERS.md).
#include "adapter/adapter.h"

#include "base/error.h"
#include "base/hash.h"
#include "file/gguf_head.h"
#include "file/gguf_keys.h"
#include "file/names.h"
#include "file/quantize.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <memory>
#include <optional>
#include <set>
#include <tuple>

namespace dg {
namespace {

std::atomic<uint64_t> n_opened{1};

// What may be adapted: a matrix, and what it makes of what.
struct Slot {
    const ggml_tensor *base;
    int32_t device;
    int64_t n_in;
    int64_t n_out;
    int64_t n_expert; // 0 for a matrix that is no expert's
    bool of_layer;    // in the set of a mode; else the decoder's, or the head's
};

// A tensor of the file, and its bytes.
struct FactorTensor {
    const GgufTensor *info;
    const unsigned char *data;

    const char *name() const { return info->name.c_str(); }
    ggml_type type() const { return static_cast<ggml_type>(info->type); }
    int64_t size(size_t dimension) const { return info->ne[dimension]; }
    int64_t n_values() const { return info->ne[0] * info->ne[1] * info->ne[2] * info->ne[3]; }
};

// A pair as the file has it. `half` of the experts' gate and up: 0 both, 1 the gate, 2 the up.
struct FilePair {
    std::optional<FactorTensor> a;
    std::optional<FactorTensor> b;
    const Slot *slot = nullptr;
    int half = 0;
    bool in[2] = {false, false};
    float scale = 1.0f;

    int64_t rank() const { return a->size(1); }
    int64_t n_out() const { return slot->n_out / (half ? 2 : 1); }
};

// Two things of a matrix: factors in float32.
struct Factors {
    std::vector<float> a;
    std::vector<float> b;
    bool zero = false;
};

// Bytes of a caller's.
class GivenBytes final : public FileBytes {
  public:
    GivenBytes(const void *data, size_t size) {
        data_ = static_cast<const unsigned char *>(data);
        size_ = size;
    }
};

std::map<std::string, Slot> slots_of(const Model &model) {
    const dg_config &c = model.config();
    const Weights &w = model.weights();
    const Placement &placement = model.placement();
    std::map<std::string, Slot> slots;
    const auto add = [&](const std::string &name, const ggml_tensor *base, int32_t device, bool of_layer) {
        if (base) {
            slots[name] = {base, device, base->ne[0], base->ne[1], 0, of_layer};
        }
    };
    for (size_t i = 0; i < w.layers.size(); ++i) {
        const LayerWeights &l = w.layers[i];
        const std::string layer = format("blk.%zu.", i);
        const int32_t device = placement.layers[i];
        add(layer + "attn_q", l.attn_q, device, true);
        add(layer + "attn_k", l.attn_k, device, true);
        add(layer + "attn_v", l.attn_v, device, true);
        add(layer + "attn_output", l.attn_output, device, true);
        add(layer + "ffn_gate", l.ffn_gate, device, true);
        add(layer + "ffn_up", l.ffn_up, device, true);
        add(layer + "ffn_down", l.ffn_down, device, true);
        add(layer + "ffn_gate_inp", l.router, device, true);
        const int32_t experts = placement.experts[i];
        slots[layer + "ffn_gate_up_exps"] = {l.gate_up_exps ? l.gate_up_exps : l.gate_exps,
                                             experts,
                                             c.n_embd,
                                             2 * int64_t{c.n_ff_exp},
                                             c.n_expert,
                                             true};
        slots[layer + "ffn_down_exps"] = {l.down_exps, experts, c.n_ff_exp, c.n_embd, c.n_expert, true};
    }
    add("self_cond_gate", w.self_cond_gate, placement.layers.front(), false);
    add("self_cond_up", w.self_cond_up, placement.layers.front(), false);
    add("self_cond_down", w.self_cond_down, placement.layers.front(), false);
    add("output", w.token_embd, placement.head, false);
    return slots;
}

bool ends_with(const std::string &text, const char *tail) {
    const std::string end = tail;
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

void take_prefix(std::string &text, const char *prefix, bool &found) {
    const std::string start = prefix;
    found = text.compare(0, start.size(), start) == 0;
    if (found) {
        text.erase(0, start.size());
    }
}

} // namespace

class AdapterReader {
  public:
    AdapterReader(Adapter &out, const std::string &name, int32_t region)
        : out_(out), model_(*out.model_), name_(name), region_(region), slots_(slots_of(model_)) {}

    void read(const GgufHead &head, const FileBytes &file) {
        read_keys(head);
        for (const GgufHead::Tensor &tensor : head.tensors()) {
            sort({tensor.info, file.data() + tensor.info->offset});
        }
        check_region(head.keys());
        for (auto &[place, pair] : pairs_) {
            check(place.second, pair);
        }
        check_unique();
        make();
    }

  private:
    Adapter &out_;
    const Model &model_;
    const std::string &name_;
    int32_t region_; // a dg_region: what the caller says of names without a prefix, or of all
    const std::map<std::string, Slot> slots_;
    double alpha_ = 0.0;
    std::map<std::pair<std::string, std::string>, FilePair> pairs_; // by prefix and target

    [[noreturn]] void fail(dg_status status, const std::string &what) const {
        throw Error(status, name_ + ": " + what);
    }
    [[noreturn]] void fail_format(const std::string &what) const { fail(DG_ERROR_FORMAT, what); }

    void read_keys(const GgufHead &head) {
        const GgufKeys keys(name_, head.keys());
        const auto &tensors = head.tensors();
        const bool named = std::all_of(tensors.begin(), tensors.end(), [](const GgufHead::Tensor &t) {
            return ends_with(t.info->name, ".lora_a") || ends_with(t.info->name, ".lora_b");
        });
        const bool says = keys.has(names::KEY_ADAPTER_TYPE) || keys.text_or(names::KEY_TYPE, "") == "adapter";
        if (!says && (!named || tensors.empty())) {
            fail_format("is a model, not an adapter");
        }
        const std::string architecture = keys.text_or(names::KEY_ARCHITECTURE, names::ARCHITECTURE);
        if (architecture != names::ARCHITECTURE) {
            fail_format("is made for " + architecture + ": expected " + names::ARCHITECTURE);
        }
        const std::string type = keys.text_or(names::KEY_ADAPTER_TYPE, "lora");
        if (type != "lora") {
            fail(DG_ERROR_UNSUPPORTED, "is a " + type + " adapter: only plain LoRA is supported");
        }
        if (keys.has(names::KEY_ADAPTER_ALORA)) {
            fail(DG_ERROR_UNSUPPORTED,
                 std::string("needs ") + names::KEY_ADAPTER_ALORA + ": only plain LoRA is supported");
        }
        alpha_ = keys.real_or(names::KEY_ADAPTER_ALPHA, -1e9, 1e9, 0.0);
        out_.base_ = keys.text_or(names::KEY_ADAPTER_BASE, "");
    }

    // A tensor to its pair.
    void sort(const FactorTensor &tensor) {
        std::string target = tensor.name();
        const std::string full = target;
        const bool a = ends_with(target, ".weight.lora_a");
        if (!a && !ends_with(target, ".weight.lora_b")) {
            fail(DG_ERROR_UNSUPPORTED, "holds " + full + ", which is no low-rank pair: only plain LoRA is supported");
        }
        target.resize(target.size() - std::string(".weight.lora_a").size());
        std::string prefix;
        for (const char *one : {"dec.", "enc."}) {
            bool found = false;
            take_prefix(target, one, found);
            if (found) {
                prefix = one;
                break;
            }
        }
        if (target == "token_embd") {
            fail(DG_ERROR_UNSUPPORTED, "adapts the token embedding: not supported");
        }
        FilePair &pair = pairs_[{prefix, target}];
        (a ? pair.a : pair.b) = tensor;
        find_slot(target, full, pair);
    }

    void find_slot(const std::string &target, const std::string &full, FilePair &pair) const {
        std::string whole = target;
        for (const auto &[end, half] : {std::pair<const char *, int>{".ffn_gate_exps", 1}, {".ffn_up_exps", 2}}) {
            if (ends_with(target, end)) {
                whole = target.substr(0, target.size() - std::string(end).size()) + ".ffn_gate_up_exps";
                pair.half = half;
            }
        }
        const auto found = slots_.find(whole);
        if (found == slots_.end()) {
            const size_t dot = target.rfind('.');
            const std::string what = target.substr(dot == std::string::npos ? 0 : dot + 1);
            static const std::set<std::string> known = {
                "attn_q",         "attn_k",       "attn_v",           "attn_output",   "ffn_gate",
                "ffn_up",         "ffn_down",     "ffn_gate_inp",     "ffn_gate_exps", "ffn_up_exps",
                "self_cond_gate", "self_cond_up", "ffn_gate_up_exps", "ffn_down_exps", "self_cond_down"};
            if (known.count(what) == 0) {
                fail_format("tensor " + full + " belongs to no module of DiffusionGemma");
            }
            const std::string where = dot == std::string::npos ? "the decoder" : target.substr(0, dot);
            fail_format(where + ": this base has no " + what + " there: another base model?");
        }
        pair.slot = &found->second;
    }

    // What names without a prefix mean, and what the caller wants of it.
    void check_region(const GgufHeader &header) {
        const GgufKeys keys(name_, header);
        static const std::map<std::string, int32_t> regions = {
            {"both", DG_REGION_BOTH}, {"decoder", DG_REGION_DECODER}, {"encoder", DG_REGION_ENCODER}};
        const std::string text = keys.text_or(names::KEY_ADAPTER_REGION, "both");
        const auto named = regions.find(text);
        if (named == regions.end()) {
            fail_format(std::string("key ") + names::KEY_ADAPTER_REGION + " is " + text +
                        ": expected both, decoder or encoder");
        }
        std::set<int32_t> found;
        const auto region_of = [&](const std::string &prefix) {
            return prefix.empty() ? named->second : (prefix == "dec." ? DG_REGION_DECODER : DG_REGION_ENCODER);
        };
        for (const auto &[place, pair] : pairs_) {
            if (pair.slot->of_layer) {
                found.insert(region_of(place.first));
            }
        }
        if (region_ != DG_REGION_OF_FILE && found.size() > 1) {
            fail(DG_ERROR_ARGUMENT, "has a set for each mode: region cannot change");
        }
        for (auto &[place, pair] : pairs_) {
            int32_t region = region_ == DG_REGION_OF_FILE ? region_of(place.first) : region_;
            if (!pair.slot->of_layer) {
                region = place.second == "output" ? DG_REGION_BOTH : DG_REGION_DECODER;
            }
            pair.in[0] = region != DG_REGION_ENCODER;
            pair.in[1] = region != DG_REGION_DECODER;
        }
        const auto has = [&](int32_t region) { return found.count(region) > 0; };
        const bool overridden = region_ != DG_REGION_OF_FILE && !found.empty();
        out_.info_.both = overridden ? region_ == DG_REGION_BOTH : has(DG_REGION_BOTH);
        out_.info_.decoder = overridden ? region_ == DG_REGION_DECODER : has(DG_REGION_DECODER);
        out_.info_.encoder = overridden ? region_ == DG_REGION_ENCODER : has(DG_REGION_ENCODER);
    }

    void check(const std::string &target, FilePair &pair) const {
        if (!pair.a || !pair.b) {
            fail_format(std::string((pair.a ? pair.a : pair.b)->name()) + " has no lora_" + (pair.a ? "b" : "a"));
        }
        const FactorTensor &a = *pair.a;
        const FactorTensor &b = *pair.b;
        for (const FactorTensor &t : {a, b}) {
            if (t.type() != GGML_TYPE_F32 && t.type() != GGML_TYPE_F16 && t.type() != GGML_TYPE_BF16 &&
                t.type() != GGML_TYPE_Q8_0) {
                fail_format(format("%s is %s: it must be F32, F16, BF16 or Q8_0", t.name(), ggml_type_name(t.type())));
            }
        }
        if (a.size(1) != b.size(0)) {
            fail_format(format("%s: lora_a has rank %" PRId64 ", lora_b %" PRId64, a.name(), a.size(1), b.size(0)));
        }
        const Slot &slot = *pair.slot;
        if (a.size(0) != slot.n_in || b.size(1) != pair.n_out()) {
            fail_format(format("%s: made for %" PRId64 " inputs and %" PRId64 " outputs, this base has %" PRId64
                               " and %" PRId64 ": another base model?",
                               target.c_str(), a.size(0), b.size(1), slot.n_in, pair.n_out()));
        }
        const int64_t planes = std::max<int64_t>(slot.n_expert, 1);
        if (a.size(2) != planes || b.size(2) != planes || a.size(3) != 1 || b.size(3) != 1) {
            fail_format(format("%s: made for %" PRId64 " experts, this base has %" PRId64 ": another base model?",
                               target.c_str(), std::max(a.size(2), b.size(2)) * a.size(3) * b.size(3), planes));
        }
        pair.scale = alpha_ == 0.0 ? 1.0f : static_cast<float>(alpha_ / static_cast<double>(a.size(1)));
    }

    // No two pairs for one matrix in one mode; halves of a gate and up are two matrices.
    void check_unique() const {
        std::map<std::tuple<const Slot *, int, int>, std::string> taken;
        for (const auto &[place, pair] : pairs_) {
            for (const int set : {0, 1}) {
                for (const int half : {1, 2}) {
                    if (!pair.in[set] || (pair.half && pair.half != half)) {
                        continue;
                    }
                    const std::string name = pair.a->name();
                    const auto [other, is_new] = taken.emplace(std::make_tuple(pair.slot, set, half), name);
                    if (!is_new && other->second != name) {
                        fail_format(other->second + " and " + name + " both adapt " + place.second);
                    }
                }
            }
        }
    }

    Factors read_factors(const FilePair &pair) const {
        Factors factors;
        factors.a = values(*pair.a);
        factors.b = values(*pair.b);
        const auto none = [](const std::vector<float> &x) {
            return std::all_of(x.begin(), x.end(), [](float v) { return v == 0.0f; });
        };
        factors.zero = none(factors.a) || none(factors.b) || pair.scale == 0.0f;
        return factors;
    }

    std::vector<float> values(const FactorTensor &t) const {
        std::vector<float> out(static_cast<size_t>(t.n_values()));
        to_floats(t.type(), t.data, t.n_values(), out.data());
        if (!std::all_of(out.begin(), out.end(), [](float v) { return std::isfinite(v); })) {
            fail_format(std::string(t.name()) + " holds values that are not finite");
        }
        return out;
    }

    // Pairs that are one here: the halves of a gate and up that act in the same modes.
    struct Joined {
        std::vector<std::pair<const FilePair *, std::string>> members; // with their targets
        int64_t rank = 0;
    };

    void make() {
        std::map<std::tuple<const Slot *, bool, bool>, Joined> joined;
        std::vector<std::tuple<const Slot *, bool, bool>> order;
        std::set<int32_t> ranks;
        for (const auto &[place, pair] : pairs_) {
            const Factors factors = read_factors(pair);
            if (factors.zero) {
                ++out_.info_.n_zero;
                continue;
            }
            if (pair.slot->of_layer && pair.in[1]) {
                Hash hash;
                hash.add(place.second);
                hash.add(factors.a.data(), factors.a.size() * sizeof(float));
                hash.add(factors.b.data(), factors.b.size() * sizeof(float));
                hash.add(pair.scale);
                out_.encoder_hash_ += hash.value(); // a sum, so that the order in the file does not count
            }
            const auto key = std::make_tuple(pair.slot, pair.in[0], pair.in[1]);
            Joined &to = joined[key];
            if (to.members.empty()) {
                order.push_back(key);
            }
            to.members.emplace_back(&pair, place.second);
            to.rank += pair.rank();
            ranks.insert(static_cast<int32_t>(pair.rank()));
            ++out_.info_.n_pairs;
        }
        if (order.empty()) {
            fail_format("holds nothing that acts on this model");
        }
        out_.ranks_.assign(ranks.begin(), ranks.end());
        out_.info_.n_ranks = static_cast<int32_t>(ranks.size());
        out_.tensors_ = std::make_unique<DeviceWeights>(model_.devices(), 2 * order.size());
        for (const auto &key : order) {
            const Slot &slot = *std::get<0>(key);
            const int64_t rank = joined[key].rank;
            const int64_t planes = std::max<int64_t>(slot.n_expert, 1);
            AdapterPair pair = {slot.base, slot.device, {std::get<1>(key), std::get<2>(key)}, nullptr, nullptr, {}};
            pair.a = out_.tensors_->add(slot.device, slot.n_in, rank, planes);
            pair.b = out_.tensors_->add(slot.device, rank, slot.n_out, planes);
            out_.pairs_.push_back(std::move(pair));
        }
        out_.tensors_->load("an adapter");
        out_.info_.n_bytes = out_.tensors_->bytes();
        for (size_t i = 0; i < order.size(); ++i) {
            fill(out_.pairs_[i], joined[order[i]]);
        }
    }

    void fill(AdapterPair &pair, const Joined &from) const {
        StackedFactors stacked(pair.a, pair.b);
        for (const auto &[member, target] : from.members) {
            const Factors factors = read_factors(*member);
            stacked.add(factors.a, factors.b, member->rank(), member->n_out(),
                        member->half == 2 ? pair.b->ne[1] / 2 : 0);
            pair.scales.insert(pair.scales.end(), static_cast<size_t>(member->rank()), member->scale);
        }
        stacked.store();
    }
};

Adapter::Adapter(std::shared_ptr<const Model> model, const std::string &path, const void *data, size_t size,
                 const std::string &name, int32_t region)
    : id_(n_opened.fetch_add(1, std::memory_order_relaxed)), model_(std::move(model)) {
    if (region < DG_REGION_OF_FILE || region > DG_REGION_ENCODER) {
        throw Error(DG_ERROR_ARGUMENT, format("region is %d: it must be one of dg_region", region));
    }
    std::unique_ptr<FileBytes> file;
    std::optional<GgufHead> head;
    try {
        file = data ? std::make_unique<GivenBytes>(data, size) : FileBytes::open(path, false);
        head.emplace(path, [&](const std::string &part) -> const ByteSource & {
            if (part != path) {
                throw Error(DG_ERROR_UNSUPPORTED, "an adapter in several files is not read");
            }
            return *file;
        });
    } catch (const Error &error) {
        throw Error(error.status(), name + ": " + error.what());
    }
    AdapterReader(*this, name, region).read(*head, *file);
}

} // namespace dg
