// Models and their devices: dg_model, and the server that offers devices to other machines.
#include "api/boundary.h"
#include "sample/sampler.h"

#include <memory>
#include <string>
#include <vector>

using namespace dg::api;

dg_model_options dg_model_options_default(void) {
    dg_model_options options = {};
    options.n_gpu_layers = -1;
    options.use_mmap = true;
    options.offload_kv = true;
    options.main_gpu = -1;
    options.expected = dg_session_options_default();
    return options;
}

dg_status dg_model_open(dg_model **out, const char *path, const dg_model_options *options, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(out, "out");
        *out = nullptr;
        require(path, "path");
        require(options, "options");
        auto model = std::make_unique<dg_model>();
        model->model = std::make_shared<const dg::Model>(path, *options);
        model->file.head = {model->model, &model->model->files().head()};
        *out = model.release();
    });
}

void dg_model_free(dg_model *model) { delete model; }

const char *dg_model_cpu_level(const dg_model *model) {
    const dg::Kernels *kernels = model->model->kernels();
    return kernels ? kernels->level : "";
}

const dg_file *dg_model_file(const dg_model *model) { return &model->file; }

dg_config dg_model_config(const dg_model *model) { return model->model->config(); }

dg_layer_config dg_model_layer(const dg_model *model, int32_t layer) {
    const std::vector<dg::LayerWeights> &layers = model->model->weights().layers;
    if (layer < 0 || static_cast<size_t>(layer) >= layers.size()) {
        return {};
    }
    const dg::LayerWeights &l = layers[static_cast<size_t>(layer)];
    return {l.sliding, static_cast<int32_t>(l.n_head_kv), static_cast<int32_t>(l.head_dim)};
}

dg_sampling dg_model_sampling(const dg_model *model) { return model->model->sampling(); }

dg_status dg_sampling_check(const dg_sampling *sampling, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(sampling, "sampling");
        dg::check_sampling(*sampling);
    });
}

int32_t dg_model_n_warnings(const dg_model *model) { return static_cast<int32_t>(model->model->warnings().size()); }

const char *dg_model_warning(const dg_model *model, int32_t index) {
    const std::vector<std::string> &warnings = model->model->warnings();
    return index >= 0 && static_cast<size_t>(index) < warnings.size() ? warnings[static_cast<size_t>(index)].c_str()
                                                                      : nullptr;
}

int32_t dg_model_n_devices(const dg_model *model) { return static_cast<int32_t>(model->model->devices().size()); }

dg_device dg_model_device(const dg_model *model, int32_t index) {
    dg_device out = {};
    if (index < 0 || index >= dg_model_n_devices(model)) {
        return out;
    }
    const dg::Device &device = model->model->devices()[static_cast<size_t>(index)];
    out.name = device.name.c_str();
    out.endpoint = device.endpoint.c_str();
    out.memory_free = device.free;
    out.memory_total = device.total;
    out.weights = model->model->weights_on(index);
    const dg::Placement &placement = model->model->placement();
    out.weights += placement.head == index ? model->model->signal_copy_bytes() : 0;
    for (size_t i = 0; i < placement.layers.size(); ++i) {
        out.n_layers += placement.layers[i] == index;
        out.n_cpu_moe += placement.layers[i] == index && placement.experts[i] != index;
    }
    out.is_main = placement.head == index;
    return out;
}

const char *dg_model_kernel(const dg_model *model, int32_t type) {
    return type < 0 || type >= GGML_TYPE_COUNT ? "" : dg::product_kernel(*model->model, static_cast<ggml_type>(type));
}

dg_status dg_rpc_serve(const char *endpoint, int32_t n_threads, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(endpoint, "endpoint");
        dg::serve(endpoint, n_threads);
    });
}
