// The calls of diffgguf.h on one small model, in any order and with any numbers in their structs. An input is a list of
// calls: a byte for the call, then its numbers, each a byte that stands for itself or for an awkward value that
// follows. Arrays have the length that the header asks for, or the longest one when the count is out of range.
#include "diffgguf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace {

constexpr size_t MOST_MEMORY = 32 << 20;
constexpr int MOST_CALLS = 24;

void expect(bool holds, const std::string &promise) {
    if (!holds) {
        std::fprintf(stderr, "broken promise: %s\n", promise.c_str());
        std::abort();
    }
}

class Input {
  public:
    Input(const uint8_t *data, size_t size) : at_(data), end_(data + size) {}

    bool empty() const { return at_ == end_; }
    uint8_t byte() { return empty() ? uint8_t{0} : *at_++; }

    // Small numbers are as they are, the last 96 bytes stand for edges and for four bytes of any value.
    int32_t number() {
        const uint8_t code = byte();
        if (code < 160) {
            return code;
        }
        static constexpr int32_t edges[] = {-1,      -2,      INT32_MIN, INT32_MAX, INT32_MIN + 1, INT32_MAX - 1,
                                            255,     256,     65535,     1 << 16,   1 << 20,       1 << 24,
                                            1000000, 1000001, 512,       257};
        if (code < 224) {
            return edges[code % std::size(edges)];
        }
        int32_t value = 0;
        for (int i = 0; i < 4; ++i) {
            value = static_cast<int32_t>(static_cast<uint32_t>(value) << 8 | byte());
        }
        return value;
    }

    double real() {
        const uint8_t code = byte();
        static const double edges[] = {NAN,   INFINITY, -INFINITY, -0.0,  -1.0, 1e308, 4.9e-324, 1e-7,
                                       1e-45, 1e38,     1.0,       0.999, 0.1,  0.4,   0.8,      87.5};
        return code < 128 ? code / 16.0 : edges[code % std::size(edges)];
    }

  private:
    const uint8_t *at_;
    const uint8_t *end_;
};

struct Scratch {
    std::string folder = "/tmp/fuzz-options-" + std::to_string(getpid());
    std::string file = folder + "/saved";
    Scratch() { expect(mkdir(folder.c_str(), 0700) == 0, "mkdir " + folder); }
    ~Scratch() {
        std::remove(file.c_str());
        rmdir(folder.c_str());
    }
};

class Calls {
  public:
    Calls(const uint8_t *data, size_t size) : input_(data, size) {}
    ~Calls() { dg_session_free(session_); }

    void run() {
        for (int i = 0; i < MOST_CALLS && !input_.empty(); ++i) {
            call(input_.byte() % 16);
        }
    }

  private:
    Input input_;
    dg_session *session_ = nullptr;
    char err_[256] = "";
    size_t n_canvases_ = 0;

    static dg_model *model() {
        static dg_model *const model = [] {
            dg_model *opened = nullptr;
            const dg_model_options options = dg_model_options_default();
            char err[256];
            expect(dg_model_open(&opened, DG_FUZZ_MODEL, &options, err, sizeof err) == DG_OK, err);
            return opened;
        }();
        return model;
    }

    static dg_config config() { return dg_model_config(model()); }

    bool check(dg_status status, std::initializer_list<dg_status> allowed) {
        if (status == DG_OK) {
            return true;
        }
        expect(err_[0] != '\0' && !std::strpbrk(err_, "\r\n"), std::string("a failure has one line: ") + err_);
        expect(std::count(allowed.begin(), allowed.end(), status) == 1,
               "status " + std::to_string(status) + " is not among those of the call: " + err_);
        return false;
    }

    // The prefix is what it was, whatever a failed call said.
    void check_tokens(int32_t n) {
        expect(dg_session_n_past(session_) == n, "a failed call leaves the prefix");
        std::vector<int32_t> ids(static_cast<size_t>(n));
        int32_t none = 0;
        expect(dg_session_tokens(session_, n ? ids.data() : &none, n, nullptr, 0) == DG_OK, "tokens can be read");
        for (const int32_t id : ids) {
            expect(id >= 0 && id < config().n_vocab, "the prefix holds ids");
        }
    }

