// The C boundary. Every exception stops here and becomes a status and a message.
#include "diffgguf.h"

#include "adapter/adapter.h"
#include "base/error.h"
#include "base/log_capture.h"
#include "base/random.h"
#include "cpu/levels.h"
#include "file/gguf_head.h"
#include "file/quantize.h"
#include "model/devices.h"
#include "model/file_figures.h"
#include "model/model.h"
#include "model/needs.h"
#include "model/placement.h"
#include "sample/sampler.h"
#include "sample/sampler_graph.h"
#include "session/loop.h"
#include "session/session.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>

#ifdef __GLIBCXX__
#    include <cxxabi.h>
#endif

struct dg_file {
    std::shared_ptr<const dg::GgufHead> head;
};

struct dg_model {
    std::shared_ptr<const dg::Model> model;
    dg_file file;
};

struct dg_adapter {
    std::shared_ptr<const dg::Adapter> adapter;
};

struct dg_session {
    dg::Session session;
    dg::CanvasLoop loop;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;

    dg_session(std::shared_ptr<const dg::Model> model, const dg_session_options &options)
        : session(std::move(model), options), loop(session) {}
};

namespace {

// One line, whatever a file's strings or a path that the message quotes hold: no control character passes.
void write_message(const char *message, char *err, size_t err_size) noexcept {
    if (err && err_size > 0) {
        const size_t n = std::min(std::strlen(message), err_size - 1);
        std::replace_copy_if(
            message, message + n, err, [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
        err[n] = '\0';
    }
}

// Without ggml's initialisation: for what only reads its tables.
template <typename Body> dg_status guarded_plain(char *err, size_t err_size, const Body &body) {
    write_message("", err, err_size);
    try {
        body();
        return DG_OK;
    } catch (const dg::Error &error) {
        write_message(error.what(), err, err_size);
        return error.status();
    } catch (const std::bad_alloc &) {
        write_message("an allocation was refused", err, err_size);
        return DG_ERROR_MEMORY;
    } catch (const std::exception &error) {
        write_message(error.what(), err, err_size);
        return DG_ERROR_INTERNAL;
#ifdef __GLIBCXX__
    } catch (const abi::__forced_unwind &) {
        throw; // the poll function ended its thread: CPython ends daemon threads so that want the GIL while it exits
#endif
    } catch (...) {
        write_message("an unknown exception", err, err_size);
        return DG_ERROR_INTERNAL;
    }
}

template <typename Body> dg_status guarded(char *err, size_t err_size, const Body &body) {
    return guarded_plain(err, err_size, [&] {
        dg::check_processor(); // before any code of ggml's
        dg::initialize_ggml();
        const dg::AbortGuard no_abort;
        body();
    });
}

void require(const void *pointer, const char *name) {
    if (!pointer) {
        throw dg::Error(DG_ERROR_ARGUMENT, std::string(name) + " is NULL");
    }
}

// Runs `body` as the one thread that speaks to the model's devices.
template <typename Body> void with_devices(const dg::Model &model, const Body &body) {
    const dg::Devices &devices = model.devices();
    const dg::Devices::Turn turn(devices);
    try {
        body();
    } catch (const dg::Error &error) {
        if (error.status() != DG_ERROR_DEVICE || dg::has_gpu_failed()) {
            throw;
        }
        throw dg::Error(DG_ERROR_DEVICE, std::string(error.what()) + " (of " + devices.servers() +
                                             "); close the model, and open it again when all servers answer");
    }
}

// Runs `body` as the one thread inside the session.
template <typename Body> dg_status inside(dg_session *session, char *err, size_t err_size, const Body &body) {
    return guarded(err, err_size, [&] {
        require(session, "session");
        if (session->busy.test_and_set(std::memory_order_acquire)) {
            throw dg::Error(DG_ERROR_BUSY, "another thread is inside this session");
        }
        struct Leave {
            std::atomic_flag &busy;
            ~Leave() { busy.clear(std::memory_order_release); }
        } const leave{session->busy};
        with_devices(session->session.model(), body);
    });
}

} // namespace

// -------------------------------------------------------------------------------------------------------- file

namespace {

// A file that is read through the caller's functions.
class CallerFile final : public dg::ByteSource {
  public:
    CallerFile(const dg_source &source, std::string path) : source_(source), path_(std::move(path)) {
        const int64_t size = source_.size(source_.user, path_.c_str());
        if (size < 0) {
            throw dg::Error(DG_ERROR_IO, path_ + ": cannot open");
        }
        size_ = static_cast<uint64_t>(size);
    }
    uint64_t size() const override { return size_; }
    void read(uint64_t offset, void *out, size_t n) const override {
        if (!source_.read(source_.user, path_.c_str(), offset, out, n)) {
            throw dg::Error(DG_ERROR_IO, path_ + ": cannot read");
        }
    }

  private:
    const dg_source &source_;
    std::string path_;
    uint64_t size_ = 0;
};

const dg::GgufHeader &keys_of(const dg_file *file) { return file->head->keys(); }

const dg::GgufKey *key_at(const dg_file *file, int64_t index) {
    const std::vector<dg::GgufKey> &keys = keys_of(file).keys();
    return index >= 0 && static_cast<size_t>(index) < keys.size() ? &keys[static_cast<size_t>(index)] : nullptr;
}

} // namespace

dg_status dg_file_open(dg_file **out, const char *path, const dg_source *source, char *err, size_t err_size) {
    return guarded_plain(err, err_size, [&] {
        require(out, "out");
        *out = nullptr;
        require(path, "path");
        std::unique_ptr<dg::ByteSource> open;
        auto file = std::make_unique<dg_file>();
        file->head = std::make_shared<const dg::GgufHead>(path, [&](const std::string &part) -> const dg::ByteSource & {
            open = source ? std::make_unique<CallerFile>(*source, part) : dg::open_for_reading(part);
            return *open;
        });
        *out = file.release();
    });
}

void dg_file_free(dg_file *file) { delete file; }

dg_status dg_file_require_model(const dg_file *file, char *err, size_t err_size) {
    return guarded_plain(err, err_size, [&] {
        require(file, "file");
        file->head->require_model();
    });
}

dg_status dg_file_config(const dg_file *file, dg_config *config, dg_layer_config *layers, int32_t capacity,
                         char *warnings, size_t warnings_size, char *err, size_t err_size) {
    return guarded_plain(err, err_size, [&] {
        require(file, "file");
        require(config, "config");
        const dg::FileFigures figures = dg::read_figures(*file->head);
        *config = figures.config;
        if (layers && static_cast<size_t>(std::max(capacity, 0)) >= figures.layers.size()) {
            std::copy(figures.layers.begin(), figures.layers.end(), layers);
        }
        std::string text;
        for (const std::string &warning : figures.warnings) {
            text += warning + "\n";
        }
        if (warnings && warnings_size > 0) {
            text.resize(std::min(text.size(), warnings_size - 1));
            std::memcpy(warnings, text.c_str(), text.size() + 1);
        }
    });
}

int32_t dg_file_n_parts(const dg_file *file) { return static_cast<int32_t>(file->head->parts().size()); }

dg_file_part dg_file_get_part(const dg_file *file, int32_t index) {
    if (index < 0 || index >= dg_file_n_parts(file)) {
        return {};
    }
    const dg::GgufHead::Part &part = file->head->parts()[static_cast<size_t>(index)];
    const dg::GgufHeader &header = part.header;
    return {part.path.c_str(), header.file_size(), header.data_offset(), header.version(), header.alignment()};
}

int64_t dg_file_n_keys(const dg_file *file) { return static_cast<int64_t>(keys_of(file).keys().size()); }

dg_key dg_file_key(const dg_file *file, int64_t index) {
    dg_key out = {};
    if (const dg::GgufKey *key = key_at(file, index)) {
        out.name = key->name.c_str();
        out.type = static_cast<int32_t>(key->type);
        out.element = static_cast<int32_t>(key->element);
        out.count = static_cast<int64_t>(key->count);
        out.data = keys_of(file).at(key->data);
        out.n_bytes = key->end - key->data;
        out.entry = keys_of(file).at(key->entry);
        out.entry_bytes = key->end - key->entry;
    }
    return out;
}

size_t dg_file_strings(const dg_file *file, int64_t index, char *out, size_t out_size) {
    const dg::GgufKey *key = key_at(file, index);
    size_t needed = 0;
    if (key) {
        keys_of(file).for_each_string(*key, [&](std::string_view text) {
            const std::string_view shown = text.substr(0, text.find('\0'));
            const size_t size = shown.size() + 1;
            if (out && size <= out_size && needed <= out_size - size) {
                std::memcpy(out + needed, shown.data(), shown.size());
                out[needed + shown.size()] = '\0';
            }
            needed += size;
        });
    }
    return needed;
}

int64_t dg_file_n_tensors(const dg_file *file) { return static_cast<int64_t>(file->head->tensors().size()); }

dg_tensor_info dg_file_tensor(const dg_file *file, int64_t index) {
    dg_tensor_info out = {};
    if (index < 0 || index >= dg_file_n_tensors(file)) {
        return out;
    }
    const dg::GgufHead::Tensor &tensor = file->head->tensors()[static_cast<size_t>(index)];
    const dg::GgufTensor &info = *tensor.info;
    const auto type = static_cast<ggml_type>(info.type);
    out.name = info.name.c_str();
    out.type_name = ggml_type_name(type);
    out.type = type;
    out.n_dims = info.n_dims;
    std::copy(info.ne.begin(), info.ne.end(), out.ne);
    out.part = static_cast<int32_t>(tensor.part);
    out.offset = info.offset;
    out.n_bytes = info.n_bytes;
    return out;
}

// ------------------------------------------------------------------------------------------------------- model

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

// ----------------------------------------------------------------------------------------------------- session

dg_session_options dg_session_options_default(void) { return {0, 512, 0, DG_KV_F16, 0, false, DG_SAMPLER_AUTO}; }

dg_status dg_model_n_ctx(const dg_model *model, const dg_session_options *options, int32_t *out, char *err,
                         size_t err_size) {
    return guarded(err, err_size, [&] {
        require(model, "model");
        require(options, "options");
        require(out, "out");
        *out = dg::context_size(model->model->config(), options->n_ctx);
    });
}

dg_status dg_model_memory(dg_model *model, const dg_session_options *options, dg_memory *out, char *err,
                          size_t err_size) {
    return guarded(err, err_size, [&] {
        require(model, "model");
        require(options, "options");
        require(out, "out");
        with_devices(*model->model, [&] { *out = dg::Session::predict(model->model, *options); });
    });
}

dg_status dg_session_needs(const dg_config *config, const dg_layer_config *layers, const dg_session_options *options,
                           dg_needs *out, size_t *cache, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(config, "config");
        require(layers, "layers");
        require(options, "options");
        require(out, "out");
        require(cache, "cache");
        const int32_t n = std::clamp<int32_t>(config->n_layer, 0, dg::ranges::LAYERS.most);
        std::vector<size_t> bytes;
        *out = dg::session_needs(*config, {layers, layers + n}, *options, bytes);
        std::copy(bytes.begin(), bytes.end(), cache);
    });
}

