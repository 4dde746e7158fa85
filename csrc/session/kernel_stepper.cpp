#include "session/kernel_stepper.h"

#include "base/error.h"
#include "base/signal_cut.h"

#include "ggml-backend.h"

namespace dg {
namespace {

// What a row of the signal is gathered from; null where the embedding's type has no kernel.
const void *gathered_embedding(const Model &model, cuda::RowType &type) {
    const ggml_tensor *embedding = model.weights().token_embd;
    switch (embedding->type) {
        case GGML_TYPE_F32: type = cuda::RowType::F32; break;
        case GGML_TYPE_F16: type = cuda::RowType::F16; break;
        case GGML_TYPE_BF16: type = cuda::RowType::BF16; break;
        case GGML_TYPE_Q8_0: type = cuda::RowType::Q8_0; break;
        case GGML_TYPE_Q4_K: type = cuda::RowType::Q4_K; break;
        case GGML_TYPE_Q5_K: type = cuda::RowType::Q5_K; break;
        case GGML_TYPE_Q6_K: type = cuda::RowType::Q6_K; break;
        default: return nullptr;
    }
    return embedding->data;
}

} // namespace

void KernelStepper::declare(ggml_context *head) {
    const Placement &placement = passes_.model().placement();
    const int32_t n_rows = passes_.figures().n_rows;
    loop_.reset();
    next_ids_ = nullptr;
    logits_.declare(head, true);
    io_.sample.make(head, passes_.figures().pass_rows); // texts are scored where the logits are
    if (placement.layers.front() != placement.head) {
        next_ids_ = ggml_new_tensor_1d(head, GGML_TYPE_I32, n_rows);
    }
    if (passes_.model().config().has_self_conditioning) {
        io_.flat_rows = ggml_new_tensor_1d(head, GGML_TYPE_I32, passes_.figures().pass_rows);
        io_.flat_logits = ggml_new_tensor_1d(head, GGML_TYPE_I32, passes_.figures().pass_rows);
    }
    const size_t bytes = cuda::candidate_bytes(n_rows, cuda::candidate_capacity(n_vocab()));
    candidates_ = ggml_new_tensor_1d(head, GGML_TYPE_I8, static_cast<int64_t>(bytes));
}

void KernelStepper::allocated() {
    const dg_config &c = passes_.model().config();
    cuda::DeviceLoop::Target target = {};
    target.n_rows = passes_.figures().n_rows;
    target.n_vocab = c.n_vocab;
    target.softcap = c.logit_softcap;
    target.logits = static_cast<float *>(io_.logits->data);
    target.ids = static_cast<int32_t *>((next_ids_ ? next_ids_ : passes_.io().ids)->data);
    if (c.has_self_conditioning) {
        target.signal = static_cast<float *>((io_.next_signal ? io_.next_signal : passes_.io().signal)->data);
        target.embedding = gathered_embedding(passes_.model(), target.embedding_type);
    }
    target.n_embd = c.n_embd;
    target.candidates = candidates_->data;
    target.capacity = cuda::candidate_capacity(c.n_vocab);
    target.lost = signal_error(ggml_is_quantized(passes_.model().weights().token_embd->type)) * SHORTEST_SIGNAL;
    // A pinned row has its signal from the gather, and needs no logits then.
    gathers_ = target.embedding || !target.signal;
    device_ = make_device_();
    loop_ = std::make_unique<cuda::DeviceLoop>(*device_, target);
}

void KernelStepper::pass(const dg_noise *) {
    std::vector<int32_t> ids;
    if (next_ids_) {
        ids.resize(static_cast<size_t>(placed_rows()));
        ggml_backend_tensor_get(next_ids_, ids.data(), 0, ids.size() * sizeof ids[0]);
        if (passes_.model().config().has_self_conditioning) {
            logits_.take_next_signal(static_cast<int32_t>(ids.size()));
        }
    }
    Pass kind;
    kind.uncapped = true;
    places_.assign(static_cast<size_t>(placed_rows()), -1);
    const std::vector<uint8_t> wanted = free_rows();
    passes_.each_pass(next_ids_ ? ids.data() : nullptr, segments(), gathers_ ? wanted.data() : nullptr, kind,
                      [&](const Pass &pass) {
                          passes_.compute_pass();
                          for (int32_t i = 0; i < pass.n_logits(); ++i) {
                              places_[static_cast<size_t>(pass.first_row + pass.logit_row(i))] = pass.first_logit + i;
                          }
                      });
}

void KernelStepper::decide(const dg_noise *noise) {
    loop_->set_places(places_);
    loop_->step(noise);
    signal_stands_ = !loop_->has_flat_rows();
}

// Rows too flat to be gathered go through a product with the whole embedding, all others of the placed canvases keep
// what was gathered: a canvas beside a flat one has the numbers that it has alone.
void KernelStepper::make_signal() {
    const cuda::FlatRows flat = loop_->flat_rows();
    passes_.compute_signal(flat.rows, flat.logits);
}

void KernelStepper::start(const std::vector<CanvasStart> &canvases) {
    rules_.clear();
    for (const CanvasStart &canvas : canvases) {
        rules_.push_back(canvas.rules);
    }
    loop_->begin(canvases);
}

void KernelStepper::set_rules(int32_t index, const RowRules &rules) {
    rules_[static_cast<size_t>(index)] = rules;
    loop_->set_rules(index, rules);
}

void KernelStepper::shorten(int32_t, int32_t) {
    throw Error(DG_ERROR_UNSUPPORTED,
                "a canvas cannot be narrowed where it is sampled by kernels: use another sampler");
}

CanvasDecision KernelStepper::decision(int32_t index) const {
    const cuda::Canvas::Decision &decision = loop_->decision(index);
    return {decision.mean_entropy, decision.converged != 0, decision.finished != 0};
}

void KernelStepper::read(int32_t index, const CanvasRows &out) { loop_->read(index, out); }

} // namespace dg
