#include "adapter/adapter.h"

#include "base/error.h"
#include "base/hash.h"

#include "ggml-backend.h"

#include <algorithm>
#include <mutex>

namespace dg {
namespace {

// Tensors that sessions share go by their adapters; the ones that nobody uses any more are forgotten.
struct Sets {
    std::mutex mutex;
    std::vector<std::weak_ptr<const AdapterSet>> known;
};

Sets &sets() {
    static Sets *const all = new Sets; // never freed: sessions may end while the process does
    return *all;
}

std::vector<float> values_of(const ggml_tensor *tensor) {
    std::vector<float> values(static_cast<size_t>(ggml_nelements(tensor)));
    ggml_backend_tensor_get(tensor, values.data(), 0, ggml_nbytes(tensor));
    return values;
}

} // namespace

StackedFactors::StackedFactors(ggml_tensor *a, ggml_tensor *b)
    : a_(a), b_(b), a_values_(static_cast<size_t>(ggml_nelements(a))),
      b_values_(static_cast<size_t>(ggml_nelements(b))) {}

void StackedFactors::add(const std::vector<float> &a, const std::vector<float> &b, int64_t rank, int64_t n_out,
                         int64_t first_out) {
    const int64_t n_in = a_->ne[0];
    const int64_t whole = a_->ne[1];
    for (int64_t e = 0; e < a_->ne[2]; ++e) {
        std::copy_n(a.begin() + e * rank * n_in, rank * n_in, a_values_.begin() + (e * whole + done_) * n_in);
        for (int64_t row = 0; row < n_out; ++row) {
            std::copy_n(b.begin() + (e * n_out + row) * rank, rank,
                        b_values_.begin() + (e * b_->ne[1] + first_out + row) * whole + done_);
        }
    }
    done_ += rank;
}

void StackedFactors::store() const {
    ggml_backend_tensor_set(a_, a_values_.data(), 0, ggml_nbytes(a_));
    ggml_backend_tensor_set(b_, b_values_.data(), 0, ggml_nbytes(b_));
}

std::shared_ptr<const AdapterSet> AdapterSet::of(const Adapters &adapters) {
    Sets &all = sets();
    const std::lock_guard<std::mutex> lock(all.mutex);
    auto &known = all.known;
    known.erase(std::remove_if(known.begin(), known.end(), [](const auto &set) { return set.expired(); }), known.end());
    for (const std::weak_ptr<const AdapterSet> &weak : known) {
        const std::shared_ptr<const AdapterSet> set = weak.lock();
        if (set && set->adapters() == adapters) {
            return set;
        }
    }
    auto made = std::make_shared<const AdapterSet>(adapters);
    known.push_back(made);
    return made;
}

AdapterSet::AdapterSet(const Adapters &adapters) : adapters_(adapters) {
    std::unordered_map<const ggml_tensor *, std::array<std::vector<Part>, 2>> parts;
    std::vector<const ggml_tensor *> order;
    for (size_t i = 0; i < adapters.size(); ++i) {
        for (const AdapterPair &pair : adapters[i]->pairs()) {
            if (parts.find(pair.base) == parts.end()) {
                order.push_back(pair.base);
            }
            for (const int set : {0, 1}) {
                if (pair.in[set]) {
                    parts[pair.base][static_cast<size_t>(set)].push_back({i, &pair});
                }
            }
        }
    }
    const auto same = [](const std::vector<Part> &x, const std::vector<Part> &y) {
        return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                          [](const Part &p, const Part &q) { return p.pair == q.pair; });
    };
    for (const ggml_tensor *base : order) {
        std::array<int32_t, 2> &found = index_[base];
        found = {-1, -1};
        for (const size_t set : {size_t{0}, size_t{1}}) {
            const std::vector<Part> &members = parts[base][set];
            if (members.empty()) {
                continue;
            }
            if (set == 1 && same(members, parts[base][0])) {
                found[1] = found[0];
                continue;
            }
            found[set] = static_cast<int32_t>(stacks_.size());
            const AdapterPair &first = *members.front().pair;
            stacks_.push_back({base, first.device, first.a, first.b, members});
        }
    }
    const size_t n_stacked = static_cast<size_t>(
        std::count_if(stacks_.begin(), stacks_.end(), [](const Stack &stack) { return stack.parts.size() > 1; }));
    if (n_stacked == 0) {
        return;
    }
    tensors_ = std::make_unique<DeviceWeights>(adapters.front()->model()->devices(), 2 * n_stacked);
    for (Stack &stack : stacks_) {
        if (stack.parts.size() > 1) {
            int64_t rank = 0;
            for (const Part &part : stack.parts) {
                rank += part.pair->a->ne[1];
            }
            const int64_t n_expert = stack.a->ne[2];
            stack.a = tensors_->add(stack.device, stack.a->ne[0], rank, n_expert);
            stack.b = tensors_->add(stack.device, rank, stack.b->ne[1], n_expert);
        }
    }
    tensors_->load("adapters");
    for (const Stack &stack : stacks_) {
        if (stack.parts.size() > 1) {
            StackedFactors factors(stack.a, stack.b);
            for (const Part &part : stack.parts) {
                factors.add(values_of(part.pair->a), values_of(part.pair->b), part.pair->a->ne[1], stack.b->ne[1]);
            }
            factors.store();
        }
    }
}

int32_t AdapterSet::find(const ggml_tensor *base, bool encoder) const {
    const auto found = index_.find(base);
    return found == index_.end() ? -1 : found->second[encoder ? 1 : 0];
}

size_t AdapterSet::bytes() const { return tensors_ ? tensors_->bytes() : 0; }

ActiveAdapters::ActiveAdapters(std::shared_ptr<const AdapterSet> set, const std::vector<float> &scales)
    : set_(std::move(set)),
      tensors_(std::make_unique<DeviceWeights>(set_->adapters().front()->model()->devices(), set_->stacks().size())) {
    for (const AdapterSet::Stack &stack : set_->stacks()) {
        low_.push_back({stack.a, stack.b, tensors_->add(stack.device, stack.a->ne[1], 1)});
    }
    tensors_->load("adapters");
    set_scales(scales);
}

void ActiveAdapters::set_scales(const std::vector<float> &scales) {
    for (size_t i = 0; i < low_.size(); ++i) {
        std::vector<float> values;
        for (const AdapterSet::Part &part : set_->stacks()[i].parts) {
            for (const float scale : part.pair->scales) {
                values.push_back(scale * scales[part.adapter]);
            }
        }
        ggml_backend_tensor_set(low_[i].scales, values.data(), 0, values.size() * sizeof values[0]);
    }
}

const LowRank *ActiveAdapters::find(const ggml_tensor *base, bool encoder) const {
    const int32_t index = set_->find(base, encoder);
    return index < 0 ? nullptr : &low_[static_cast<size_t>(index)];
}

size_t ActiveAdapters::bytes() const {
    size_t bytes = set_->bytes() + tensors_->bytes();
    for (const std::shared_ptr<const Adapter> &adapter : set_->adapters()) {
        bytes += adapter->info().n_bytes;
    }
    return bytes;
}

uint64_t encoder_key(const Adapters &adapters, const std::vector<float> &scales) {
    Hash key;
    bool acts = false;
    for (size_t i = 0; i < adapters.size(); ++i) {
        if (adapters[i]->encoder_hash() != 0 && scales[i] != 0.0f) {
            key.add(adapters[i]->encoder_hash());
            key.add(scales[i]);
            acts = true;
        }
    }
    return acts ? key.value() : 0;
}

} // namespace dg
