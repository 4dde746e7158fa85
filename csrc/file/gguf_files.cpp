#include "file/gguf_files.h"

#include "base/error.h"
#include "base/hash.h"

#include "ggml-backend.h"

#include <algorithm>
#include <numeric>

namespace dg {
namespace {

// What is looked at of a tensor, to tell files apart: all of a small one, so that no scale or norm is left out, else
// the first and the last bytes. Of the released model 8 KB each of 692 tensors, 8 ms.
constexpr size_t WHOLE_SAMPLE = 1 << 16;
constexpr size_t SAMPLE = 1 << 12;

} // namespace

GgufFiles::GgufFiles(const std::string &path, bool map)
    : mapped_(map), head_(path, [this](const std::string &part) -> const ByteSource & {
          files_.push_back(FileBytes::open(part, mapped_));
          return *files_.back();
      }) {
    for (const auto &file : files_) {
        buffers_.emplace_back(
            ggml_backend_cpu_buffer_from_ptr(const_cast<unsigned char *>(file->data()), file->size()));
        if (!buffers_.back()) {
            throw Error(DG_ERROR_INTERNAL, path + ": ggml refused the weights' buffer");
        }
        ggml_backend_buffer_set_usage(buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    ggml_init_params params = {};
    params.mem_size = (head_.tensors().size() + 1) * ggml_tensor_overhead();
    params.no_alloc = true;
    headers_.reset(ggml_init(params));
    if (!headers_) {
        throw Error(DG_ERROR_MEMORY, format("%s: %zu bytes of memory were refused", path.c_str(), params.mem_size));
    }
    for (const GgufHead::Tensor &found : head_.tensors()) {
        const GgufTensor &info = *found.info;
        ggml_tensor *tensor = ggml_new_tensor(headers_.get(), static_cast<ggml_type>(info.type),
                                              info.n_dims == 0 ? 1 : info.n_dims, info.ne.data());
        ggml_set_name(tensor, info.name.c_str());
        tensors_.push_back({tensor, files_[found.part]->data() + info.offset, buffers_[found.part].get()});
        n_bytes_ += info.n_bytes;
    }
    for (size_t part = 0; part < files_.size(); ++part) {
        last_changes_.push_back(std::make_unique<std::atomic<int64_t>>(files_[part]->last_change()));
        samples_.push_back(samples_of(part));
    }
}

const FileTensor *GgufFiles::find(const std::string &name) const {
    const int64_t found = head_.find(name);
    return found < 0 ? nullptr : &tensors_[static_cast<size_t>(found)];
}

void GgufFiles::check_unchanged() const {
    for (size_t part = 0; part < files_.size(); ++part) {
        const int64_t change = files_[part]->last_change();
        if (change == last_changes_[part]->load(std::memory_order_relaxed)) {
            continue;
        }
        if (samples_of(part) != samples_[part]) {
            fail_changed(head_.parts()[part].path);
        }
        last_changes_[part]->store(change, std::memory_order_relaxed);
    }
}

uint64_t GgufFiles::samples_of(size_t part) const {
    uint64_t sum = 0; // whatever the parts that they are in
    for (size_t i = 0; i < tensors_.size(); ++i) {
        if (head_.tensors()[i].part != part) {
            continue;
        }
        Hash hash;
        const FileTensor &found = tensors_[i];
        const size_t size = ggml_nbytes(found.tensor);
        hash.add(std::string(ggml_get_name(found.tensor)));
        hash.add(static_cast<int32_t>(found.tensor->type));
        for (const int64_t n : found.tensor->ne) {
            hash.add(n);
        }
        hash.add(found.data, std::min(size, SAMPLE));
        if (size > SAMPLE) {
            const size_t rest = std::min(size - SAMPLE, size > WHOLE_SAMPLE ? SAMPLE : WHOLE_SAMPLE);
            hash.add(found.data + size - rest, rest);
        }
        sum += hash.value();
    }
    return sum;
}

uint64_t GgufFiles::samples() const { return std::accumulate(samples_.begin(), samples_.end(), uint64_t{0}); }

} // namespace dg
