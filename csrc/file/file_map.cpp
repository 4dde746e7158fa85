#include "file/file_map.h"

#include "base/error.h"
#include "base/process.h"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <new>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX // MinGW's C++ headers have it
#        define NOMINMAX
#    endif
#    include <io.h>
#    include <process.h>
#    include <windows.h>
#else
#    include <fcntl.h>
#    include <sys/mman.h>
#    include <sys/stat.h>
#    include <unistd.h>
#endif

namespace dg {
namespace {

[[noreturn]] void fail_io(const std::string &path, const char *what) {
    throw Error(DG_ERROR_IO, format("%s: %s: %s", path.c_str(), what, std::strerror(errno)));
}

#ifdef _WIN32
// Paths are UTF-8; the calls that take bytes would read them in the system's code page.
std::wstring wide(const std::string &text) {
    const int size = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text.c_str(), -1, nullptr, 0);
    if (size <= 0) {
        throw Error(DG_ERROR_IO, format("%s: the path is not UTF-8", text.c_str()));
    }
    std::wstring result(static_cast<size_t>(size), L'\0');
    MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text.c_str(), -1, result.data(), size);
    result.pop_back(); // the NUL
    return result;
}

// What the system says of an error of its own calls, which leave nothing in errno.
std::string reason_of(DWORD error) {
    wchar_t text[256];
    const DWORD length =
        FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS | FORMAT_MESSAGE_MAX_WIDTH_MASK,
                       nullptr, error, 0, text, static_cast<DWORD>(std::size(text)), nullptr);
    char bytes[3 * std::size(text) + 1];
    const int size =
        WideCharToMultiByte(CP_UTF8, 0, text, static_cast<int>(length), bytes, sizeof bytes, nullptr, nullptr);
    std::string reason(bytes, static_cast<size_t>(size));
    reason.erase(reason.find_last_not_of(" .") + 1);
    return format("%s (error %lu)", reason.empty() ? "no reason told" : reason.c_str(), error);
}

[[noreturn]] void fail_system(const std::string &path, const char *what, DWORD error) {
    const bool refused =
        error == ERROR_NOT_ENOUGH_MEMORY || error == ERROR_OUTOFMEMORY || error == ERROR_COMMITMENT_LIMIT;
    throw Error(refused ? DG_ERROR_MEMORY : DG_ERROR_IO,
                format("%s: %s: %s", path.c_str(), what, reason_of(error).c_str()));
}

// Reading a console or a pipe would wait for somebody to write.
void require_regular(const std::string &path, HANDLE file) {
    if (GetFileType(file) != FILE_TYPE_DISK) {
        throw Error(DG_ERROR_IO, format("%s: not a regular file", path.c_str()));
    }
}

std::FILE *open_file(const std::string &path, const char *mode) {
    return _wfopen(wide(path).c_str(), wide(mode).c_str());
}

void remove_file(const std::string &path) { _wremove(wide(path).c_str()); }

// Refused while somebody else has the file open or is putting another in its place, which two threads may do at once:
// tried for half a second.
std::string replace_file(const std::string &from, const std::string &to) {
    const std::wstring source = wide(from);
    const std::wstring target = wide(to);
    for (int tries = 50;; --tries) {
        if (MoveFileExW(source.c_str(), target.c_str(), MOVEFILE_REPLACE_EXISTING)) {
            return "";
        }
        const DWORD error = GetLastError();
        if (tries == 0 || (error != ERROR_ACCESS_DENIED && error != ERROR_SHARING_VIOLATION)) {
            return reason_of(error);
        }
        Sleep(10);
    }
}
#else
std::FILE *open_file(const std::string &path, const char *mode) { return std::fopen(path.c_str(), mode); }

void remove_file(const std::string &path) { std::remove(path.c_str()); }

// Why not; empty when it was.
std::string replace_file(const std::string &from, const std::string &to) {
    return std::rename(from.c_str(), to.c_str()) == 0 ? "" : std::strerror(errno);
}
#endif