dg_status dg_plan_layers(const dg_layer_bytes *layers, int32_t n_layers, size_t head, const dg_needs *needs,
                         const dg_device *devices, int32_t n_devices, const dg_model_options *options, dg_plan *out,
                         int32_t *device_of, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(layers, "layers");
        require(needs, "needs");
        require(options, "options");
        require(out, "out");
        if (n_layers < 1 || n_devices < 0) {
            throw dg::Error(DG_ERROR_ARGUMENT, "n_layers must be 1 or more, n_devices 0 or more");
        }
        dg::check_placing(*options);
        const dg::Sizes sizes = {{layers, layers + n_layers}, head, *needs};
        std::vector<dg::Room> rooms;
        for (int32_t i = 0; i < n_devices; ++i) {
            require(devices, "devices");
            rooms.push_back({devices[i].memory_free, devices[i].endpoint && *devices[i].endpoint});
        }
        const dg::Plan plan = dg::plan_layers(sizes, rooms, *options);
        *out = {static_cast<int32_t>(plan.devices.size()), plan.n_cpu_moe, dg::reserve()};
        if (device_of) {
            std::fill(device_of, device_of + n_layers, -1);
            std::copy(plan.devices.rbegin(), plan.devices.rend(), std::make_reverse_iterator(device_of + n_layers));
        }
    });
}

