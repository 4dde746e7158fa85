// Checks a file's figures and the shape of every tensor that is used, and binds them once.
#include "model/model.h"

#include "base/error.h"
#include "base/hash.h"
#include "cpu/levels.h"
#include "file/names.h"
#include "file/quantize.h"
#include "model/file_figures.h"
#include "model/signal_copy.h"
#include "sample/sampling.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

namespace dg {
namespace {

std::string shape_text(const int64_t *ne, int n) {
    std::string text = "[";
    for (int i = 0; i < n; ++i) {
        text += format("%s%" PRId64, i ? ", " : "", ne[i]);
    }
    return text + "]";
}

bool ends_with(const std::string &text, const std::string &tail) {
    return text.size() >= tail.size() && text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

} // namespace

// Reads one file into one Model; everything that can be wrong with a file is found here.
class ModelReader {
  public:
    ModelReader(Model &model, const std::string &path) : model_(model), path_(path), files_(*model.files_) {}

    void read(const dg_model_options &options) {
        read_figures_of_file();
        model_.placement_ =
            place_layers(sizes_of(files_, model_.config_, model_.layers(), options), *model_.devices_, options);
        if (options.signal_copy) {
            check_signal_copy();
        }
        bind();
        if (options.signal_copy) {
            copy_embedding();
        }
    }

  private:
    Model &model_;
    const std::string &path_;
    const GgufFiles &files_;
    int32_t device_ = 0; // where what is bound now goes

    [[noreturn]] void fail(dg_status status, const std::string &what) const {
        throw Error(status, path_ + ": " + what);
    }
    [[noreturn]] void fail_format(const std::string &what) const { fail(DG_ERROR_FORMAT, what); }

    void read_figures_of_file() {
        FileFigures figures = read_figures(files_.head());
        model_.config_ = figures.config;
        model_.sampling_ = figures.sampling;
        model_.warnings_ = std::move(figures.warnings);
        for (const dg_layer_config &shape : figures.layers) {
            LayerWeights layer;
            layer.sliding = shape.sliding;
            layer.n_head_kv = shape.n_head_kv;
            layer.head_dim = shape.head_dim;
            model_.weights_.layers.push_back(layer);
        }
    }

    // Before anything is sent anywhere.
    void check_signal_copy() const {
        if (!model_.config_.has_self_conditioning) {
            fail(DG_ERROR_UNSUPPORTED, "signal_copy: the file has no self-conditioning, so there is no signal");
        }
        if (model_.placement_.head == model_.devices_->cpu()) {
            fail(DG_ERROR_UNSUPPORTED,
                 std::string("signal_copy is for a head on a device, and the head is on the CPU, which gathers the "
                             "signal from the embedding itself") +
                     (model_.devices_->empty() ? "" : "; no device has room for the head and that copy"));
        }
    }

    // ----------------------------------------------------------------------------------------------- tensors

    const FileTensor *find(const std::string &name) const { return files_.find(name); }

    const FileTensor &require(const std::string &name, std::initializer_list<int64_t> shape) const {
        const FileTensor *found = find(name);
        if (!found) {
            fail_format("tensor " + name + " is missing");
        }
        const ggml_tensor *tensor = found->tensor;
        std::vector<int64_t> expected(shape);
        expected.resize(GGML_MAX_DIMS, 1);
        if (std::memcmp(tensor->ne, expected.data(), sizeof tensor->ne) != 0) {
            const int dims = std::max(ggml_n_dims(tensor), static_cast<int>(shape.size()));
            fail_format(format("tensor %s has shape %s, expected %s", name.c_str(),
                               shape_text(tensor->ne, dims).c_str(), shape_text(expected.data(), dims).c_str()));
        }
        return *found;
    }

    bool on_cpu() const { return device_ == model_.devices_->cpu(); }

    // A matrix; the CPU uses it where it lies in the file.
    ggml_tensor *matrix(const std::string &name, std::initializer_list<int64_t> shape) const {
        const FileTensor &found = require(name, shape);
        ggml_tensor *tensor = found.tensor;
        const ggml_type type = tensor->type;
        const bool usable = type == GGML_TYPE_F32 || (ggml_get_type_traits_cpu(type)->vec_dot != nullptr &&
                                                      ggml_get_type_traits(type)->to_float != nullptr);
        if (!usable) {
            fail(DG_ERROR_UNSUPPORTED,
                 format("tensor %s has type %s, which cannot be multiplied with", name.c_str(), ggml_type_name(type)));
        }
        if (!on_cpu()) {
            return model_.placed_->add(device_, tensor, found.data);
        }
        if (!tensor->buffer) {
            ggml_backend_tensor_alloc(found.buffer, tensor, const_cast<unsigned char *>(found.data));
        }
        return tensor;
    }

