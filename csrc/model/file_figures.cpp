#include "model/file_figures.h"

#include "base/error.h"
#include "file/gguf_keys.h"
#include "file/names.h"
#include "model/figures.h"
#include "sample/sampling.h"

#include <cinttypes>
#include <cstdlib>

namespace dg {
namespace {

// What DiffusionGemmaTextConfig and DiffusionGemmaConfig of transformers 5.23 take where config.json says nothing.
namespace defaults {
constexpr int32_t CANVAS = 256;
constexpr int32_t CONTEXT = 131072;
constexpr int32_t WINDOW = 512;
constexpr int32_t HEAD_DIM_FULL = 512;
constexpr int32_t HEAD_DIM_SLIDING = 256;
constexpr double RMS_EPSILON = 1e-6;
constexpr double SOFTCAP = 30.0;
constexpr double ROPE_BASE_FULL = 1e6;
constexpr double ROPE_BASE_SLIDING = 1e4;
} // namespace defaults

constexpr int64_t UNKNOWN = -1;
constexpr const char *BY_TENSORS = "as the tensors say";
constexpr const char *BY_DEFAULT = "the default of transformers";

class Reader {
  public:
    explicit Reader(const GgufHead &head) : head_(head), keys_(head.parts().front().path, head.keys()) {}

    FileFigures read() {
        head_.require_model();
        dg_config &c = out_.config;
        c.n_layer = figure(names::KEY_BLOCK_COUNT, ranges::LAYERS, count_layers());
        c.n_embd = figure(names::KEY_EMBEDDING_LENGTH, ranges::WIDTHS, extent(names::TOKEN_EMBD, 0));
        c.n_ff = figure(names::KEY_FEED_FORWARD_LENGTH, ranges::WIDTHS, extent(in_layer(0, names::FFN_GATE), 1));
        c.n_expert = figure(names::KEY_EXPERT_COUNT, ranges::EXPERTS, extent(in_layer(0, names::FFN_GATE_INP), 1));
        c.n_expert_used = figure(names::KEY_EXPERT_USED_COUNT, ranges::up_to(c.n_expert), UNKNOWN);
        c.n_ff_exp =
            figure(names::KEY_EXPERT_FEED_FORWARD_LENGTH, ranges::WIDTHS, extent(in_layer(0, names::FFN_DOWN_EXPS), 0));
        c.sliding_window = figure(names::KEY_SLIDING_WINDOW, ranges::WINDOWS, defaults::WINDOW, BY_DEFAULT);
        c.canvas_length = figure(names::KEY_CANVAS_LENGTH, ranges::CANVASES, defaults::CANVAS, BY_DEFAULT);
        const Range contexts = ranges::contexts(c.canvas_length);
        c.n_ctx_train = figure(names::KEY_CONTEXT_LENGTH, contexts, defaults::CONTEXT, BY_DEFAULT);
        c.norm_eps = real(names::KEY_RMS_EPSILON, 0.0, 1.0, defaults::RMS_EPSILON);
        c.logit_softcap = real(names::KEY_FINAL_LOGIT_SOFTCAPPING, 0.0, 1e6, defaults::SOFTCAP);
        c.rope_base_full = real(names::KEY_ROPE_FREQ_BASE, 1.0, 1e12, defaults::ROPE_BASE_FULL);
        c.rope_base_sliding = real(names::KEY_ROPE_FREQ_BASE_SWA, 1.0, 1e12, defaults::ROPE_BASE_SLIDING);
        refuse_unless_zero(names::KEY_SHARED_KV_LAYERS);
        refuse_unless_zero(names::KEY_EMBEDDING_LENGTH_PER_LAYER);
        read_layers();
        read_sampling();
        read_vocabulary();
        c.has_self_conditioning = has(self_conditioning_norm(head_)) || has(names::SELF_COND_GATE) ||
                                  has(names::SELF_COND_UP) || has(names::SELF_COND_DOWN);
        return std::move(out_);
    }

  private:
    const GgufHead &head_;
    const GgufKeys keys_;
    FileFigures out_;

    [[noreturn]] void fail(dg_status status, const std::string &what) const {
        throw Error(status, head_.parts().front().path + ": " + what);
    }

    // ------------------------------------------------------------------------------------------- what is missing

    bool has(const std::string &tensor) const { return head_.find(tensor) >= 0; }

    static std::string in_layer(size_t layer, const char *name) { return format("blk.%zu.%s", layer, name); }