dg_status dg_session_create(dg_session **out, dg_model *model, const dg_session_options *options, char *err,
                            size_t err_size) {
    return guarded(err, err_size, [&] {
        require(out, "out");
        *out = nullptr;
        require(model, "model");
        require(options, "options");
        with_devices(*model->model, [&] { *out = new dg_session(model->model, *options); });
    });
}

void dg_session_free(dg_session *session) {
    if (session) {
        const std::shared_ptr<const dg::Model> model =
            session->session.shared_model(); // until nobody needs its devices
        const dg::Devices::Turn turn(model->devices());
        delete session;
    }
}

dg_memory dg_session_memory(const dg_session *session) { return session->session.memory(); }

int32_t dg_session_n_ctx(const dg_session *session) { return session->session.n_ctx(); }

int32_t dg_session_n_threads(const dg_session *session) { return session->session.n_threads(); }

int32_t dg_session_n_rows(const dg_session *session) { return session->session.n_rows(); }

int32_t dg_session_sampler(const dg_session *session) { return session->session.sampler(); }

int32_t dg_session_n_fallbacks(const dg_session *session) {
    return static_cast<int32_t>(session->session.fallbacks().size());
}

const char *dg_session_fallback(const dg_session *session, int32_t index) {
    const bool known = index >= 0 && index < dg_session_n_fallbacks(session);
    return known ? session->session.fallbacks()[static_cast<size_t>(index)].c_str() : nullptr;
}