    // The values of a small tensor of any type, as float32.
    std::vector<float> values(const std::string &name, std::initializer_list<int64_t> shape) {
        const FileTensor &found = require(name, shape);
        const ggml_tensor *tensor = found.tensor;
        const unsigned char *data = found.data;
        const auto n = static_cast<size_t>(ggml_nelements(tensor));
        std::vector<float> out(n);
        if (!to_floats(tensor->type, data, static_cast<int64_t>(n), out.data())) {
            fail(DG_ERROR_UNSUPPORTED, format("tensor %s has type %s, which cannot be read as numbers", name.c_str(),
                                              ggml_type_name(tensor->type)));
        }
        return out;
    }

    float scalar(const std::string &name) { return values(name, {1})[0]; }

    // A float32 tensor of our own.
    ggml_tensor *own(std::vector<float> data, int64_t ne0, int64_t ne1 = 1) {
        return model_.placed_->add(device_, std::move(data), ne0, ne1);
    }

    ggml_tensor *vector(const std::string &name, int64_t n) { return own(values(name, {n}), n); }

    // In float32 whatever its type: as it is, ggml would round its input to that type as well, and near ties between
    // experts would fall otherwise.
    ggml_tensor *router(const std::string &name, int64_t n_embd, int64_t n_expert) {
        const FileTensor *found = find(name);
        return found && found->tensor->type != GGML_TYPE_F32 ? own(values(name, {n_embd, n_expert}), n_embd, n_expert)
                                                             : matrix(name, {n_embd, n_expert});
    }

    void bind() {
        const dg_config &c = model_.config_;
        model_.placed_ = std::make_unique<DeviceWeights>(*model_.devices_, files_.tensors().size() + n_made());
        refuse_scales();
        bind_globals();
        for (int32_t i = 0; i < c.n_layer; ++i) {
            bind_layer(i, model_.weights_.layers[static_cast<size_t>(i)]);
        }
        model_.placed_->load();
    }

    void copy_embedding() {
        const dg_config &c = model_.config_;
        model_.signal_copy_ = std::make_unique<DeviceWeights>(*model_.devices_, 1);
        ggml_tensor *copy = model_.signal_copy_->add(model_.placement_.head, c.n_vocab, c.n_embd, 1, GGML_TYPE_F16);
        model_.signal_copy_->load("the embedding's transposed copy (signal_copy)");
        const FileTensor &embedding = require(names::TOKEN_EMBD, {c.n_embd, c.n_vocab});
        fill_signal_copy(embedding.tensor, embedding.data, copy);
        model_.weights_.signal_copy = copy;
    }

    // Every device with full layers has the angles' divisors.
    size_t n_made() const { return model_.devices_->size() + 1; }

    // Some writers keep a factor of a quantized tensor beside it (X.scale of X.weight): left out, the numbers would be
    // wrong without a word.
    void refuse_scales() const {
        for (const FileTensor &found : files_.tensors()) {
            const std::string name = ggml_get_name(found.tensor);
            const std::string stem = name.substr(0, name.rfind('.'));
            if (name == stem + ".scale" && find(stem + ".weight") && !ends_with(name, names::FFN_GATE_INP_SCALE) &&
                !ends_with(name, names::FFN_DOWN_EXPS_SCALE)) {
                fail(DG_ERROR_UNSUPPORTED, "tensor " + name + " is present; scales beside a tensor are not served");
            }
        }
    }

    void bind_globals() {
        const dg_config &c = model_.config_;
        Weights &w = model_.weights_;
        const Placement &placement = model_.placement_;
        device_ = placement.head;
        w.token_embd = matrix(names::TOKEN_EMBD, {c.n_embd, c.n_vocab});
        device_ = placement.input;
        w.input_embd =
            placement.input == placement.head ? w.token_embd : matrix(names::TOKEN_EMBD, {c.n_embd, c.n_vocab});
        device_ = placement.head;
        if (find(names::OUTPUT)) {
            fail(DG_ERROR_UNSUPPORTED,
                 std::string("tensor ") + names::OUTPUT + " is present; only a tied head is served");
        }
        w.output_norm = vector(names::OUTPUT_NORM, c.n_embd);
        bind_rope();
        device_ = placement.layers.front();

        if (c.has_self_conditioning) {
            w.self_cond_pre_norm = vector(self_conditioning_norm(files_.head()), c.n_embd);
            w.self_cond_gate = matrix(names::SELF_COND_GATE, {c.n_embd, c.n_ff});
            w.self_cond_up = matrix(names::SELF_COND_UP, {c.n_embd, c.n_ff});
            w.self_cond_down = matrix(names::SELF_COND_DOWN, {c.n_ff, c.n_embd});
        } else {
            model_.warnings_.push_back(
                "the file has no self-conditioning tensors (self_cond_*): the signal is zero, and "
                "more steps will be needed");
        }
    }

