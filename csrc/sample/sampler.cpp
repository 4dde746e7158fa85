#include "sample/sampler.h"

#include "base/error.h"
#include "base/exponential.h"
#include "base/parallel.h"
#include "cpu/levels.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dg {
namespace {

// Sums are kept per block of so many logits: the draw then walks block sums and recomputes one block.
constexpr int32_t BLOCK = 1024;

// Sums over a row whose greatest logit is known, and, where asked for, the weight of each block. Throws
// DG_ERROR_INTERNAL when a logit is NaN or the greatest one is not finite.
LogitSums sum_row(const Kernels &kernels, const float *z, int32_t n_vocab, float greatest,
                  std::vector<double> *weights) {
    LogitSums row;
    if (weights) {
        weights->clear();
    }
    for (int32_t first = 0; first < n_vocab; first += BLOCK) {
        const LogitSums sums = kernels.sum_logits(z + first, std::min(BLOCK, n_vocab - first), greatest);
        row.has_nan = row.has_nan || sums.has_nan;
        if (weights) {
            weights->push_back(sums.weight);
        }
        row.weight += sums.weight;
        row.moment += sums.moment;
    }
    if (row.has_nan || !std::isfinite(greatest) || !std::isfinite(row.weight)) {
        throw_unsound_row();
    }
    return row;
}

} // namespace

void check_logits(const char *name, const float *z, int32_t n_rows, int32_t n_vocab, const RowRules &rules) {
    for (int32_t row = 0; row < n_rows; ++row, z += n_vocab) {
        if (rules.is_pinned(row)) {
            continue;
        }
        const bool has_nan = std::any_of(z, z + n_vocab, [](float x) { return x != x; });
        if (has_nan || !std::isfinite(*std::max_element(z, z + n_vocab))) {
            throw Error(DG_ERROR_ARGUMENT, format("%s: row %d holds NaN or has no finite maximum", name, row));
        }
    }
}

double log_probability(const Kernels &kernels, const float *z, int32_t n_vocab, int32_t id) {
    const float greatest = *std::max_element(z, z + n_vocab);
    return static_cast<double>(z[id] - greatest) - std::log(sum_row(kernels, z, n_vocab, greatest, nullptr).weight);
}

RowDraw draw_row(const Kernels &kernels, float *z, int32_t n_vocab, float t, double u) {
    const float greatest = kernels.scale_logits(z, n_vocab, t);
    const int32_t n_blocks = (n_vocab + BLOCK - 1) / BLOCK;
    thread_local std::vector<double> weights;
    const LogitSums sums = sum_row(kernels, z, n_vocab, greatest, &weights);
    const double weight = sums.weight;

    RowDraw row = {};
    row.argmax = static_cast<int32_t>(std::find(z, z + n_vocab, greatest) - z);
    // H = log S - (sum x e^x) / S; rounding can leave it a hair below zero on a one-hot row.
    row.entropy = std::max(0.0, std::log(weight) - sums.moment / weight);

    const double target = u * weight;
    double before = 0.0;
    row.draw = -1;
    int32_t last_possible = row.argmax;
    for (int32_t b = 0; b < n_blocks && row.draw < 0; ++b) {
        const double through = before + weights[static_cast<size_t>(b)];
        if (through > target) {
            const int32_t end = std::min((b + 1) * BLOCK, n_vocab);
            double cumulative = before;
            for (int32_t i = b * BLOCK; i < end; ++i) {
                const float x = z[i] - greatest;
                if (x > EXP_FLOOR) {
                    cumulative += static_cast<double>(exp_negative(x));
                    last_possible = i;
                    if (cumulative > target) {
                        row.draw = i;
                        break;
                    }
                }
            }
            if (row.draw < 0) {
                row.draw = last_possible; // the block's sum rounded up past the target
            }
        }
        before = through;
    }
    if (row.draw < 0) {
        row.draw = last_possible; // u * S rounded up to S
    }
    return row;
}

void accept_rows(const double *entropy, const int32_t *pinned, int32_t n_rows, double bound, uint8_t *accepted,
                 std::vector<int32_t> &order) {
    order.clear();
    for (int32_t i = 0; i < n_rows; ++i) {
        accepted[i] = 0;
        if (!pinned || pinned[i] < 0) {
            order.push_back(i);
        }
    }
    std::sort(order.begin(), order.end(), [entropy](int32_t a, int32_t b) {
        return entropy[a] < entropy[b] || (entropy[a] == entropy[b] && a < b);
    });
    double before = 0.0;
    for (const int32_t row : order) {
        if (before > bound) {
            break;
        }
        accepted[row] = 1;
        before += entropy[row];
    }
}

double mean_entropy(const double *entropy, const int32_t *pinned, int32_t n_rows) {
    double sum = 0.0;
    int32_t n = 0;
    for (int32_t i = 0; i < n_rows; ++i) {
        if (!pinned || pinned[i] < 0) {
            sum += entropy[i];
            ++n;
        }
    }
    return n > 0 ? sum / n : 0.0;
}

void check_noise(const dg_noise &noise, int32_t n_rows, int32_t n_vocab) {
    if (!noise.uniform || !noise.renoise) {
        throw Error(DG_ERROR_ARGUMENT, "noise lacks its uniform or its renoise array");
    }
    for (int32_t i = 0; i < n_rows; ++i) {
        if (!(noise.uniform[i] >= 0.0 && noise.uniform[i] < 1.0)) {
            throw Error(DG_ERROR_ARGUMENT, format("uniform[%d] is %g: it must be in [0, 1)", i, noise.uniform[i]));
        }
        if (noise.renoise[i] < 0 || noise.renoise[i] >= n_vocab) {
            throw Error(DG_ERROR_ARGUMENT,
                        format("renoise[%d] is %d: a token id must be from 0 to %d", i, noise.renoise[i], n_vocab - 1));
        }
    }
}