    // Ids for `n` rows, or for the longest canvas when n is out of range.
    std::vector<int32_t> ids(int32_t n, bool free_rows) {
        const int32_t most = config().canvas_length * 4;
        std::vector<int32_t> out(static_cast<size_t>(n >= 1 && n <= most ? n : most));
        for (int32_t &id : out) {
            id = std::max(input_.number(), INT32_MIN + 1) - (free_rows ? 1 : 0);
            if (id > 159 && id != INT32_MAX && input_.byte() % 8 != 0) {
                id %= config().n_vocab; // one wrong id refuses all
            }
        }
        return out;
    }

    dg_sampling sampling() {
        dg_sampling s = dg_model_sampling(model());
        const uint8_t which = input_.byte();
        s.steps = which & 1 ? input_.number() : s.steps;
        s.max_steps = which & 2 ? input_.number() : s.max_steps;
        s.stability_threshold = which & 4 ? input_.number() : s.stability_threshold;
        s.t_min = which & 8 ? input_.real() : s.t_min;
        s.t_max = which & 16 ? input_.real() : s.t_max;
        s.entropy_bound = which & 32 ? input_.real() : s.entropy_bound;
        s.confidence_threshold = which & 64 ? input_.real() : s.confidence_threshold;
        return s;
    }

    void make_session() {
        dg_session_options options = dg_session_options_default();
        options.n_threads = 1;
        options.n_ctx = config().canvas_length + 1 + input_.byte() % 64;
        options.n_batch = 1 + input_.byte() % 16;
        const uint8_t which = input_.byte();
        options.n_ctx = which & 1 ? input_.number() : options.n_ctx;
        options.n_batch = which & 2 ? input_.number() : options.n_batch;
        options.n_rows = which & 4 ? input_.number() : options.n_rows;
        options.type_kv = which & 8 ? input_.number() : input_.byte() % 4;
        options.n_threads = (which & 0xf0) == 0xf0 ? std::min(input_.number(), 4) : options.n_threads;
        const auto allowed = {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT, DG_ERROR_MEMORY, DG_ERROR_UNSUPPORTED};
        dg_memory memory = {};
        int32_t n_ctx = 0;
        const bool sized = check(dg_model_n_ctx(model(), &options, &n_ctx, err_, sizeof err_), allowed);
        const bool predicted = check(dg_model_memory(model(), &options, &memory, err_, sizeof err_), allowed);
        expect(sized || !predicted, "what has no n_ctx has no memory");
        if (predicted && memory.kv_cache + memory.compute + memory.logits > MOST_MEMORY) {
            return;
        }
        dg_session *made = nullptr;
        if (check(dg_session_create(&made, model(), &options, err_, sizeof err_), allowed)) {
            expect(predicted, "a session is made as predicted");
            expect(dg_session_n_ctx(made) == n_ctx, "n_ctx is as predicted");
            dg_session_free(session_);
            session_ = made;
            n_canvases_ = 0;
        } else {
            expect(!made, "no session without DG_OK");
        }
    }

    void call(int which) {
        if (which == 0 || !session_) {
            return make_session();
        }
        const int32_t n_past = dg_session_n_past(session_);
        switch (which) {
            case 1:
            case 2: return encode(n_past);
            case 3:
                if (!check(dg_session_truncate(session_, input_.number(), err_, sizeof err_),
                           {DG_ERROR_ARGUMENT, DG_ERROR_CANCELLED})) {
                    check_tokens(dg_session_n_past(session_));
                }
                return;
            case 4: return score(n_past);
            case 5: return denoise(n_past);
            case 6:
            case 7: return begin(n_past);
            case 8:
            case 9:
            case 10: return step(n_past);
            case 11:
                if (input_.byte() % 2 == 0) {
                    check(dg_session_canvas_drop(session_, input_.number(), err_, sizeof err_), {DG_ERROR_ARGUMENT});
                } else {
                    const int32_t n = input_.byte() % 4 == 0 ? input_.number() : 1 + input_.byte() % 8;
                    check(dg_session_canvas_narrow(session_, input_.byte() % 4, n, err_, sizeof err_),
                          {DG_ERROR_ARGUMENT, DG_ERROR_UNSUPPORTED});
                }
                return;
            case 12: return save_and_load(n_past);
            case 13: return sample();
            case 14:
                if (input_.byte() % 4 == 0) {
                    dg_session_cancel(session_);
                } else {
                    dg_session_clear_cancel(session_);
                }
                return;
            default: return odd_arguments();
        }
    }

