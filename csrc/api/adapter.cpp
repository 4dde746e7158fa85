// Adapters: dg_adapter, and a session's set of them.
#include "api/boundary.h"

#include <algorithm>
#include <memory>
#include <vector>

using namespace dg::api;

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
