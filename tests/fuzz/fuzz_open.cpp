// The whole open path on mutated GGUF files, as models and as adapters for a small model: whatever they say, the file
// opens or is refused in one line, and what opens can be looked at and computed with.
#include "diffgguf.h"

#include "gguf_spans.h"
#include "random_source.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

using fuzz::Field;
using fuzz::Kind;
using fuzz::Random;

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
}

namespace {

constexpr size_t MOST_MEMORY = 64 << 20;

[[noreturn]] void broken(const std::string &promise) {
    std::fprintf(stderr, "broken promise: %s\n", promise.c_str());
    std::abort();
}

void expect(bool holds, const std::string &promise) {
    if (!holds) {
        broken(promise);
    }
}

void expect_one_line(const char *err) {
    expect(err[0] != '\0', "a failure has a message");
    expect(!std::strpbrk(err, "\r\n"), std::string("a message is one line: ") + err);
}

// Where the second file begins in an input that holds the two parts of a split model; its size in any other.
size_t second_part(const uint8_t *data, size_t size) {
    const std::string magic("GGUF\3\0\0\0", 8);
    const uint8_t *found = size < 8 ? data + size : std::search(data + 8, data + size, magic.begin(), magic.end());
    return static_cast<size_t>(found - data);
}

// The two parts, under the names that the reader looks for.
class SplitFiles {
  public:
    SplitFiles() { expect(mkdtemp(folder_) != nullptr, "mkdtemp"); }
    ~SplitFiles() {
        std::remove(path(1).c_str());
        std::remove(path(2).c_str());
        rmdir(folder_);
    }
    std::string path(int index) const {
        return std::string(folder_) + "/x-0000" + std::to_string(index) + "-of-00002.gguf";
    }
    void write(int index, const uint8_t *data, size_t size) const {
        std::FILE *file = std::fopen(path(index).c_str(), "wb");
        expect(file && std::fwrite(data, 1, size, file) == size && std::fclose(file) == 0, "write");
    }