    // A tensor's extent; UNKNOWN where there is none of that name.
    int64_t extent(const std::string &tensor, size_t axis) const {
        const int64_t found = head_.find(tensor);
        return found < 0 ? UNKNOWN : head_.tensors()[static_cast<size_t>(found)].info->ne[axis];
    }

    int64_t count_layers() const {
        size_t n = 0;
        while (has(in_layer(n, names::ATTN_NORM))) {
            ++n;
        }
        return n > 0 ? static_cast<int64_t>(n) : UNKNOWN;
    }

    // Whether a missing key is one to be named and done without.
    bool warn(const char *key, const std::string &used, const char *source) {
        out_.warnings.push_back(
            format("key %s is missing: %s, %s", GgufKeys::full_name(key).c_str(), used.c_str(), source));
        return true;
    }

    // The key's value, or else `known`, which UNKNOWN stands for nothing in.
    int32_t figure(const char *key, const Range &range, int64_t known, const char *source = BY_TENSORS) {
        const bool usable = known >= range.least && known <= range.most;
        if (keys_.has(key) || !usable) {
            return keys_.integer(key, range.least, range.most);
        }
        warn(key, format("%" PRId64 " is used", known), source);
        return static_cast<int32_t>(known);
    }

    float real(const char *key, double least, double most, double fallback) {
        if (!keys_.has(key)) {
            warn(key, format("%g is used", fallback), BY_DEFAULT);
        }
        return static_cast<float>(keys_.real_or(key, least, most, fallback));
    }

    // ---------------------------------------------------------------------------------------------------- layers

    void read_layers() {
        dg_config &c = out_.config;
        const auto n = static_cast<size_t>(c.n_layer);
        const std::vector<bool> sliding = read_pattern(n);
        const int64_t dims[2] = {
            head_dim(names::KEY_KEY_LENGTH, names::KEY_VALUE_LENGTH, names::KEY_ROPE_DIMENSION_COUNT,
                     dim_of_kind(sliding, false), defaults::HEAD_DIM_FULL),
            head_dim(names::KEY_KEY_LENGTH_SWA, names::KEY_VALUE_LENGTH_SWA, names::KEY_ROPE_DIMENSION_COUNT_SWA,
                     dim_of_kind(sliding, true), defaults::HEAD_DIM_SLIDING)};
        c.n_head = figure(names::KEY_HEAD_COUNT, ranges::HEADS,
                          heads(extent(in_layer(0, names::ATTN_Q), 1), dims[sliding.front()]));
        const std::vector<int64_t> kv = read_kv_heads(sliding, dims);
        int64_t kv_of_type[2] = {0, 0};
        for (size_t i = 0; i < n; ++i) {
            if (c.n_head % kv[i] != 0) {
                fail(DG_ERROR_FORMAT,
                     format("layer %zu has %" PRId64 " KV heads, which do not divide its %d query heads", i, kv[i],
                            c.n_head));
            }
            int64_t &expected = kv_of_type[sliding[i]];
            if (expected != 0 && expected != kv[i]) {
                fail(DG_ERROR_UNSUPPORTED,
                     format("layer %zu has %" PRId64 " KV heads where another %s layer has %" PRId64
                            "; layers of one kind must be alike",
                            i, kv[i], sliding[i] ? "sliding" : "full", expected));
            }
            expected = kv[i];
            out_.layers.push_back({sliding[i], static_cast<int32_t>(kv[i]), static_cast<int32_t>(dims[sliding[i]])});
        }
    }

    // Full layers make V from K, and have no tensor for it.
    std::vector<bool> read_pattern(size_t n) {
        if (keys_.has(names::KEY_SLIDING_WINDOW_PATTERN) || !has(in_layer(0, names::ATTN_K))) {
            return keys_.bools(names::KEY_SLIDING_WINDOW_PATTERN, n);
        }
        std::vector<bool> sliding;
        for (size_t i = 0; i < n; ++i) {
            sliding.push_back(has(in_layer(i, names::ATTN_V)));
        }
        warn(names::KEY_SLIDING_WINDOW_PATTERN, "layers with a V are sliding ones", BY_TENSORS);
        return sliding;
    }

    int64_t dim_of_kind(const std::vector<bool> &sliding, bool kind) const {
        for (size_t i = 0; i < sliding.size(); ++i) {
            if (sliding[i] == kind) {
                return extent(in_layer(i, names::ATTN_Q_NORM), 0);
            }
        }
        return UNKNOWN;
    }

