#include "file/gguf_head.h"

#include "base/error.h"
#include "file/gguf_keys.h"
#include "file/names.h"

namespace dg {
namespace {

// The names of parts count in five digits.
constexpr int32_t MAX_PARTS = 99999;

[[noreturn]] void fail_format(const std::string &path, const std::string &what) {
    throw Error(DG_ERROR_FORMAT, path + ": " + what);
}

std::string part_suffix(int32_t index, int32_t count) { return format("-%05d-of-%05d.gguf", index + 1, count); }

} // namespace

GgufHead::GgufHead(const std::string &path, const Open &open) {
    add_part(path, open);
    const int32_t count = count_parts(path);
    parts_.reserve(static_cast<size_t>(count));
    const std::string stem = path.substr(0, path.size() - (count > 1 ? part_suffix(0, count).size() : 0));
    for (int32_t i = 1; i < count; ++i) {
        const std::string other = stem + part_suffix(i, count);
        try {
            add_part(other, open);
        } catch (const Error &error) {
            if (error.status() != DG_ERROR_IO) {
                throw;
            }
            throw Error(DG_ERROR_IO,
                        format("%s (part %d of the %d that the model is split into)", error.what(), i + 1, count));
        }
        const GgufKeys keys(other, parts_.back().header);
        keys.integer(names::KEY_SPLIT_NO, i, i);
        keys.integer(names::KEY_SPLIT_COUNT, count, count);
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
        for (const GgufTensor &tensor : parts_[i].header.tensors()) {
            if (!index_.emplace(tensor.name, tensors_.size()).second) {
                fail_format(parts_[i].path,
                            format("tensor %s is in another part of the model as well", tensor.name.c_str()));
            }
            tensors_.push_back({&tensor, i});
        }
    }
    if (count > 1) {
        const auto n_tensors = static_cast<int64_t>(tensors_.size());
        const int32_t expected = GgufKeys(path, keys()).integer(names::KEY_SPLIT_TENSORS_COUNT, 0, INT32_MAX);
        if (expected != n_tensors) {
            fail_format(path,
                        format("its %d parts hold %lld tensors, but key %s is %d: parts of different models are mixed",
                               count, static_cast<long long>(n_tensors), names::KEY_SPLIT_TENSORS_COUNT, expected));
        }
    }
}

void GgufHead::add_part(const std::string &path, const Open &open) {
    parts_.push_back({path, GgufHeader(open(path), path)});
}

int32_t GgufHead::count_parts(const std::string &path) const {
    const GgufKeys first(path, keys());
    const int32_t count = first.integer_or(names::KEY_SPLIT_COUNT, 1, MAX_PARTS, 1);
    if (count == 1) {
        return 1;
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
    if (index != 0) {
        fail_format(path, format("this is part %d of a model in %d files: open the first, %s", index + 1, count,
                                 (path.substr(0, path.size() - suffix.size()) + part_suffix(0, count)).c_str()));
    }
    return count;
}

int64_t GgufHead::find(const std::string &name) const {
    const auto found = index_.find(name);
    return found == index_.end() ? -1 : static_cast<int64_t>(found->second);
}

void GgufHead::require_model() const {
    const std::string &path = parts_.front().path;
    const GgufKeys keys(path, this->keys());
    const std::string kind = keys.text_or(names::KEY_TYPE, "model");
    if (kind == "imatrix") { // which names no architecture
        fail_format(path, "an importance matrix, not a model: `pydiffgguf convert --imatrix` takes it");
    }
    const std::string architecture = keys.text(names::KEY_ARCHITECTURE);
    if (kind == "mmproj" || architecture == "clip") {
        fail_format(path, "an image encoder (mmproj), not a model: open the model, and give this file with --mmproj");
    }
    if (kind == "adapter") {
        fail_format(path, "a LoRA adapter, not a model: open the model, and give this file with --lora");
    }
    if (architecture != names::ARCHITECTURE) {
        fail_format(path, "general.architecture is \"" + architecture + "\", expected \"" + names::ARCHITECTURE +
                              "\"; other models run in llama.cpp or Ollama");
    }
}

} // namespace dg