    // One tensor for the layers of a kind on a device.
    void bind_rope() {
        std::map<std::pair<int32_t, bool>, ggml_tensor *> bound;
        for (size_t i = 0; i < model_.placement_.layers.size(); ++i) {
            LayerWeights &l = model_.weights_.layers[i];
            device_ = model_.placement_.layers[i];
            ggml_tensor *&here = bound[{device_, l.sliding}];
            here = here ? here : own(rope_divisors(l), l.head_dim / 2);
            l.rope_divisors = here;
        }
    }

    std::vector<float> rope_divisors(const LayerWeights &l) {
        const float base = l.sliding ? model_.config_.rope_base_sliding : model_.config_.rope_base_full;
        std::vector<float> divisors(static_cast<size_t>(l.head_dim / 2), 1.0f);
        if (!l.sliding) {
            divisors = rope_factors(l.head_dim / 2);
        }
        for (size_t i = 0; i < divisors.size(); ++i) {
            divisors[i] *= std::pow(base, static_cast<float>(2 * i) / static_cast<float>(l.head_dim));
        }
        return divisors;
    }

    std::vector<float> rope_factors(int64_t n) {
        std::vector<float> factors = values(names::ROPE_FREQS, {n});
        for (size_t i = 0; i < factors.size(); ++i) {
            if (!(factors[i] > 0.0f)) {
                fail_format(format("tensor %s holds %g at %zu, expected a positive divisor", names::ROPE_FREQS,
                                   static_cast<double>(factors[i]), i));
            }
        }
        return factors;
    }