    void encode(int32_t n_past) {
        const int32_t n = input_.byte() % 4 == 0 ? input_.number() : 1 + input_.byte() % 24;
        const std::vector<int32_t> tokens = ids(n, false);
        const int32_t count = n > static_cast<int32_t>(tokens.size()) ? static_cast<int32_t>(tokens.size()) : n;
        if (check(dg_session_encode(session_, tokens.data(), count, err_, sizeof err_),
                  {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT, DG_ERROR_CANCELLED})) {
            expect(dg_session_n_past(session_) == n_past + count, "encoding appends");
        } else {
            check_tokens(n_past); // a request to cancel from before the call meets its first chunk
        }
    }

    void score(int32_t n_past) {
        const int32_t n = input_.byte() % 8 == 0 ? std::min(input_.number(), 4) : 1 + input_.byte() % 4;
        std::vector<int32_t> lengths(4);
        int64_t total = 0;
        for (int32_t &length : lengths) {
            length = input_.byte() % 8 == 0 ? input_.number() : 1 + input_.byte() % 8;
            total += length >= 1 && length <= config().canvas_length ? length : 0;
        }
        const std::vector<int32_t> texts = ids(static_cast<int32_t>(std::max<int64_t>(total, 1)), false);
        std::vector<double> logprob(texts.size(), 1.0);
        if (check(dg_session_score(session_, texts.data(), lengths.data(), n, logprob.data(), err_, sizeof err_),
                  {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT, DG_ERROR_CANCELLED})) {
            int32_t scored = 0;
            for (int32_t i = 0; i < n; ++i) {
                scored += lengths[static_cast<size_t>(i)];
            }
            for (int32_t i = 0; i < scored; ++i) {
                expect(logprob[static_cast<size_t>(i)] <= 0.0, "a log-probability is not positive");
            }
        }
        check_tokens(n_past);
    }

    void denoise(int32_t n_past) {
        const int32_t n = input_.byte() % 4 == 0 ? input_.number() : 1 + input_.byte() % 8;
        const dg_config c = config();
        const std::vector<int32_t> canvas = ids(n, false);
        const auto size = static_cast<size_t>(c.canvas_length) * static_cast<size_t>(c.n_vocab);
        std::vector<float> signal(size, 0.5f);
        signal[input_.byte()] = static_cast<float>(input_.byte() % 4 == 0 ? input_.real() : 1.0);
        std::vector<float> logits(size);
        const int32_t row = input_.byte() % 4 == 0 ? input_.number() : 0;
        check(dg_session_denoise(session_, canvas.data(), n, input_.byte() % 2 ? signal.data() : nullptr,
                                 input_.byte() % 2 ? &row : nullptr, 1, logits.data(), err_, sizeof err_),
              {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT, DG_ERROR_CANCELLED, DG_ERROR_INTERNAL});
        check_tokens(n_past);
    }