// An open file with its size.
class OpenFile final : public ByteSource {
  public:
    explicit OpenFile(const std::string &path) : path_(path) {
#ifndef _WIN32
        struct stat status = {};
        if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) { // opening a pipe would wait for a writer
            throw Error(DG_ERROR_IO, format("%s: not a regular file", path.c_str()));
        }
#endif
        file_.reset(open_file(path, "rb"));
        if (!file_) {
            fail_io(path, "cannot open");
        }
#ifdef _WIN32
        require_regular(path, reinterpret_cast<HANDLE>(_get_osfhandle(_fileno(file_.get()))));
        const int seek_failed = _fseeki64(file_.get(), 0, SEEK_END);
        const long long end = _ftelli64(file_.get());
#else
        const int seek_failed = fseeko(file_.get(), 0, SEEK_END);
        const off_t end = ftello(file_.get());
#endif
        if (seek_failed || end < 0) {
            fail_io(path, "cannot find its size");
        }
        size_ = static_cast<uint64_t>(end);
    }
    uint64_t size() const override { return size_; }
    void read(uint64_t offset, void *out, size_t n) const override {
#ifdef _WIN32
        const int seek_failed = _fseeki64(file_.get(), static_cast<long long>(offset), SEEK_SET);
#else
        const int seek_failed = fseeko(file_.get(), static_cast<off_t>(offset), SEEK_SET);
#endif
        if (seek_failed || std::fread(out, 1, n, file_.get()) != n) {
            if (seek_failed || std::ferror(file_.get())) {
                fail_io(path_, "cannot read");
            }
            throw Error(DG_ERROR_IO, format("%s: it was cut while it was read", path_.c_str()));
        }
    }

  private:
    struct Close {
        void operator()(std::FILE *file) const { std::fclose(file); }
    };
    std::string path_;
    std::unique_ptr<std::FILE, Close> file_;
    uint64_t size_ = 0;
};

class ReadFile final : public FileBytes {
  public:
    explicit ReadFile(const std::string &path) {
        const OpenFile file(path);
        size_ = static_cast<size_t>(file.size());
        check_memory(path + ": the file", size_);
        bytes_.reset(static_cast<unsigned char *>(::operator new(size_ ? size_ : 1, ALIGNMENT, std::nothrow)));
        if (!bytes_) {
            throw Error(DG_ERROR_MEMORY, format("%s: %zu bytes of memory were refused", path.c_str(), size_));
        }
#ifdef MADV_HUGEPAGE
        madvise(bytes_.get(), size_ / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); // refused: small pages, as without it
#endif
        file.read(0, bytes_.get(), size_);
        data_ = bytes_.get();
    }

  private:
    // The best steps of Q8_0 at 724 M parameters take 0.97 of the time that they take on pages of 4 KB (docs/SPEED.md).
    static constexpr size_t HUGE_PAGE = 2 << 20;
    // ggml wants weights on 32-byte boundaries; a GGUF's tensors are aligned relative to the start of the file.
    static constexpr std::align_val_t ALIGNMENT{HUGE_PAGE};
    struct Delete {
        void operator()(unsigned char *bytes) const { ::operator delete(bytes, ALIGNMENT); }
    };
    std::unique_ptr<unsigned char, Delete> bytes_;
};

class MappedFile final : public FileBytes {
  public:
#ifdef _WIN32
    // Others may read the file, and nobody may write to it, cut it, replace it or remove it as long as this handle is
    // open: the mapping alone would not keep a writer out.
    explicit MappedFile(const std::string &path)
        : file_(CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING, 0, nullptr)) {
        if (file_.handle == INVALID_HANDLE_VALUE) {
            fail_system(path, "cannot open", GetLastError());
        }
        require_regular(path, file_.handle);
        LARGE_INTEGER size = {};
        if (!GetFileSizeEx(file_.handle, &size)) {
            fail_system(path, "cannot find its size", GetLastError());
        }
        size_ = static_cast<size_t>(size.QuadPart);
        if (size_ == 0) { // there is no mapping of nothing
            return;
        }
        const Handle mapping(CreateFileMappingW(file_.handle, nullptr, PAGE_READONLY, 0, 0, nullptr));
        if (!mapping.handle) {
            fail_system(path, "cannot map", GetLastError());
        }
        data_ = static_cast<const unsigned char *>(MapViewOfFile(mapping.handle, FILE_MAP_READ, 0, 0, 0));
        if (!data_) {
            fail_system(path, "cannot map", GetLastError());
        }
    }
    ~MappedFile() override {
        if (data_) {
            UnmapViewOfFile(data_);
        }
    }

  private:
    // Closes itself when the constructor throws, too.
    struct Handle {
        explicit Handle(HANDLE opened) : handle(opened) {}
        Handle(const Handle &) = delete;
        Handle &operator=(const Handle &) = delete;
        ~Handle() {
            if (handle && handle != INVALID_HANDLE_VALUE) {
                CloseHandle(handle);
            }
        }
        const HANDLE handle;
    };

    Handle file_;

  public:
#else
    explicit MappedFile(const std::string &path)
        : path_(path), file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
        if (file_.fd < 0) {
            fail_io(path, "cannot open");
        }
        if (::fstat(file_.fd, &opened_) != 0) {
            fail_io(path, "cannot stat");
        }
        if (!S_ISREG(opened_.st_mode)) {
            throw Error(DG_ERROR_IO, format("%s: not a regular file", path.c_str()));
        }
        size_ = static_cast<size_t>(opened_.st_size);
        if (size_ > 0) {
            void *address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_.fd, 0);
            if (address == MAP_FAILED) {
                if (errno == ENOMEM) {
                    throw Error(DG_ERROR_MEMORY,
                                format("%s: %zu bytes of address space were refused", path.c_str(), size_));
                }
                fail_io(path, "cannot map");
            }
            data_ = static_cast<const unsigned char *>(address);
        }
    }
    ~MappedFile() override {
        if (data_) {
            ::munmap(const_cast<unsigned char *>(data_), size_);
        }
    }
    int64_t last_change() const override {
        struct stat now = {};
        if (::fstat(file_.fd, &now) != 0 || now.st_size != opened_.st_size) {
            fail_changed(path_);
        }
#    ifdef __APPLE__
        return int64_t{now.st_ctimespec.tv_sec} * 1'000'000'000 + now.st_ctimespec.tv_nsec;
#    else
        return int64_t{now.st_ctim.tv_sec} * 1'000'000'000 + now.st_ctim.tv_nsec;
#    endif
    }

  private:
    // Closes itself when the constructor throws, too.
    struct Descriptor {
        explicit Descriptor(int opened) : fd(opened) {}
        Descriptor(const Descriptor &) = delete;
        Descriptor &operator=(const Descriptor &) = delete;
        ~Descriptor() {
            if (fd >= 0) {
                ::close(fd);
            }
        }
        const int fd;
    };

    std::string path_;
    Descriptor file_; // stays open, for last_change
    struct stat opened_ = {};

  public:
#endif
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;
};

} // namespace

std::unique_ptr<ByteSource> open_for_reading(const std::string &path) { return std::make_unique<OpenFile>(path); }

void FileBytes::read(uint64_t offset, void *out, size_t n) const {
    if (n > 0) {
        std::memcpy(out, data_ + offset, n);
    }
}

void fail_changed(const std::string &path) {
    throw Error(DG_ERROR_IO, path +
                                 ": it was changed after it was opened: open it again, and with use_mmap off if it is "
                                 "written to in place");
}

std::unique_ptr<FileBytes> FileBytes::open(const std::string &path, bool map) {
    if (map) {
        return std::make_unique<MappedFile>(path);
    }
    return std::make_unique<ReadFile>(path);
}

AtomicFile::AtomicFile(const std::string &path) : path_(path) {
#ifdef _WIN32
    const int process = _getpid();
#else
    const auto process = static_cast<int>(::getpid());
#endif
    static std::atomic<unsigned> count{0}; // two threads of a process may write to one path
    temporary_ = path + format(".tmp%d-%u", process, count.fetch_add(1));
    file_ = open_file(temporary_, "wb");
    if (!file_) {
        fail_io(path_, "cannot write");
    }
}

AtomicFile::~AtomicFile() {
    if (file_) {
        std::fclose(file_);
        remove_file(temporary_);
    }
}

void AtomicFile::write(const void *data, size_t size) {
    if (size > 0 && std::fwrite(data, 1, size, file_) != size) {
        fail_io(path_, "cannot write");
    }
}

void AtomicFile::commit() {
    if (std::fflush(file_) != 0) {
        fail_io(path_, "cannot write");
    }
#ifdef _WIN32
    const bool synced = _commit(_fileno(file_)) == 0;
#else
    const bool synced = ::fsync(fileno(file_)) == 0;
#endif
    if (!synced) {
        fail_io(path_, "cannot write");
    }
    std::FILE *file = file_;
    file_ = nullptr;
    const bool closed = std::fclose(file) == 0;
    const std::string reason = closed ? replace_file(temporary_, path_) : std::strerror(errno);
    if (!reason.empty()) {
        remove_file(temporary_);
        throw Error(DG_ERROR_IO, format("%s: cannot write: %s", path_.c_str(), reason.c_str()));
    }
}

} // namespace dg
