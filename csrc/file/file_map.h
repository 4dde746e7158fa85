// The engine's only window on the operating system's files: everything POSIX-only or Windows-only is in file_map.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace dg {

// Bytes that can be read at any place: a file here, or wherever a caller has one.
class ByteSource {
  public:
    virtual ~ByteSource() = default;
    virtual uint64_t size() const = 0;
    // `n` bytes from `offset` on, all of them before the end. Throws DG_ERROR_IO.
    virtual void read(uint64_t offset, void *out, size_t n) const = 0;
};

// A file of which single parts are read.
std::unique_ptr<ByteSource> open_for_reading(const std::string &path);

// A whole file as bytes: mapped read-only and shared, or read into memory of our own. Throws dg::Error (IO, MEMORY).
class FileBytes : public ByteSource {
  public:
    static std::unique_ptr<FileBytes> open(const std::string &path, bool map);
    const unsigned char *data() const { return data_; }
    uint64_t size() const final { return size_; }
    void read(uint64_t offset, void *out, size_t n) const final;
    // When the mapped file, or what is known of it (its times, its mode), was last changed, by the system's own clock,
    // which nobody sets back. Throws dg::Error (IO) when it has another size than it had: pages may be gone, and
    // reading one would end the process. 0 where others cannot write to it: in memory of our own, and on Windows.
    virtual int64_t last_change() const { return 0; }

  protected:
    const unsigned char *data_ = nullptr;
    size_t size_ = 0;
};

// Throws DG_ERROR_IO: others wrote to the mapped file.
[[noreturn]] void fail_changed(const std::string &path);

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
