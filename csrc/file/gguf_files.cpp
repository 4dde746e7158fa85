#include "file/gguf_files.h"

#include "base/error.h"

#include "ggml-backend.h"

namespace dg {

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
}

const FileTensor *GgufFiles::find(const std::string &name) const {
    const int64_t found = head_.find(name);
    return found < 0 ? nullptr : &tensors_[static_cast<size_t>(found)];
}

void GgufFiles::check_unchanged() const {
    for (const auto &file : files_) {
        file->check_unchanged();
    }
}

} // namespace dg
