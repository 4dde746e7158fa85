#include "file/gguf_files.h"

#include "base/error.h"
#include "base/log_capture.h"
#include "file/gguf_header.h"
#include "file/gguf_keys.h"
#include "file/names.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <cstring>

namespace dg {
namespace {

// The names of parts count in five digits.
constexpr int32_t MAX_PARTS = 99999;

[[noreturn]] void fail_format(const std::string &path, const std::string &what) {
    throw Error(DG_ERROR_FORMAT, path + ": " + what);
}

std::string part_suffix(int32_t index, int32_t count) { return format("-%05d-of-%05d.gguf", index + 1, count); }

} // namespace

GgufFiles::GgufFiles(const std::string &path, bool map) : mapped_(map) {
    add_part(path);
    add_other_parts(path);
}

const FileTensor *GgufFiles::find(const std::string &name) const {
    const auto found = index_.find(name);
    return found == index_.end() ? nullptr : &tensors_[found->second];
}

void GgufFiles::check_unchanged() const {
    for (const Part &part : parts_) {
        part.file->check_unchanged();
    }
}

void GgufFiles::add_part(const std::string &path) {
    Part part;
    part.file = FileBytes::open(path, mapped_);
    const FileBytes &file = *part.file;
    if (file.size() == 0) {
        fail_format(path, "the file is empty");
    }
    if (file.size() < 4 || std::memcmp(file.data(), "GGUF", 4) != 0) {
        fail_format(path, "not a GGUF file (its first four bytes are not \"GGUF\")");
    }
    check_gguf_header(file.data(), file.size(), path);
    LogCapture log;
    ggml_context *context = nullptr;
    gguf_init_params params = {};
    params.no_alloc = true;
    params.ctx = &context;
    part.gguf.reset(gguf_init_from_buffer(file.data(), file.size(), params));
    part.headers.reset(context);
    if (!part.gguf) {
        fail_format(path, "broken GGUF header: " + log.last_line("truncated or damaged"));
    }
    part.buffer.reset(ggml_backend_cpu_buffer_from_ptr(const_cast<unsigned char *>(file.data()), file.size()));
    if (!part.buffer) {
        throw Error(DG_ERROR_INTERNAL, path + ": ggml refused the weights' buffer");
    }
    ggml_backend_buffer_set_usage(part.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    add_tensors(path, part);
    parts_.push_back(std::move(part));
}

void GgufFiles::add_tensors(const std::string &path, const Part &part) {
    const gguf_context *g = part.gguf.get();
    const size_t size = part.file->size();
    const size_t start = gguf_get_data_offset(g);
    for (int64_t i = 0; i < gguf_get_n_tensors(g); ++i) {
        const char *name = gguf_get_tensor_name(g, i);
        const size_t offset = gguf_get_tensor_offset(g, i);
        const size_t bytes = gguf_get_tensor_size(g, i);
        if (start > size || offset > size - start || bytes > size - start - offset) {
            fail_format(path, format("tensor %s lies at bytes %zu to %zu, but the file ends at %zu: it is truncated",
                                     name, start + offset, start + offset + bytes, size));
        }
        if (!index_.emplace(name, tensors_.size()).second) {
            fail_format(path, format("tensor %s is in another part of the model as well", name));
        }
        tensors_.push_back(
            {ggml_get_tensor(part.headers.get(), name), part.file->data() + start + offset, part.buffer.get()});
        n_bytes_ += bytes;
    }
}

void GgufFiles::add_other_parts(const std::string &path) {
    const GgufKeys first(path, keys());
    const int32_t count = first.integer_or(names::KEY_SPLIT_COUNT, 1, MAX_PARTS, 1);
    if (count == 1) {
        return;
    }
    const int32_t index = first.integer(names::KEY_SPLIT_NO, 0, count - 1);
    const std::string suffix = part_suffix(index, count);
    const bool named =
        path.size() > suffix.size() && path.compare(path.size() - suffix.size(), suffix.size(), suffix) == 0;
    if (!named) {
        fail_format(path, format("this is part %d of a model in %d files, whose name must end in %s for the others to "
                                 "be found",
                                 index + 1, count, suffix.c_str()));
    }
    const std::string stem = path.substr(0, path.size() - suffix.size());
    if (index != 0) {
        fail_format(path, format("this is part %d of a model in %d files: open the first, %s", index + 1, count,
                                 (stem + part_suffix(0, count)).c_str()));
    }
    for (int32_t i = 1; i < count; ++i) {
        const std::string other = stem + part_suffix(i, count);
        try {
            add_part(other);
        } catch (const Error &error) {
            if (error.status() != DG_ERROR_IO) {
                throw;
            }
            throw Error(DG_ERROR_IO,
                        format("%s (part %d of the %d that the model is split into)", error.what(), i + 1, count));
        }
        const GgufKeys keys(other, parts_.back().gguf.get());
        keys.integer(names::KEY_SPLIT_NO, i, i);
        keys.integer(names::KEY_SPLIT_COUNT, count, count);
    }
    const auto n_tensors = static_cast<int64_t>(tensors_.size());
    const int32_t expected = first.integer(names::KEY_SPLIT_TENSORS_COUNT, 0, INT32_MAX);
    if (expected != n_tensors) {
        fail_format(path,
                    format("its %d parts hold %lld tensors, but key %s is %d: parts of different models are mixed",
                           count, static_cast<long long>(n_tensors), names::KEY_SPLIT_TENSORS_COUNT, expected));
    }
}

} // namespace dg