    void begin(int32_t n_past) {
        struct Arrays {
            std::vector<int32_t> pinned, canvas, watched, ends, allowed;
        };
        constexpr int32_t MOST = 4;
        std::vector<Arrays> arrays(MOST);
        std::vector<dg_canvas_options> options(MOST);
        const int32_t n = input_.byte() % 8 == 0 ? std::min(input_.number(), MOST) : 1 + input_.byte() % 3;
        for (int32_t i = 0; i < n; ++i) {
            dg_canvas_options &o = options[static_cast<size_t>(i)];
            Arrays &a = arrays[static_cast<size_t>(i)];
            o.sampling = sampling();
            o.seed = static_cast<uint64_t>(input_.number());
            o.canvas_index = static_cast<uint32_t>(input_.number());
            o.n_rows = input_.byte() % 4 == 0 ? input_.number() : input_.byte() % 9;
            const uint8_t which = input_.byte();
            const int32_t rows = o.n_rows == 0 ? config().canvas_length : o.n_rows;
            const auto give = [&](int bit, std::vector<int32_t> &array, const int32_t *&pointer) {
                if (which & bit) {
                    array = ids(rows, bit != 2);
                    pointer = array.data();
                }
            };
            give(1, a.pinned, o.pinned);
            give(2, a.canvas, o.canvas);
            give(4, a.watched, o.watched);
            if (which & 8) {
                a.ends.resize(std::max<size_t>(ids(rows, true).size(), 1));
                int32_t end = 0;
                for (int32_t &value : a.ends) {
                    end += input_.byte() % 3;
                    value = end;
                }
                a.allowed = std::vector<int32_t>(static_cast<size_t>(end) + 1);
                for (int32_t &id : a.allowed) {
                    id = input_.byte();
                }
                a.ends[0] = input_.byte() % 16 == 0 ? -1 : a.ends[0];
                o.allowed_ends = a.ends.data();
                o.allowed_ids = which & 16 ? nullptr : a.allowed.data();
            }
        }
        const bool begun = check(dg_session_canvas_begin(session_, options.data(), n, err_, sizeof err_),
                                 {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT});
        n_canvases_ = begun ? static_cast<size_t>(n) : 0;
        check_tokens(n_past);
    }

    void step(int32_t n_past) {
        std::vector<dg_step> out(std::max<size_t>(n_canvases_, 1));
        const auto rows = static_cast<size_t>(config().canvas_length);
        std::vector<double> uniform(rows, 0.5);
        std::vector<int32_t> renoise(rows, 1);
        uniform[0] = input_.real();
        renoise[0] = input_.number();
        std::vector<dg_noise> noise(out.size(), {uniform.data(), renoise.data()});
        const bool handed_in = input_.byte() % 4 == 0;
        if (check(dg_session_canvas_step(session_, handed_in ? noise.data() : nullptr, out.data(), err_, sizeof err_),
                  {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT, DG_ERROR_CANCELLED})) {
            for (size_t i = 0; i < n_canvases_; ++i) {
                for (int32_t row = 0; row < out[i].n_rows; ++row) {
                    expect(out[i].canvas[row] >= 0 && out[i].canvas[row] < config().n_vocab &&
                               out[i].argmax[row] >= 0 && out[i].argmax[row] < config().n_vocab,
                           "a canvas holds ids");
                    expect(out[i].entropy[row] >= 0.0, "an entropy is not negative");
                }
            }
        }
        check_tokens(n_past);
    }

    // What was saved comes back; what was changed behind our back is refused or comes back.
    void save_and_load(int32_t n_past) {
        static const Scratch scratch;
        if (!check(dg_session_save(session_, scratch.file.c_str(), err_, sizeof err_), {})) {
            return;
        }
        const int changes = input_.byte() % 4;
        if (changes > 0) {
            std::FILE *file = std::fopen(scratch.file.c_str(), "r+b");
            expect(file != nullptr, "the saved file opens");
            for (int i = 0; i < changes; ++i) {
                std::fseek(file, input_.number() & 0xfff, SEEK_SET);
                std::fputc(input_.byte(), file);
            }
            std::fclose(file);
            if (input_.byte() % 4 == 0) {
                expect(truncate(scratch.file.c_str(), input_.number() & 0xfff) == 0, "truncate");
            }
        }
        if (check(dg_session_load(session_, scratch.file.c_str(), err_, sizeof err_),
                  {DG_ERROR_FORMAT, DG_ERROR_CONTEXT})) {
            expect(changes > 0 || dg_session_n_past(session_) == n_past, "what was saved comes back");
            check_tokens(dg_session_n_past(session_));
        } else {
            expect(changes > 0, std::string("an unchanged file is refused: ") + err_);
            check_tokens(0);
        }
        if (changes > 0) { // what remains may hold numbers that are none
            dg_session_free(session_);
            session_ = nullptr;
        }
    }