  private:
    char folder_[32] = "/tmp/fuzz-open-XXXXXX";
};

// A file without a name that is written anew for every run.
class MemoryFile {
  public:
    MemoryFile() : fd_(memfd_create("fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(fd_)) {
        expect(fd_ >= 0, "memfd_create");
    }
    void write(const uint8_t *data, size_t size) {
        expect(ftruncate(fd_, 0) == 0 && pwrite(fd_, data, size, 0) == static_cast<ssize_t>(size), "write");
    }
    const char *path() const { return path_.c_str(); }

  private:
    int fd_;
    std::string path_;
};

// Reads everything that can be asked of a model.
void look_inside(const dg_model *model) {
    volatile size_t sum = 0;
    std::vector<char> strings;
    const dg_file *file = dg_model_file(model);
    for (int64_t i = -1; i <= dg_file_n_keys(file); ++i) {
        const dg_key key = dg_file_key(file, i);
        sum = sum + (key.name ? std::strlen(key.name) : 0);
        const size_t n = dg_file_strings(file, i, nullptr, 0);
        strings.resize(n);
        expect(dg_file_strings(file, i, strings.data(), n) == n, "dg_file_strings says the same size twice");
        for (size_t k = 0; k < key.n_bytes; ++k) {
            sum = sum + static_cast<const unsigned char *>(key.data)[k];
        }
        for (size_t k = 0; k < key.entry_bytes; ++k) {
            sum = sum + static_cast<const unsigned char *>(key.entry)[k];
        }
    }
    for (int64_t i = -1; i <= dg_file_n_tensors(file); ++i) {
        const dg_tensor_info info = dg_file_tensor(file, i);
        sum = sum + (info.name ? std::strlen(info.name) + std::strlen(info.type_name) : 0);
    }
    const dg_config config = dg_model_config(model);
    for (int32_t i = -1; i <= config.n_layer; ++i) {
        sum = sum + static_cast<size_t>(dg_model_layer(model, i).head_dim);
    }
    for (int32_t i = -1; i <= dg_model_n_warnings(model); ++i) {
        const char *warning = dg_model_warning(model, i);
        sum = sum + (warning ? std::strlen(warning) : 0);
    }
}

void expect_status(dg_status status, const char *err, std::initializer_list<dg_status> allowed) {
    if (status != DG_OK) {
        expect_one_line(err);
        expect(std::count(allowed.begin(), allowed.end(), status) == 1,
               "status " + std::to_string(status) + " is not among those of the call: " + err);
    }
}

void compute(dg_model *model, dg_adapter *adapter = nullptr) {
    char err[512];
    const dg_config config = dg_model_config(model);
    dg_session_options options = dg_session_options_default();
    dg_memory usual = {};
    expect_status(dg_model_memory(model, &options, &usual, err, sizeof err), err,
                  {DG_ERROR_CONTEXT, DG_ERROR_MEMORY, DG_ERROR_UNSUPPORTED});
    options.n_threads = 1;
    options.n_batch = 4;
    options.n_ctx = config.canvas_length + 8;
    dg_memory memory = {};
    dg_status status = dg_model_memory(model, &options, &memory, err, sizeof err);
    expect_status(status, err, {DG_ERROR_CONTEXT, DG_ERROR_MEMORY});
    if (status != DG_OK || memory.kv_cache + memory.compute + memory.logits > MOST_MEMORY) {
        return;
    }
    dg_session *session = nullptr;
    status = dg_session_create(&session, model, &options, err, sizeof err);
    expect_status(status, err, {DG_ERROR_MEMORY});
    if (status != DG_OK) {
        return;
    }
    if (adapter) {
        const float scale = 1.0f;
        status = dg_session_set_adapters(session, &adapter, &scale, 1, nullptr, err, sizeof err);
        expect_status(status, err, {DG_ERROR_MEMORY});
    }
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < std::min(6, config.n_vocab); ++i) {
        ids.push_back(i);
    }
    // Weights that are not numbers compute what is not a number: an error, not a crash.
    status = dg_session_encode(session, ids.data(), static_cast<int32_t>(ids.size()), err, sizeof err);
    expect_status(status, err, {DG_ERROR_INTERNAL});
    if (status == DG_OK) {
        dg_canvas_options canvas = dg_canvas_options_default(model);
        canvas.sampling.max_steps = 2;
        dg_step step = {};
        status = dg_session_canvas_begin(session, &canvas, 1, err, sizeof err);
        expect_status(status, err, {});
        while (status == DG_OK && !step.finished) {
            status = dg_session_canvas_step(session, nullptr, &step, err, sizeof err);
            expect_status(status, err, {DG_ERROR_INTERNAL});
        }
        for (int32_t i = 0; status == DG_OK && i < step.n_rows; ++i) {
            expect(step.argmax[i] >= 0 && step.argmax[i] < config.n_vocab, "a canvas holds ids");
        }
    }
    dg_session_free(session);
}

// The same bytes as an adapter, from memory or from a file.
void adapt(const uint8_t *data, size_t size, const char *path, uint64_t choice) {
    static dg_model *const model = [] {
        const dg_model_options options = dg_model_options_default();
        char err[512];
        dg_model *opened = nullptr;
        expect(dg_model_open(&opened, DG_FUZZ_MODEL, &options, err, sizeof err) == DG_OK, err);
        return opened;
    }();
    char err[512];
    dg_adapter *adapter = nullptr;
    const auto region = static_cast<int32_t>(choice / 2 % 4);
    const void *bytes = choice % 2 ? data : nullptr;
    const dg_status status = dg_adapter_open(&adapter, model, path, bytes, size, "it", region, err, sizeof err);
    expect((status == DG_OK) == (adapter != nullptr), "an adapter comes with DG_OK and with nothing else");
    expect_status(status, err, {DG_ERROR_FORMAT, DG_ERROR_UNSUPPORTED, DG_ERROR_MEMORY, DG_ERROR_ARGUMENT});
    expect(status != DG_ERROR_ARGUMENT || region != DG_REGION_OF_FILE, "an argument that can be wrong");
    if (adapter) {
        const dg_adapter_info info = dg_adapter_get_info(adapter);
        expect(info.n_pairs > 0 && info.n_bytes > 0, "an adapter that opens does something");
        for (int32_t i = -1; i <= info.n_ranks; ++i) {
            expect((dg_adapter_rank(adapter, i) > 0) == (i >= 0 && i < info.n_ranks), "ranks are above 0");
        }
        expect(dg_adapter_base(adapter) != nullptr, "a base has a name, or an empty one");
        if (choice / 8 % 4 == 0) {
            compute(model, adapter);
        }
        dg_adapter_free(adapter);
    }
}

// ------------------------------------------------------------------------------------------------- the mutator

using Bytes = std::vector<uint8_t>;

void put(Bytes &bytes, size_t at, uint64_t value, size_t size) { std::memcpy(bytes.data() + at, &value, size); }

uint64_t get(const Bytes &bytes, size_t at, size_t size) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data() + at, size);
    return value;
}