    int64_t head_dim(const char *key, const char *value_key, const char *rope_key, int64_t known, int32_t fallback) {
        const int64_t dim = figure(key, ranges::HEAD_DIMS, known == UNKNOWN ? fallback : known,
                                   known == UNKNOWN ? BY_DEFAULT : BY_TENSORS);
        if (dim % 2 != 0) {
            fail(DG_ERROR_FORMAT,
                 format("key %s is %" PRId64 ", expected an even number", GgufKeys::full_name(key).c_str(), dim));
        }
        for (const char *other : {value_key, rope_key}) {
            const int32_t got =
                keys_.integer_or(other, ranges::HEAD_DIMS.least, ranges::HEAD_DIMS.most, static_cast<int32_t>(dim));
            if (got != dim) {
                fail(DG_ERROR_UNSUPPORTED, format("key %s is %d; only the key length, %" PRId64 ", is served",
                                                  GgufKeys::full_name(other).c_str(), got, dim));
            }
        }
        return dim;
    }

    static int64_t heads(int64_t width, int64_t dim) { return width > 0 && width % dim == 0 ? width / dim : UNKNOWN; }

    std::vector<int64_t> read_kv_heads(const std::vector<bool> &sliding, const int64_t (&dims)[2]) {
        const int64_t most = out_.config.n_head;
        std::vector<int64_t> found;
        for (size_t i = 0; i < sliding.size(); ++i) {
            found.push_back(heads(extent(in_layer(i, names::ATTN_K), 1), dims[sliding[i]]));
            if (keys_.has(names::KEY_HEAD_COUNT_KV) || found.back() < 1 || found.back() > most) {
                return keys_.integers(names::KEY_HEAD_COUNT_KV, sliding.size(), 1, most);
            }
        }
        warn(names::KEY_HEAD_COUNT_KV, "K's widths are used", BY_TENSORS);
        return found;
    }

    // --------------------------------------------------------------------------------------------------- the rest

    void refuse_unless_zero(const char *key) const {
        const int32_t value = keys_.integer_or(key, 0, INT32_MAX, 0);
        if (value != 0) {
            fail(DG_ERROR_UNSUPPORTED,
                 format("key %s is %d; only 0 is served", GgufKeys::full_name(key).c_str(), value));
        }
    }

    void read_vocabulary() {
        const int64_t n = extent(names::TOKEN_EMBD, 1);
        if (n == UNKNOWN) {
            fail(DG_ERROR_FORMAT, std::string("tensor ") + names::TOKEN_EMBD + " is missing");
        }
        if (n < ranges::VOCABULARIES.least || n > ranges::VOCABULARIES.most) {
            fail(DG_ERROR_FORMAT, format("tensor %s has %" PRId64 " rows, expected %" PRId64 " to %" PRId64,
                                         names::TOKEN_EMBD, n, ranges::VOCABULARIES.least, ranges::VOCABULARIES.most));
        }
        out_.config.n_vocab = static_cast<int32_t>(n);
    }

    void read_sampling() {
        const dg_sampling d = released_sampling();
        dg_sampling &s = out_.sampling;
        s.steps = keys_.integer_or(names::KEY_EB_MAX_STEPS, 1, 1000000, d.steps);
        s.max_steps = d.max_steps;
        s.stability_threshold = keys_.integer_or(names::KEY_EB_STABILITY_THRESHOLD, 0, 1000000, d.stability_threshold);
        s.t_min = as_written(names::KEY_EB_T_MIN, d.t_min);
        s.t_max = as_written(names::KEY_EB_T_MAX, d.t_max);
        s.entropy_bound = as_written(names::KEY_EB_ENTROPY_BOUND, d.entropy_bound);
        s.confidence_threshold = as_written(names::KEY_EB_CONFIDENCE_THRESHOLD, d.confidence_threshold);
        try {
            check_sampling(s);
        } catch (const Error &error) {
            fail(DG_ERROR_FORMAT, std::string("sampler keys diffusion.eb_*: ") + error.what());
        }
    }

    // The keys are float32; somebody wrote 0.4 and means the number that prints as 0.4, not 0.4000000059604645.
    double as_written(const char *key, double fallback) const {
        const double value = keys_.real_or(key, 0.0, 1e6, fallback);
        return std::strtod(format("%.7g", value).c_str(), nullptr);
    }
};

} // namespace

FileFigures read_figures(const GgufHead &head) { return Reader(head).read(); }

const char *self_conditioning_norm(const GgufHead &head) {
    return head.find(names::SELF_COND_PRE_NORM) >= 0 ? names::SELF_COND_PRE_NORM : names::SELF_COND_NORM;
}

} // namespace dg
