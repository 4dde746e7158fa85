// The files that a model is read from: one GGUF, or the parts of a split one, with one list of tensors over all.
#pragma once

#include "file/file_map.h"

#include "ggml-cpp.h"

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace dg {

// A tensor and where its bytes lie: inside `buffer`, which wraps the whole file that holds it. `tensor` has its name,
// type and shape; it is bound to no buffer yet.
struct FileTensor {
    ggml_tensor *tensor;
    const unsigned char *data;
    ggml_backend_buffer_t buffer;
};

// Throws DG_ERROR_IO, DG_ERROR_MEMORY, or DG_ERROR_FORMAT for what is no GGUF, is cut short, or is not whole.
class GgufFiles {
  public:
    // `path` is a whole file, or the first part (NAME-00001-of-0000N.gguf) of a split one, whose other parts are looked
    // for beside it. `map`: map the files instead of reading them into memory.
    GgufFiles(const std::string &path, bool map);

    // The keys; of a split file those in its first part, the only one that has any besides split.*.
    const gguf_context *keys() const { return parts_.front().gguf.get(); }
    // In the order of the files.
    const std::vector<FileTensor> &tensors() const { return tensors_; }
    // Null when there is none of that name.
    const FileTensor *find(const std::string &name) const;
    // Of all tensors.
    size_t n_bytes() const { return n_bytes_; }
    bool mapped() const { return mapped_; }
    // Throws DG_ERROR_IO when a mapped file was cut or written to since it was opened.
    void check_unchanged() const;

  private:
    struct Part {
        std::unique_ptr<FileBytes> file;
        gguf_context_ptr gguf;
        ggml_context_ptr headers; // the tensors, without their bytes
        ggml_backend_buffer_ptr buffer;
    };

    bool mapped_;
    std::vector<Part> parts_;
    std::vector<FileTensor> tensors_;
    std::unordered_map<std::string, size_t> index_; // into tensors_
    size_t n_bytes_ = 0;

    void add_part(const std::string &path);
    void add_tensors(const std::string &path, const Part &part);
    void add_other_parts(const std::string &path);
};

} // namespace dg