void change_field(Bytes &bytes, const Field &field, Random &random) {
    const uint64_t old = get(bytes, field.begin, std::min<size_t>(field.size, 8));
    switch (field.kind) {
        case Kind::KEY_TYPE:
        case Kind::ARRAY_TYPE: put(bytes, field.begin, random.one_in(8) ? random.next() : random.below(14), 4); break;
        case Kind::TENSOR_TYPE: put(bytes, field.begin, random.one_in(8) ? random.next() : random.below(45), 4); break;
        case Kind::DIMS: put(bytes, field.begin, random.one_in(4) ? random.next() : random.below(6), 4); break;
        case Kind::REAL: {
            static constexpr double values[] = {0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, 3.5e38, -1e300, NAN, INFINITY};
            const double value = values[random.below(std::size(values))];
            const float small = static_cast<float>(
                std::clamp(value, static_cast<double>(std::numeric_limits<float>::lowest()), 3.4e38));
            if (field.size == 4) {
                std::memcpy(bytes.data() + field.begin, &small, 4);
            } else {
                std::memcpy(bytes.data() + field.begin, &value, 8);
            }
            break;
        }
        case Kind::TEXT: bytes[field.begin + random.below(field.size)] = static_cast<uint8_t>(random.next()); break;
        case Kind::OFFSET:
        case Kind::EXTENT: {
            uint64_t value = awkward(random, old);
            if (random.one_in(2)) { // stays aligned, a multiple of every type's block
                value &= ~uint64_t{255};
            }
            put(bytes, field.begin, value, field.size);
            break;
        }
        case Kind::COUNT:
        case Kind::LENGTH:
        case Kind::INTEGER: put(bytes, field.begin, awkward(random, old), field.size); break;
    }
}

// Puts `text` in the place of the header's bytes from `begin` to `end`, and the data back on its alignment.
void splice(Bytes &bytes, const fuzz::Spans &spans, size_t begin, size_t end, const Bytes &text) {
    const auto padded = [](size_t n) { return (n + 31) / 32 * 32; };
    const auto at = [&bytes](size_t n) { return bytes.begin() + static_cast<ptrdiff_t>(std::min(n, bytes.size())); };
    const Bytes data(at(padded(spans.end)), bytes.end());
    const Bytes rest(at(end), at(spans.end));
    bytes.erase(at(begin), bytes.end());
    bytes.insert(bytes.end(), text.begin(), text.end());
    bytes.insert(bytes.end(), rest.begin(), rest.end());
    bytes.resize(padded(bytes.size()));
    bytes.insert(bytes.end(), data.begin(), data.end());
}

Bytes part(const Bytes &bytes, const fuzz::Span &span) {
    return Bytes(bytes.begin() + static_cast<ptrdiff_t>(span.begin), bytes.begin() + static_cast<ptrdiff_t>(span.end));
}

// Removes, doubles or moves one entry of the header and puts the counts right again.
void change_entries(Bytes &bytes, const fuzz::Spans &spans, Random &random) {
    const bool key = !spans.keys.empty() && (spans.tensors.empty() || random.one_in(2));
    const std::vector<fuzz::Span> &entries = key ? spans.keys : spans.tensors;
    if (entries.empty()) {
        return;
    }
    const size_t count_at = key ? 16 : 8;
    const uint64_t count = get(bytes, count_at, 8);
    const fuzz::Span entry = entries[random.below(entries.size())];
    const fuzz::Span other = entries[random.below(entries.size())];
    switch (random.below(3)) {
        case 0:
            put(bytes, count_at, count - 1, 8);
            splice(bytes, spans, entry.begin, entry.end, {});
            break;
        case 1:
            put(bytes, count_at, count + 1, 8);
            splice(bytes, spans, other.begin, other.begin, part(bytes, entry));
            break;
        default: // one in the place of another, which is there twice then
            splice(bytes, spans, other.begin, other.end, part(bytes, entry));
    }
}

void append(Bytes &bytes, uint64_t value, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        bytes.push_back(static_cast<uint8_t>(value >> (8 * i)));
    }
}

void append(Bytes &bytes, const std::string &text) {
    append(bytes, text.size(), 8);
    bytes.insert(bytes.end(), text.begin(), text.end());
}

