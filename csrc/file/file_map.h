// The engine's only window on the operating system's files: everything POSIX-only or Windows-only is in file_map.cpp.
#pragma once

#include <cstddef>
#include <cstdio>
#include <memory>
#include <string>

namespace dg {

// A whole file as bytes: mapped read-only and shared, or read into memory of our own. Throws dg::Error (IO, MEMORY).
class FileBytes {
  public:
    static std::unique_ptr<FileBytes> open(const std::string &path, bool map);
    virtual ~FileBytes() = default;
    const unsigned char *data() const { return data_; }
    size_t size() const { return size_; }
    // Throws dg::Error (IO) when the mapped file was cut or written to since it was opened: its pages may be gone, and
    // reading one would end the process. Where the system keeps others from writing (Windows), there is nothing to do.
    virtual void check_unchanged() const {}

  protected:
    const unsigned char *data_ = nullptr;
    size_t size_ = 0;
};

// A file that appears under its final name only when commit() succeeds; dropped without it, nothing is left behind.
class AtomicFile {
  public:
    explicit AtomicFile(const std::string &path);
    ~AtomicFile();
    AtomicFile(const AtomicFile &) = delete;
    AtomicFile &operator=(const AtomicFile &) = delete;
    void write(const void *data, size_t size);
    void commit();

  private:
    std::string path_;
    std::string temporary_;
    std::FILE *file_ = nullptr;
};

} // namespace dg
