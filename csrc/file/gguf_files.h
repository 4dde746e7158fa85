// The files that a model is read from: their headers, and the weights, mapped or in memory.
#pragma once

#include "file/file_map.h"
#include "file/gguf_head.h"

#include "ggml-cpp.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dg {

// A tensor and where its bytes lie: inside `buffer`, which wraps the whole file that holds it. `tensor` has its name,
// type and shape; it is bound to no buffer yet.
struct FileTensor {
    ggml_tensor *tensor;
    const unsigned char *data;
    ggml_backend_buffer_t buffer;
};

// Throws DG_ERROR_IO, DG_ERROR_MEMORY, or DG_ERROR_FORMAT as GgufHead does.
class GgufFiles {
  public:
    // `path`: as GgufHead takes it. `map`: map the files instead of reading them into memory.
    GgufFiles(const std::string &path, bool map);

    const GgufHead &head() const { return head_; }
    // In the order of the files.
    const std::vector<FileTensor> &tensors() const { return tensors_; }
    // Null when there is none of that name.
    const FileTensor *find(const std::string &name) const;
    // Of all tensors.
    size_t n_bytes() const { return n_bytes_; }
    bool mapped() const { return mapped_; }
    // Throws DG_ERROR_IO when a mapped file was cut or written to since it was opened: when the system notes a change,
    // and the samples are not what they were.
    void check_unchanged() const;
    // A hash of every tensor's name, type, shape and samples.
    uint64_t samples() const;

  private:
    bool mapped_;
    std::vector<std::unique_ptr<FileBytes>> files_; // one for each part
    GgufHead head_;
    ggml_context_ptr headers_; // the tensors, without their bytes
    std::vector<ggml_backend_buffer_ptr> buffers_;
    std::vector<FileTensor> tensors_;
    size_t n_bytes_ = 0;
    std::vector<uint64_t> samples_;                                   // of each part, as it was opened
    std::vector<std::unique_ptr<std::atomic<int64_t>>> last_changes_; // up to which they were the same

    uint64_t samples_of(size_t part) const;
};

} // namespace dg
