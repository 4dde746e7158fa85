// Rows of weights from type to type, and importance sums.
#include "file/quantize.h"
#include "api/boundary.h"

#include <algorithm>
#include <string>

using namespace dg::api;

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