    void sample() {
        const int32_t n_rows = input_.byte() % 8 == 0 ? input_.number() : 1 + input_.byte() % 4;
        const int32_t n_vocab = input_.byte() % 8 == 0 ? -input_.byte() : 1 + input_.byte() % 8;
        const auto rows = static_cast<size_t>(std::clamp(n_rows, 1, 160));
        std::vector<float> z(rows * 8);
        for (float &value : z) {
            value = static_cast<float>(input_.byte() % 16 == 0 ? input_.real() : input_.byte() / 8.0);
        }
        std::vector<double> uniform(rows);
        std::vector<int32_t> renoise(rows), pinned(rows), argmax(rows), canvas(rows);
        for (size_t i = 0; i < rows; ++i) {
            uniform[i] = input_.byte() / (input_.byte() % 16 == 0 ? 200.0 : 256.0);
            renoise[i] = input_.byte() % 16 == 0 ? input_.number() : 0;
            pinned[i] = input_.byte() % 4 == 0 ? input_.number() : -1;
        }
        std::vector<uint8_t> accepted(rows);
        std::vector<double> entropy(rows);
        const dg_sampling options = sampling();
        const dg_noise noise = {uniform.data(), renoise.data()};
        if (n_rows > 160) {
            return;
        }
        if (check(dg_sample(z.data(), n_rows, n_vocab, &options, input_.number(), &noise,
                            input_.byte() % 2 ? pinned.data() : nullptr, input_.byte() % 2 != 0, argmax.data(),
                            canvas.data(), accepted.data(), entropy.data(), err_, sizeof err_),
                  {DG_ERROR_ARGUMENT, DG_ERROR_INTERNAL})) {
            for (size_t i = 0; i < static_cast<size_t>(n_rows); ++i) {
                expect(canvas[i] >= 0 && canvas[i] < n_vocab && argmax[i] >= 0 && argmax[i] < n_vocab, "ids");
                expect(entropy[i] >= 0.0, "an entropy is not negative");
            }
        }
    }

