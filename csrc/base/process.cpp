#include "base/process.h"

#include "base/control_groups.h"
#include "base/error.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <process.h>
#    include <windows.h>
#else
#    include <sys/resource.h>
#    include <unistd.h>
#endif

namespace dg {
namespace {

[[maybe_unused]] void lower(MemoryLeft &left, uint64_t bytes, const char *limit) { // macOS tells no limits
    if (bytes < left.bytes) {
        left = {static_cast<size_t>(bytes), limit};
    }
}

#ifdef __linux__

constexpr uint64_t UNKNOWN = UINT64_MAX;

// The number that stands alone in a file; UNKNOWN for "max" and for no file.
uint64_t number_in(const std::string &path) {
    std::ifstream file(path);
    uint64_t value = UNKNOWN;
    return file >> value ? value : UNKNOWN;
}

// The number behind `key` in a file of lines; UNKNOWN without.
uint64_t number_of(const std::string &path, const std::string &key) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.compare(0, key.size(), key) == 0) {
            std::istringstream rest(line.substr(key.size()));
            uint64_t value = UNKNOWN;
            return rest >> value ? value : UNKNOWN;
        }
    }
    return UNKNOWN;
}

uint64_t known_or_zero(uint64_t value) { return value == UNKNOWN ? 0 : value; }

// A control group counts its page cache, which it gives up before it fails.
void lower_by_group(MemoryLeft &left, const std::string &folder, const char *limit_file, const char *usage_file) {
    const uint64_t limit = number_in(folder + limit_file);
    const uint64_t usage = number_in(folder + usage_file);
    if (limit == UNKNOWN || usage == UNKNOWN) {
        return;
    }
    const std::string stat = folder + "/memory.stat";
    const uint64_t cache =
        known_or_zero(number_of(stat, "inactive_file ")) + known_or_zero(number_of(stat, "active_file "));
    const uint64_t held = usage - std::min(usage, cache);
    lower(left, limit - std::min(limit, held), "the control group's limit");
}

void lower_by_groups(MemoryLeft &left) {
    for (const ControlGroup &group : control_groups("memory")) {
        // Inside a container the path may not exist: the root is the container's group then.
        std::string path = group.path;
        for (;; path.erase(path.rfind('/'))) {
            if (group.unified) {
                lower_by_group(left, group.root + path, "/memory.max", "/memory.current");
            } else {
                lower_by_group(left, group.root + path, "/memory.limit_in_bytes", "/memory.usage_in_bytes");
            }
            if (path.empty() || path.rfind('/') == std::string::npos) {
                break;
            }
        }
    }
}

void lower_by_machine(MemoryLeft &left) {
    const uint64_t available = number_of("/proc/meminfo", "MemAvailable:");
    if (available != UNKNOWN) {
        const uint64_t swap = known_or_zero(number_of("/proc/meminfo", "SwapFree:"));
        lower(left, (available + swap) * 1024, "the machine's free memory");
    }
    const auto lower_by_limit = [&left](auto resource, const char *used, const char *name) {
        rlimit limit = {};
        if (::getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
            const uint64_t bytes = known_or_zero(number_of("/proc/self/status", used)) * 1024;
            lower(left, limit.rlim_cur - std::min<uint64_t>(limit.rlim_cur, bytes), name);
        }
    };
    lower_by_limit(RLIMIT_AS, "VmSize:", "RLIMIT_AS");
    lower_by_limit(RLIMIT_DATA, "VmData:", "RLIMIT_DATA");
}

#endif

} // namespace

int64_t process_id() {
#ifdef _WIN32
    return _getpid();
#else
    return ::getpid();
#endif
}

MemoryLeft memory_left() {
    MemoryLeft left = {SIZE_MAX, "no limit"};
#if defined(_WIN32)
    MEMORYSTATUSEX status = {};
    status.dwLength = sizeof status;
    if (GlobalMemoryStatusEx(&status)) {
        lower(left, status.ullAvailPageFile, "the machine's free memory");
    }
#elif defined(__linux__)
    lower_by_machine(left);
    lower_by_groups(left);
#endif
    return left;
}

size_t memory_available() {
    MemoryLeft left = {SIZE_MAX, ""};
#if defined(_WIN32)
    MEMORYSTATUSEX status = {};
    status.dwLength = sizeof status;
    if (GlobalMemoryStatusEx(&status)) {
        lower(left, status.ullAvailPhys, "");
    }
#elif defined(__linux__)
    const uint64_t available = number_of("/proc/meminfo", "MemAvailable:");
    if (available != UNKNOWN) {
        lower(left, available * 1024, "");
    }
    lower_by_groups(left);
#endif
    return left.bytes == SIZE_MAX ? 0 : left.bytes;
}

void check_memory(const std::string &what, size_t bytes) {
    constexpr size_t SMALL = 1 << 20; // not worth reading /proc for
    if (bytes < SMALL) {
        return;
    }
    const MemoryLeft left = memory_left();
    if (bytes > left.bytes) {
        const auto mib = [](size_t n) { return static_cast<double>(n) / (1 << 20); };
        throw Error(DG_ERROR_MEMORY, format("%s needs %.1f MiB of memory, and %s leaves %.1f MiB", what.c_str(),
                                            mib(bytes), left.limit.c_str(), mib(left.bytes)));
    }
}

} // namespace dg