int32_t dg_session_n_past(const dg_session *session) { return session->session.n_past(); }

dg_status dg_session_encode(dg_session *session, const int32_t *ids, int32_t n, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(ids, "ids");
        session->loop.drop();
        session->session.encode(ids, n);
    });
}

dg_status dg_session_truncate(dg_session *session, int32_t n, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        session->loop.drop();
        session->session.truncate(n);
    });
}

dg_status dg_session_tokens(const dg_session *session, int32_t *out, int32_t capacity, char *err, size_t err_size) {
    return inside(const_cast<dg_session *>(session), err, err_size, [&] {
        require(out, "out");
        const std::vector<int32_t> &tokens = session->session.tokens();
        if (capacity < session->session.n_past()) {
            throw dg::Error(DG_ERROR_ARGUMENT, dg::format("capacity is %d: the prefix has %d tokens", capacity,
                                                          session->session.n_past()));
        }
        std::copy(tokens.begin(), tokens.end(), out);
    });
}

dg_status dg_session_save(dg_session *session, const char *path, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(path, "path");
        session->session.save(path);
    });
}

dg_status dg_session_load(dg_session *session, const char *path, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(path, "path");
        session->loop.drop();
        session->session.load(path);
    });
}

// ---------------------------------------------------------------------------------------------------- adapters

namespace {

dg::Adapters list_of(dg_adapter *const *adapters, const float *scales, int32_t n) {
    if (n < 0) {
        throw dg::Error(DG_ERROR_ARGUMENT, dg::format("n is %d: it must be 0 or more", n));
    }
    dg::Adapters list;
    for (int32_t i = 0; i < n; ++i) {
        require(adapters, "adapters");
        require(adapters[i], "an adapter");
        require(scales, "scales");
        list.push_back(adapters[i]->adapter);
    }
    return list;
}

} // namespace

dg_status dg_adapter_open(dg_adapter **out, dg_model *model, const char *path, const void *data, size_t size,
                          const char *name, int32_t region, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(out, "out");
        *out = nullptr;
        require(model, "model");
        require(path, "path");
        require(name, "name");
        auto adapter = std::make_unique<dg_adapter>();
        with_devices(*model->model, [&] {
            adapter->adapter = std::make_shared<const dg::Adapter>(model->model, path, data, size, name, region);
        });
        *out = adapter.release();
    });
}

void dg_adapter_free(dg_adapter *adapter) {
    if (adapter) {
        const std::shared_ptr<const dg::Model> model = adapter->adapter->model(); // until nobody needs its devices
        const dg::Devices::Turn turn(model->devices());
        delete adapter;
    }
}

dg_adapter_info dg_adapter_get_info(const dg_adapter *adapter) { return adapter->adapter->info(); }

int32_t dg_adapter_rank(const dg_adapter *adapter, int32_t index) {
    const std::vector<int32_t> &ranks = adapter->adapter->ranks();
    return index >= 0 && static_cast<size_t>(index) < ranks.size() ? ranks[static_cast<size_t>(index)] : 0;
}

const char *dg_adapter_base(const dg_adapter *adapter) { return adapter->adapter->base().c_str(); }

uint64_t dg_encoder_key(dg_adapter *const *adapters, const float *scales, int32_t n) {
    dg::Adapters list;
    for (int32_t i = 0; i < n; ++i) {
        list.push_back(adapters[i]->adapter);
    }
    return dg::encoder_key(list, {scales, scales + std::max(n, 0)});
}