    // NULL where a pointer belongs, buffers for messages of any size, indices of any value.
    void odd_arguments() {
        int32_t id = 0;
        double real = 0;
        float logit = 0;
        std::vector<char> err(input_.byte() % 4 == 0 ? 0 : 1 + input_.byte() % 8);
        char *const e = err.empty() ? nullptr : err.data();
        const size_t n = err.size();
        dg_model_options options = dg_model_options_default();
        options.n_gpu_layers = input_.number();
        options.use_mmap = input_.byte() % 2 == 0;
        options.n_cpu_moe = input_.number();
        options.main_gpu = input_.number();
        dg_model *opened = nullptr;
        if (dg_model_open(&opened, DG_FUZZ_MODEL, &options, e, n) == DG_OK) {
            dg_model_free(opened);
        }
        expect(dg_model_open(&opened, nullptr, &options, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_model_open(nullptr, "", &options, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_encode(session_, nullptr, 1, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_encode(nullptr, &id, 1, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_score(session_, nullptr, &id, 1, &real, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_denoise(session_, nullptr, 1, nullptr, nullptr, 0, &logit, e, n) == DG_ERROR_ARGUMENT,
               "NULL");
        expect(dg_session_canvas_begin(session_, nullptr, 1, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_canvas_step(session_, nullptr, nullptr, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_save(session_, nullptr, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(dg_session_load(session_, nullptr, e, n) == DG_ERROR_ARGUMENT, "NULL");
        expect(err.empty() || std::memchr(err.data(), '\0', n), "a message ends inside its buffer");
        const int32_t index = input_.number();
        dg_model_layer(model(), index);
        dg_model_warning(model(), index);
        dg_file_get_part(dg_model_file(model()), index);
        dg_file_key(dg_model_file(model()), index);
        dg_file_tensor(dg_model_file(model()), index);
        dg_backend_name(index);
        char text[16];
        dg_file_strings(dg_model_file(model()), index, text, input_.byte() % sizeof text);
        place();
    }

    // Figures, sizes and devices of any value.
    void place() {
        dg_config c = config();
        std::vector<dg_layer_config> layers;
        for (int32_t i = 0; i < c.n_layer; ++i) {
            layers.push_back(dg_model_layer(model(), i));
        }
        int32_t *const figures[] = {&c.n_embd,        &c.n_vocab,           &c.n_head,
                                    &c.n_ff,          &c.n_ff_exp,          &c.n_expert,
                                    &c.n_expert_used, &c.sliding_window,    &c.canvas_length,
                                    &c.n_ctx_train,   &layers[0].n_head_kv, &layers[0].head_dim};
        for (int i = input_.byte() % 4; i > 0; --i) {
            *figures[input_.byte() % std::size(figures)] = input_.number();
        }
        dg_session_options session = dg_session_options_default();
        const uint8_t which = input_.byte();
        session.n_ctx = which & 1 ? input_.number() : session.n_ctx;
        session.n_batch = which & 2 ? input_.number() : session.n_batch;
        session.n_rows = which & 4 ? input_.number() : session.n_rows;
        session.type_kv = which & 8 ? input_.number() : session.type_kv;
        session.sampler = which & 16 ? input_.number() : session.sampler;
        dg_needs needs = {};
        std::vector<size_t> cache(layers.size());
        if (check(dg_session_needs(&c, layers.data(), &session, &needs, cache.data(), err_, sizeof err_),
                  {DG_ERROR_ARGUMENT, DG_ERROR_CONTEXT, DG_ERROR_UNSUPPORTED})) {
            expect(needs.n_ctx > c.canvas_length && needs.n_rows >= c.canvas_length, "a session has room for a canvas");
            expect(needs.passes < size_t{1} << 63 && needs.sampling < size_t{1} << 63, "sizes are sums of sizes");
        }
        std::vector<dg_layer_bytes> bytes;
        for (const size_t n : cache) {
            bytes.push_back({static_cast<size_t>(input_.number()), static_cast<size_t>(input_.number()), n});
        }
        std::vector<dg_device> devices(input_.byte() % 4);
        for (dg_device &device : devices) {
            device.memory_free = static_cast<size_t>(input_.number()) << input_.byte() % 24;
            device.endpoint = input_.byte() % 4 == 0 ? "127.0.0.1:1" : "";
        }
        std::vector<float> split(input_.byte() % 4);
        std::generate(split.begin(), split.end(), [&] { return static_cast<float>(input_.real()); });
        dg_model_options options = dg_model_options_default();
        options.n_gpu_layers = which & 32 ? input_.number() : options.n_gpu_layers;
        options.n_cpu_moe = which & 64 ? input_.number() : options.n_cpu_moe;
        options.main_gpu = which & 128 ? input_.number() : options.main_gpu;
        options.tensor_split = split.data();
        options.n_tensor_split = static_cast<int32_t>(split.size());
        dg_plan plan = {};
        std::vector<int32_t> device_of(bytes.size());
        if (check(dg_plan_layers(bytes.data(), c.n_layer, static_cast<size_t>(input_.number()), &needs, devices.data(),
                                 static_cast<int32_t>(devices.size()), &options, &plan, device_of.data(), err_,
                                 sizeof err_),
                  {DG_ERROR_ARGUMENT})) {
            expect(plan.n_gpu_layers >= 0 && plan.n_gpu_layers <= c.n_layer, "layers that there are");
            expect(plan.n_cpu_moe >= 0 && plan.n_cpu_moe <= c.n_layer, "and experts of layers that there are");
            for (int32_t i = 0; i < c.n_layer; ++i) {
                const int32_t device = device_of[static_cast<size_t>(i)];
                expect(device >= -1 && device < static_cast<int32_t>(devices.size()), "devices that there are");
                expect((device >= 0) == (i >= c.n_layer - plan.n_gpu_layers), "the last layers are on devices");
            }
        }
    }
};

} // namespace

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Calls(data, size).run();
    return 0;
}
