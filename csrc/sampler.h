// The entropy-bound sampler (arXiv 2505.24857) as pure functions over rows of logits. Nothing here holds state or knows
// a model. Arrays are row-major; C rows, V logits a row.
#pragma once

#include "diffgguf.h"

#include <cstdint>
#include <vector>

namespace dg {

// Temperature of a step that counts from 0: t_min + (t_max - t_min) * n / N with n = N - step, so the last step of the
// schedule runs at t_min + (t_max - t_min) / N.
double temperature(const dg_sampling &sampling, int32_t step);

// The number of steps there can be: N, or the cap when it is lower.
int32_t step_count(const dg_sampling &sampling);

struct RowDraw {
    int32_t argmax; // the lowest id among equals
    int32_t draw;   // the first id, ascending, whose cumulative probability exceeds u
    double entropy; // nats
};

// Divides the row by `t` in place (what remains are the processed logits that self-conditioning wants), and draws from
// its softmax. Throws DG_ERROR_INTERNAL when a logit is NaN or the greatest one is not finite.
RowDraw draw_row(float *z, int32_t n_vocab, float t, double u);

// Rows are accepted in order of entropy while the entropies before them sum to at most `bound`; so at least one free
// row always is. Pinned rows take no part and get 0. accepted: [C].
// `order` is scratch.
void accept_rows(const double *entropy, const int32_t *pinned, int32_t n_rows, double bound, uint8_t *accepted,
                 std::vector<int32_t> &order);

// Mean entropy of the free rows; 0 without any.
double mean_entropy(const double *entropy, const int32_t *pinned, int32_t n_rows);

// Throws DG_ERROR_ARGUMENT for missing arrays, u outside [0, 1), ids outside [0, n_vocab).
void check_noise(const dg_noise &noise, int32_t n_rows, int32_t n_vocab);

// What sample_step needs besides its arguments; kept from step to step, so that a step allocates nothing.
struct SamplerScratch {
    std::vector<int32_t> draws;
    std::vector<int32_t> order;
};

// One whole step on `z` [C, V], which becomes the processed logits, pinned rows one-hot. Outputs [C].
struct StepOutput {
    int32_t *argmax;
    int32_t *canvas;
    uint8_t *accepted;
    double *entropy;
};
void sample_step(float *z, int32_t n_rows, int32_t n_vocab, const dg_sampling &sampling, int32_t step,
                 const dg_noise &noise, const int32_t *pinned, int32_t n_threads, SamplerScratch &scratch,
                 const StepOutput &out);

// Stable when the argmax canvas equals each of the last `threshold` ones.
class StabilityHistory {
  public:
    void start(int32_t threshold) {
        threshold_ = threshold;
        equal_ = 0;
        last_.clear();
    }
    // Whether `argmax` is stable; then remembers it.
    bool observe(const int32_t *argmax, int32_t n_rows);

  private:
    int32_t threshold_ = 0;
    int32_t equal_ = 0; // how many canvases in a row, before this one, equalled the last
    std::vector<int32_t> last_;
};

} // namespace dg