// The type and a small value of it.
Bytes any_value(Random &random) {
    static constexpr size_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    const size_t type = random.below(std::size(sizes));
    const bool array = type == 9 || random.one_in(4);
    const size_t element = type == 9 ? 5 : type;
    const size_t n = array ? random.below(4) : 1;
    Bytes out;
    if (array) {
        append(out, 9, 4);
    }
    append(out, element, 4);
    if (array) {
        append(out, n, 8);
    }
    for (size_t i = 0; i < n; ++i) {
        if (element == 8) {
            append(out, std::string(random.below(3), 'x'));
        } else {
            append(out, random.one_in(4) ? random.next() : random.below(64), sizes[element]);
        }
    }
    return out;
}

// A key gets a value of any type; or a key that matters is added.
void change_value(Bytes &bytes, const fuzz::Spans &spans, Random &random) {
    static const char *const names[] = {"split.count",
                                        "split.no",
                                        "split.tensors.count",
                                        "general.alignment",
                                        "diffusion.infill_mode",
                                        "diffusion.eos_token_ids",
                                        "diffusion-gemma.attention.value_length",
                                        "diffusion-gemma.attention.shared_kv_layers"};
    if (spans.keys.empty()) {
        return;
    }
    const fuzz::Span key = spans.keys[random.below(spans.keys.size())];
    Bytes value = any_value(random);
    if (random.one_in(3)) {
        Bytes entry;
        append(entry, std::string(names[random.below(std::size(names))]));
        entry.insert(entry.end(), value.begin(), value.end());
        put(bytes, 16, get(bytes, 16, 8) + 1, 8);
        splice(bytes, spans, key.begin, key.begin, entry);
    } else {
        splice(bytes, spans, key.begin + 8 + get(bytes, key.begin, 8), key.end, value);
    }
}

// A tensor gets another name, or another shape or type of as many bytes: what follows stays where it is.
void change_tensor(Bytes &bytes, const fuzz::Spans &spans, Random &random) {
    static const char *const names[] = {"output.weight",
                                        "blk.0.attn_v.weight",
                                        "blk.1.attn_v.weight",
                                        "blk.0.ffn_gate_exps.weight",
                                        "blk.0.ffn_up_exps.weight",
                                        "blk.0.attn_q.scale",
                                        "rope_freqs.weight",
                                        "token_embd.weight"};
    if (spans.tensors.empty()) {
        return;
    }
    const fuzz::Span tensor = spans.tensors[random.below(spans.tensors.size())];
    const size_t name_end = tensor.begin + 8 + get(bytes, tensor.begin, 8);
    const uint64_t n_dims = get(bytes, name_end, 4);
    const size_t type_at = name_end + 4 + n_dims * 8;
    switch (random.below(3)) {
        case 0: {
            Bytes name;
            append(name, std::string(names[random.below(std::size(names))]));
            splice(bytes, spans, tensor.begin, name_end, name);
            break;
        }
        case 1: {
            static constexpr uint64_t halves[] = {1, 25, 30}; // F16, I16, BF16
            static constexpr uint64_t wholes[] = {0, 26};     // F32, I32
            const uint64_t type = get(bytes, type_at, 4);
            put(bytes, type_at, type == 0 || type == 26 ? wholes[random.below(2)] : halves[random.below(3)], 4);
            break;
        }
        default:
            if (n_dims >= 2) {
                const uint64_t first = get(bytes, name_end + 4, 8);
                const uint64_t second = get(bytes, name_end + 12, 8);
                const bool swap = random.one_in(2) || second % 2 != 0;
                put(bytes, name_end + 4, swap ? second : first * 2, 8);
                put(bytes, name_end + 12, swap ? first : second / 2, 8);
            }
    }
}

// The array of this key gets another length, with as many elements as it says.
void resize_array(Bytes &bytes, const fuzz::Spans &spans, Random &random) {
    std::vector<size_t> counts;
    for (size_t i = 1; i + 1 < spans.fields.size(); ++i) {
        const Field &next = spans.fields[i + 1];
        if (spans.fields[i].kind == Kind::COUNT && spans.fields[i - 1].kind == Kind::ARRAY_TYPE &&
            (next.kind == Kind::INTEGER || next.kind == Kind::REAL)) {
            counts.push_back(i);
        }
    }
    if (counts.empty()) {
        return;
    }
    const size_t at = counts[random.below(counts.size())];
    const Field &count = spans.fields[at];
    const Field &element = spans.fields[at + 1];
    const uint64_t n = get(bytes, count.begin, 8);
    if (random.one_in(2) && n > 0) {
        put(bytes, count.begin, n - 1, 8);
        splice(bytes, spans, element.begin, element.begin + element.size, {});
    } else {
        put(bytes, count.begin, n + 1, 8);
        splice(bytes, spans, element.begin, element.begin, Bytes(element.size, 1));
    }
}

