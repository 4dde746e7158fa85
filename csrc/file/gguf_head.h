// The headers of a model's files, one or all parts of a split one, with one list of tensors over all; no weights.
#pragma once

#include "file/gguf_header.h"

#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

namespace dg {

class GgufHead {
  public:
    struct Part {
        std::string path;
        GgufHeader header;
    };
    struct Tensor {
        const GgufTensor *info;
        size_t part;
    };
    // Opens a part by its path; what it returns is used before the next call.
    using Open = std::function<const ByteSource &(const std::string &path)>;

    // `path` is a whole file, or the first part (NAME-00001-of-0000N.gguf) of a split one, whose other parts are looked
    // for beside it. Throws DG_ERROR_FORMAT for what is no GGUF, is cut short, or is not whole; and what `open` throws.
    GgufHead(const std::string &path, const Open &open);
    GgufHead(const GgufHead &) = delete; // tensors point into parts
    GgufHead &operator=(const GgufHead &) = delete;

    const std::vector<Part> &parts() const { return parts_; }
    // The keys; of a split file those in its first part, the only one that has any besides split.*.
    const GgufHeader &keys() const { return parts_.front().header; }
    // In the order of the files.
    const std::vector<Tensor> &tensors() const { return tensors_; }
    // The index in `tensors` of the one of that name; -1 when there is none.
    int64_t find(const std::string &name) const;

    // Throws DG_ERROR_FORMAT, which says what the file is and what it is for, unless it holds a model of our
    // architecture.
    void require_model() const;

  private:
    std::vector<Part> parts_;
    std::vector<Tensor> tensors_;
    std::unordered_map<std::string, size_t> index_; // into tensors_

    void add_part(const std::string &path, const Open &open);
    int32_t count_parts(const std::string &path) const;
};

} // namespace dg
