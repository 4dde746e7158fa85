// Canvases under way, and the sampler and its draws alone.
#include "api/boundary.h"
#include "base/random.h"
#include "sample/sampler.h"
#include "sample/sampler_graph.h"

#include <algorithm>
#include <cmath>
#include <vector>

using namespace dg::api;

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

dg_status dg_session_canvas_narrow(dg_session *session, int32_t index, int32_t n_rows, char *err, size_t err_size) {
    return inside(session, err, err_size, [&] { session->loop.narrow(index, n_rows); });
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