void mutate_once(Bytes &bytes, Random &random) {
    const fuzz::Spans spans = fuzz::SpanReader(bytes.data(), bytes.size()).read();
    switch (random.below(16)) {
        case 0: // a byte anywhere
            if (!bytes.empty()) {
                bytes[random.below(bytes.size())] = static_cast<uint8_t>(random.next());
            }
            break;
        case 1: // cut, mostly inside the header
            bytes.resize(random.below((random.one_in(3) ? bytes.size() : std::min(bytes.size(), spans.end)) + 1));
            break;
        case 2: // longer
            bytes.insert(bytes.end(), random.below(4096), static_cast<uint8_t>(random.next()));
            break;
        case 3: change_entries(bytes, spans, random); break;
        case 4: change_value(bytes, spans, random); break;
        case 5: change_tensor(bytes, spans, random); break;
        case 6: resize_array(bytes, spans, random); break;
        case 7: { // a field of a rare kind: the vocabulary's strings outnumber all else
            std::vector<Field> rare;
            for (const Field &field : spans.fields) {
                if (field.kind != Kind::TEXT && field.kind != Kind::LENGTH) {
                    rare.push_back(field);
                }
            }
            if (!rare.empty()) {
                change_field(bytes, rare[random.below(rare.size())], random);
            }
            break;
        }
        case 8:
        case 9:
        case 10: // a value of a key: the last field of an entry
            if (!spans.keys.empty()) {
                const size_t end = spans.keys[random.below(spans.keys.size())].end;
                for (const Field &field : spans.fields) {
                    if (field.begin + field.size == end) {
                        change_field(bytes, field, random);
                    }
                }
            }
            break;
        default: { // a field of a tensor, or any
            const size_t first = spans.tensors.empty() || random.one_in(3) ? 0 : spans.tensors[0].begin;
            std::vector<Field> fields;
            for (const Field &field : spans.fields) {
                if (field.begin >= first) {
                    fields.push_back(field);
                }
            }
            if (!fields.empty()) {
                change_field(bytes, fields[random.below(fields.size())], random);
            }
        }
    }
}

} // namespace

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static MemoryFile file;
    std::string path = file.path();
    const size_t first = second_part(data, size);
    if (first == size) {
        file.write(data, size);
    } else {
        static const SplitFiles files;
        files.write(1, data, first);
        files.write(2, data + first, size - first);
        path = files.path(1);
    }
    uint64_t sum = size;
    for (size_t i = 0; i < size; i += 61) {
        sum = sum * 31 + data[i];
    }
    dg_model_options options = dg_model_options_default();
    options.use_mmap = sum % 4 != 0;
    char err[512];
    dg_model *model = nullptr;
    const dg_status status = dg_model_open(&model, path.c_str(), &options, err, sizeof err);
    expect((status == DG_OK) == (model != nullptr), "a model comes with DG_OK and with nothing else");
    if (status != DG_ERROR_IO || first == size) { // parts that do not exist
        expect_status(status, err, {DG_ERROR_FORMAT, DG_ERROR_UNSUPPORTED, DG_ERROR_MEMORY});
    }
    if (model) {
        look_inside(model);
        if (sum / 4 % 4 == 0) { // computing takes ten times as long as opening
            compute(model);
        }
        dg_model_free(model);
    } else if (first == size) {
        adapt(data, size, path.c_str(), sum / 16);
    }
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    Random random(seed);
    const size_t first = second_part(data, size);
    Bytes bytes(data, data + first);
    Bytes other(data + first, data + size);
    do {
        mutate_once(other.empty() || random.one_in(2) ? bytes : other, random);
    } while (random.one_in(2));
    bytes.insert(bytes.end(), other.begin(), other.end());
    bytes.resize(std::min(bytes.size(), max_size));
    std::copy(bytes.begin(), bytes.end(), data);
    return bytes.size();
}