int32_t RowRules::noise(int32_t row, int32_t id) const {
    if (is_pinned(row)) {
        return pinned[row];
    }
    return n_allowed(row) == 1 ? *allowed(row) : id;
}

void check_rules(const RowRules &rules, int32_t n_rows, int32_t n_vocab) {
    for (int32_t i = 0; i < n_rows; ++i) {
        if (rules.pinned && (rules.pinned[i] < -1 || rules.pinned[i] >= n_vocab)) {
            throw Error(DG_ERROR_ARGUMENT, format("pinned[%d] is %d: it must be -1 (free) or a token id up to %d", i,
                                                  rules.pinned[i], n_vocab - 1));
        }
        if (rules.watched && (rules.watched[i] < -1 || rules.watched[i] >= n_vocab)) {
            throw Error(DG_ERROR_ARGUMENT,
                        format("watched[%d] is %d: it must be -1 (the argmax) or a token id up to %d", i,
                               rules.watched[i], n_vocab - 1));
        }
        if (rules.allowed_ends && (rules.n_allowed(i) < 0 || !rules.allowed_ids)) {
            throw Error(DG_ERROR_ARGUMENT, format("allowed_ends[%d] is %d: the ends must not decrease, and allowed_ids "
                                                  "must be there",
                                                  i, rules.allowed_ends[i]));
        }
        for (int32_t k = 0; k < rules.n_allowed(i); ++k) {
            if (rules.allowed(i)[k] < 0 || rules.allowed(i)[k] >= n_vocab) {
                throw Error(DG_ERROR_ARGUMENT, format("row %d is allowed %d: a token id must be from 0 to %d", i,
                                                      rules.allowed(i)[k], n_vocab - 1));
            }
        }
    }
}

RowSample sample_row(const Kernels &kernels, float *z, int32_t n_vocab, float t, double u, const RowRules &rules,
                     int32_t row) {
    constexpr float NEVER = -std::numeric_limits<float>::infinity();
    if (rules.is_pinned(row)) {
        std::fill(z, z + n_vocab, NEVER);
        z[rules.pinned[row]] = 0.0f;
        return {rules.pinned[row], rules.pinned[row], 0.0, 0.0};
    }
    RowSample sample = {};
    if (rules.watched) {
        const int32_t watched = rules.watched[row];
        const auto id = watched >= 0 ? watched : static_cast<int32_t>(std::max_element(z, z + n_vocab) - z);
        sample.logprob = log_probability(kernels, z, n_vocab, id);
    }
    if (const int32_t n = rules.n_allowed(row); n > 0) {
        thread_local std::vector<float> kept;
        kept.clear();
        for (int32_t k = 0; k < n; ++k) {
            kept.push_back(z[rules.allowed(row)[k]]);
        }
        std::fill(z, z + n_vocab, NEVER);
        for (int32_t k = 0; k < n; ++k) {
            z[rules.allowed(row)[k]] = kept[static_cast<size_t>(k)];
        }
    }
    const RowDraw drawn = draw_row(kernels, z, n_vocab, t, u);
    sample.argmax = drawn.argmax;
    sample.draw = drawn.draw;
    sample.entropy = drawn.entropy;
    return sample;
}

void put_row(const RowSample &sample, int32_t row, SamplerScratch &scratch, const StepOutput &out) {
    out.argmax[row] = sample.argmax;
    out.entropy[row] = sample.entropy;
    scratch.draws[static_cast<size_t>(row)] = sample.draw;
    if (out.logprob) {
        out.logprob[row] = sample.logprob;
    }
}

void sample_step(float *z, int32_t n_rows, int32_t n_vocab, const dg_sampling &sampling, int32_t step,
                 const dg_noise &noise, const RowRules &rules, int32_t n_threads, SamplerScratch &scratch,
                 const StepOutput &out) {
    const auto t = static_cast<float>(temperature(sampling, step));
    const Kernels &kernels = logit_kernels(scratch.kernels);
    scratch.draws.resize(static_cast<size_t>(n_rows));
    parallel_rows(n_rows, n_vocab, n_threads, [&](int32_t row) {
        float *logits = z + static_cast<int64_t>(row) * n_vocab;
        put_row(sample_row(kernels, logits, n_vocab, t, noise.uniform[row], rules, row), row, scratch, out);
    });
    finish_step(n_rows, sampling, noise, rules, scratch, out);
}

void finish_step(int32_t n_rows, const dg_sampling &sampling, const dg_noise &noise, const RowRules &rules,
                 SamplerScratch &scratch, const StepOutput &out) {
    accept_rows(out.entropy, rules.pinned, n_rows, sampling.entropy_bound, out.accepted, scratch.order);
    for (int32_t row = 0; row < n_rows; ++row) {
        const bool keeps_draw = out.accepted[row] != 0 && !rules.is_pinned(row);
        // A pinned row gets its own id here, as the last thing of every step.
        out.canvas[row] = keeps_draw ? scratch.draws[static_cast<size_t>(row)] : rules.noise(row, noise.renoise[row]);
    }
}

bool StabilityHistory::observe(const int32_t *argmax, int32_t n_rows) {
    const auto n = static_cast<size_t>(n_rows);
    const bool same = last_.size() == n && std::equal(last_.begin(), last_.end(), argmax);
    equal_ = same ? equal_ + 1 : 0;
    last_.assign(argmax, argmax + n);
    return equal_ >= threshold_;
}

} // namespace dg