    void bind_layer(int32_t index, LayerWeights &l) {
        const dg_config &c = model_.config_;
        const std::string prefix = format("blk.%d.", index);
        const int64_t n_embd = c.n_embd;
        const int64_t q_width = l.head_dim * c.n_head;
        const int64_t kv_width = l.head_dim * l.n_head_kv;

        device_ = model_.placement_.layers[static_cast<size_t>(index)];
        l.attn_norm = vector(prefix + names::ATTN_NORM, n_embd);
        l.attn_q = matrix(prefix + names::ATTN_Q, {n_embd, q_width});
        l.attn_k = matrix(prefix + names::ATTN_K, {n_embd, kv_width});
        if (l.sliding) {
            l.attn_v = matrix(prefix + names::ATTN_V, {n_embd, kv_width});
        } else if (find(prefix + names::ATTN_V)) {
            fail(DG_ERROR_UNSUPPORTED,
                 "tensor " + prefix + names::ATTN_V + " is present; a full layer's V is made from K");
        }
        l.attn_output = matrix(prefix + names::ATTN_OUTPUT, {q_width, n_embd});
        l.attn_q_norm = vector(prefix + names::ATTN_Q_NORM, l.head_dim);
        l.attn_k_norm = vector(prefix + names::ATTN_K_NORM, l.head_dim);
        l.post_attention_norm = vector(prefix + names::POST_ATTENTION_NORM, n_embd);

        l.ffn_norm = vector(prefix + names::FFN_NORM, n_embd);
        l.ffn_gate = matrix(prefix + names::FFN_GATE, {n_embd, c.n_ff});
        l.ffn_up = matrix(prefix + names::FFN_UP, {n_embd, c.n_ff});
        l.ffn_down = matrix(prefix + names::FFN_DOWN, {c.n_ff, n_embd});
        l.post_ffw_norm_1 = vector(prefix + names::POST_FFW_NORM_1, n_embd);

        l.router = router(prefix + names::FFN_GATE_INP, n_embd, c.n_expert);
        std::vector<float> scale = values(prefix + names::FFN_GATE_INP_SCALE, {n_embd});
        for (float &value : scale) {
            value *= 1.0f / std::sqrt(static_cast<float>(n_embd));
        }
        l.router_scale = own(std::move(scale), n_embd);
        l.pre_ffw_norm_2 = vector(prefix + names::PRE_FFW_NORM_2, n_embd);
        l.down_exps_scale = own(values(prefix + names::FFN_DOWN_EXPS_SCALE, {c.n_expert}), 1, c.n_expert);
        device_ = model_.placement_.experts[static_cast<size_t>(index)];
        if (find(prefix + names::FFN_GATE_UP_EXPS)) {
            l.gate_up_exps = matrix(prefix + names::FFN_GATE_UP_EXPS, {n_embd, 2 * int64_t{c.n_ff_exp}, c.n_expert});
        } else if (find(prefix + names::FFN_GATE_EXPS)) {
            l.gate_exps = matrix(prefix + names::FFN_GATE_EXPS, {n_embd, c.n_ff_exp, c.n_expert});
            l.up_exps = matrix(prefix + names::FFN_UP_EXPS, {n_embd, c.n_ff_exp, c.n_expert});
        } else {
            fail_format("tensor " + prefix + names::FFN_GATE_UP_EXPS + " is missing");
        }
        l.down_exps = matrix(prefix + names::FFN_DOWN_EXPS, {c.n_ff_exp, n_embd, c.n_expert});
        device_ = model_.placement_.layers[static_cast<size_t>(index)];
        l.post_ffw_norm_2 = vector(prefix + names::POST_FFW_NORM_2, n_embd);
        l.post_ffw_norm = vector(prefix + names::POST_FFW_NORM, n_embd);

        l.output_scale = scalar(prefix + names::LAYER_OUTPUT_SCALE);
        dg_config &config = model_.config_;
        if (find(prefix + names::ENC_LAYER_OUTPUT_SCALE)) {
            l.encoder_output_scale = scalar(prefix + names::ENC_LAYER_OUTPUT_SCALE);
            config.has_encoder_scalars = config.has_encoder_scalars || index == 0;
        } else {
            l.encoder_output_scale = l.output_scale;
            if (index == 0 || config.has_encoder_scalars) {
                model_.warnings_.push_back("encoder scalars are missing from layer " + std::to_string(index) + " on (" +
                                           names::ENC_LAYER_OUTPUT_SCALE +
                                           "): the decoder's are used, and long prompts will suffer");
            }
            config.has_encoder_scalars = false;
        }
    }
};

Model::Model(const std::string &path, const dg_model_options &options) {
    kernels_ = choose_kernels(options.cpu);
    files_ = std::make_unique<const GgufFiles>(path, options.use_mmap);
    devices_ = open_devices(options);
    const Devices::Turn turn(*devices_);
    ModelReader(*this, path).read(options);
}

std::vector<dg_layer_config> Model::layers() const {
    std::vector<dg_layer_config> layers;
    for (const LayerWeights &l : weights_.layers) {
        layers.push_back({l.sliding, static_cast<int32_t>(l.n_head_kv), static_cast<int32_t>(l.head_dim)});
    }
    return layers;
}

uint64_t Model::fingerprint() const {
    const dg_config &c = config_;
    Hash hash;
    for (const int32_t figure : {c.n_layer, c.n_embd, c.n_vocab, c.n_head, c.n_ff, c.n_ff_exp, c.n_expert,
                                 c.n_expert_used, c.sliding_window, c.canvas_length}) {
        hash.add(figure);
    }
    for (const float figure : {c.norm_eps, c.logit_softcap, c.rope_base_full, c.rope_base_sliding}) {
        hash.add(figure);
    }
    for (const LayerWeights &l : weights_.layers) {
        hash.add(l.sliding);
    }
    hash.add(files_->samples());
    return hash.value();
}

int64_t Model::active_parameters() const {
    const auto size = [](const ggml_tensor *t) { return t ? ggml_nelements(t) : 0; };
    int64_t n = size(weights_.token_embd);
    for (const LayerWeights &l : weights_.layers) {
        n += size(l.attn_q) + size(l.attn_k) + size(l.attn_v) + size(l.attn_output);
        n += size(l.ffn_gate) + size(l.ffn_up) + size(l.ffn_down) + size(l.router);
        const int64_t experts = size(l.gate_up_exps) + size(l.gate_exps) + size(l.up_exps) + size(l.down_exps);
        n += experts / config_.n_expert * config_.n_expert_used;
    }
    return n;
}

} // namespace dg
