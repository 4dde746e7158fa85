// Sessions: what they need, the prefix, passes, cancelling.
#include "api/boundary.h"
#include "model/needs.h"
#include "model/placement.h"
#include "sample/sampler.h"

#include <algorithm>
#include <memory>
#include <vector>

using namespace dg::api;

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
                             const int32_t *rows, int32_t n_out, float *logits, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] {
        require(canvas, "canvas");
        require(logits, "logits");
        dg::Session &s = session->session;
        if (n_rows < 1 || n_rows > s.model().config().canvas_length) {
            throw dg::Error(DG_ERROR_ARGUMENT, dg::format("n_rows is %d: it must be from 1 to the canvas length, %d",
                                                          n_rows, s.model().config().canvas_length));
        }
        s.check_ids("canvas", canvas, n_rows);
        if (rows && (n_out < 1 || n_out > n_rows)) {
            throw dg::Error(DG_ERROR_ARGUMENT,
                            dg::format("n_out is %d: it must be from 1 to n_rows, %d", n_out, n_rows));
        }
        for (int32_t i = 0; rows && i < n_out; ++i) {
            if (rows[i] < 0 || rows[i] >= n_rows) {
                throw dg::Error(DG_ERROR_ARGUMENT,
                                dg::format("rows[%d] is %d: it must be from 0 to %d", i, rows[i], n_rows - 1));
            }
        }
        if (self_conditioning) {
            dg::check_logits("self_conditioning", self_conditioning, n_rows, s.model().config().n_vocab,
                             dg::RowRules());
        }
        session->loop.drop();
        s.stepper().denoise(canvas, n_rows, self_conditioning, rows, n_out, logits);
    });
}

void dg_session_cancel(dg_session *session) { session->session.cancel(); }

void dg_session_clear_cancel(dg_session *session) { session->session.clear_cancel(); }

dg_status dg_session_profile(dg_session *session, bool on, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] { session->session.profile(on); });
}

dg_timings dg_session_timings(const dg_session *session) { return session->session.timings(); }

dg_status dg_session_set_poll(dg_session *session, dg_poll poll, void *user, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] { session->session.set_poll(poll, user); });
}
