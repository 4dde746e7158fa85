// Files by their headers: dg_file.
#include "api/boundary.h"
#include "file/gguf_head.h"
#include "model/file_figures.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

using namespace dg::api;

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