dg_status dg_session_set_adapters(dg_session *session, dg_adapter *const *adapters, const float *scales, int32_t n,
                                  int32_t *encoded, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        const dg::Adapters list = list_of(adapters, scales, n);
        session->loop.drop();
        const int32_t again = session->session.set_adapters(list, {scales, scales + n});
        if (encoded) {
            *encoded = again;
        }
    });
}

uint64_t dg_session_encoder_key(const dg_session *session) { return session->session.encoder_key(); }

dg_status dg_session_score(dg_session *session, const int32_t *ids, const int32_t *lengths, int32_t n_texts,
                           double *logprob, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(ids, "ids");
        require(lengths, "lengths");
        require(logprob, "logprob");
        session->loop.drop();
        session->session.score(ids, lengths, n_texts, logprob);
    });
}

dg_status dg_session_denoise(dg_session *session, const int32_t *canvas, int32_t n_rows, const float *self_conditioning,
                             float *logits, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(canvas, "canvas");
        require(logits, "logits");
        dg::Session &s = session->session;
        if (n_rows < 1 || n_rows > s.model().config().canvas_length) {
            throw dg::Error(DG_ERROR_ARGUMENT, dg::format("n_rows is %d: it must be from 1 to the canvas length, %d",
                                                          n_rows, s.model().config().canvas_length));
        }
        s.check_ids("canvas", canvas, n_rows);
        if (self_conditioning) {
            dg::check_logits("self_conditioning", self_conditioning, n_rows, s.model().config().n_vocab,
                             dg::RowRules());
        }
        session->loop.drop();
        s.stepper().denoise(canvas, n_rows, self_conditioning, logits);
    });
}

// ------------------------------------------------------------------------------------------ denoising canvases

dg_canvas_options dg_canvas_options_default(const dg_model *model) {
    dg_canvas_options options = {};
    options.sampling = dg_model_sampling(model);
    return options;
}

dg_status dg_session_canvas_begin(dg_session *session, const dg_canvas_options *options, int32_t n_canvases, char *err,
                                  size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(options, "options");
        session->loop.begin(options, n_canvases);
    });
}

dg_status dg_session_canvas_step(dg_session *session, const dg_noise *noise, dg_step *out, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(out, "out");
        session->loop.step(noise, out);
    });
}

dg_status dg_session_canvas_rows(dg_session *session, int32_t index, dg_step *out, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(out, "out");
        *out = session->loop.rows_of(index);
    });
}

dg_status dg_session_canvas_drop(dg_session *session, int32_t index, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] { session->loop.leave(index); });
}

dg_status dg_session_canvas_rules(dg_session *session, int32_t index, const dg_canvas_rules *rules, char *err,
                                  size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(rules, "rules");
        session->loop.set_rules(index, *rules);
    });
}

dg_status dg_sample(const float *z, int32_t n_rows, int32_t n_vocab, const dg_sampling *sampling, int32_t step,
                    const dg_noise *noise, const int32_t *pinned, bool ggml_operators, int32_t *argmax, int32_t *canvas,
                    uint8_t *accepted, double *entropy, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(z, "z");
        require(sampling, "sampling");
        require(noise, "noise");
        require(argmax, "argmax");
        require(canvas, "canvas");
        require(accepted, "accepted");
        require(entropy, "entropy");
        if (n_rows < 1 || n_vocab < 1) {
            throw dg::Error(DG_ERROR_ARGUMENT, dg::format("z is %d x %d: it must not be empty", n_rows, n_vocab));
        }
        dg::check_sampling(*sampling);
        if (step < 0 || step >= sampling->steps) {
            throw dg::Error(DG_ERROR_ARGUMENT,
                            dg::format("step is %d: it must be from 0 to %d", step, sampling->steps - 1));
        }
        dg::check_noise(*noise, n_rows, n_vocab);
        dg::RowRules rules;
        rules.pinned = pinned;
        dg::check_rules(rules, n_rows, n_vocab);
        dg::check_logits("z", z, n_rows, n_vocab, rules);
        const auto t = static_cast<float>(dg::temperature(*sampling, step));
        std::vector<float> processed(z, z + static_cast<int64_t>(n_rows) * n_vocab);
        for (int32_t row = 0; row < n_rows; ++row) {
            const float *first = z + int64_t{row} * n_vocab;
            if (!rules.is_pinned(row) && !std::isfinite(*std::max_element(first, first + n_vocab) / t)) {
                throw dg::Error(
                    DG_ERROR_ARGUMENT,
                    dg::format("z: row %d is not finite when it is divided by the temperature, %g", row, t));
            }
        }
        dg::SamplerScratch scratch;
        const dg::StepOutput out = {argmax, canvas, accepted, entropy, nullptr};
        if (ggml_operators) {
            const std::vector<dg::RowResult> rows =
                dg::sample_by_graph(processed.data(), n_rows, n_vocab, t, noise->uniform);
            dg::take_rows(rows.data(), n_rows, rules, scratch, out);
            dg::finish_step(n_rows, *sampling, *noise, rules, scratch, out);
        } else {
            dg::sample_step(processed.data(), n_rows, n_vocab, *sampling, step, *noise, rules, 1, scratch, out);
        }
    });
}

void dg_noise_canvas(uint64_t seed, uint32_t canvas_index, int32_t n_rows, int32_t n_vocab, int32_t *out) {
    for (int32_t i = 0; i < n_rows; ++i) {
        out[i] = dg::draw_id(seed, canvas_index, 0, static_cast<uint32_t>(i), dg::Stream::FIRST_CANVAS, n_vocab);
    }
}

void dg_noise_uniform(uint64_t seed, uint32_t canvas_index, uint32_t step, int32_t n_rows, double *out) {
    for (int32_t i = 0; i < n_rows; ++i) {
        out[i] = dg::draw_uniform(seed, canvas_index, step, static_cast<uint32_t>(i));
    }
}

void dg_noise_renoise(uint64_t seed, uint32_t canvas_index, uint32_t step, int32_t n_rows, int32_t n_vocab,
                      int32_t *out) {
    for (int32_t i = 0; i < n_rows; ++i) {
        out[i] = dg::draw_id(seed, canvas_index, step, static_cast<uint32_t>(i), dg::Stream::RENOISE, n_vocab);
    }
}

// -------------------------------------------------------------------------------------------------- cancelling

void dg_session_cancel(dg_session *session) { session->session.cancel(); }

void dg_session_clear_cancel(dg_session *session) { session->session.clear_cancel(); }

dg_status dg_session_profile(dg_session *session, bool on, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] { session->session.profile(on); });
}

dg_timings dg_session_timings(const dg_session *session) { return session->session.timings(); }

dg_status dg_session_set_poll(dg_session *session, dg_poll poll, void *user, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] { session->session.set_poll(poll, user); });
}

// -------------------------------------------------------------------------------------------------- quantizing

dg_status dg_session_collect(dg_session *session, bool on, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        session->loop.drop();
        session->session.collect(on);
    });
}

dg_status dg_session_importance(dg_session *session, const char *tensor, double *squares, int64_t *counts, char *err,
                                size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(tensor, "tensor");
        require(squares, "squares");
        require(counts, "counts");
        const dg::Importance *importance = session->session.importance();
        if (!importance) {
            throw dg::Error(DG_ERROR_ARGUMENT, "nothing is collected: call dg_session_collect first");
        }
        const dg::FileTensor *weight = session->session.model().files().find(tensor);
        if (!weight) {
            throw dg::Error(DG_ERROR_ARGUMENT, std::string("there is no tensor '") + tensor + "'");
        }
        const auto matrices = static_cast<size_t>(weight->tensor->ne[2]);
        std::fill_n(squares, matrices * static_cast<size_t>(weight->tensor->ne[0]), 0.0);
        std::fill_n(counts, matrices, int64_t{0});
        if (const dg::Importance::Sums *sums = importance->find(tensor)) {
            std::copy(sums->squares.begin(), sums->squares.end(), squares);
            std::copy(sums->counts.begin(), sums->counts.end(), counts);
        }
    });
}

size_t dg_row_bytes(int32_t type, int64_t row) {
    dg::initialize_ggml();
    return dg::row_bytes(type, row);
}

dg_status dg_quantize_rows(int32_t src_type, const void *src, int32_t dst_type, void *dst, int64_t n_rows, int64_t row,
                           const float *importance, int32_t n_threads, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(src, "src");
        require(dst, "dst");
        dg::quantize_rows(src_type, src, dst_type, dst, {n_rows, row}, importance, n_threads);
    });
}

// --------------------------------------------------------------------------------------------- other machines

dg_status dg_rpc_serve(const char *endpoint, int32_t n_threads, char *err, size_t err_size) {
    return guarded(err, err_size, [&] {
        require(endpoint, "endpoint");
        dg::serve(endpoint, n_threads);
    });
}
