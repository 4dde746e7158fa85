#include "base/cores.h"

#include "base/control_groups.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#if defined(_WIN32)
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>
#elif defined(__linux__)
#    include <sched.h>
#elif defined(__APPLE__)
#    include <sys/sysctl.h>
#endif

namespace dg {
namespace {

// "0-3,8" of a file, as numbers; empty without the file.
std::set<int32_t> numbers_in(const std::string &path) {
    std::set<int32_t> numbers;
    std::ifstream file(path);
    std::string text;
    std::getline(file, text);
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) {
        int first = 0;
        int last = 0;
        const int n = std::sscanf(part.c_str(), "%d-%d", &first, &last);
        for (int i = first; n >= 1 && i <= (n == 2 ? last : first); ++i) {
            numbers.insert(i);
        }
    }
    return numbers;
}

#if defined(__linux__)

// Any mask that the kernel has fits: it refuses those that are too short.
std::vector<int32_t> allowed_processors() {
    std::vector<int32_t> allowed;
    for (int size = 1024; size <= 1 << 18; size *= 2) {
        cpu_set_t *set = CPU_ALLOC(static_cast<size_t>(size));
        if (!set) {
            break;
        }
        const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(size));
        const bool told = sched_getaffinity(0, bytes, set) == 0;
        for (int i = 0; told && i < size; ++i) {
            if (CPU_ISSET_S(static_cast<size_t>(i), bytes, set)) {
                allowed.push_back(i);
            }
        }
        CPU_FREE(set);
        if (told) {
            break;
        }
    }
    return allowed;
}

int32_t granted_to_this_process() {
    int32_t granted = 0;
    for (const ControlGroup &group : control_groups("cpu")) {
        const int32_t n = granted_cores(group.root, group.path);
        granted = granted == 0 || (n > 0 && n < granted) ? n : granted;
    }
    return granted;
}

#elif defined(_WIN32)

// Cores of the best kind that the process may run on; 0 where the system does not tell. A process whose threads may run
// in several groups of 64 processors has no mask: all count then.
int32_t allowed_cores() {
    DWORD_PTR mask = 0;
    DWORD_PTR all = 0;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &mask, &all) || mask == 0) {
        mask = ~DWORD_PTR{0};
    }
    DWORD size = 0;
    GetLogicalProcessorInformationEx(RelationProcessorCore, nullptr, &size);
    std::vector<std::byte> records(size);
    const auto record = [&](size_t at) {
        return reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX *>(records.data() + at);
    };
    if (size == 0 || !GetLogicalProcessorInformationEx(RelationProcessorCore, record(0), &size)) {
        return 0;
    }
    int32_t n = 0;
    BYTE best = 0; // efficiency cores have a lower class than others
    for (size_t at = 0; at < size; at += record(at)->Size) {
        const PROCESSOR_RELATIONSHIP &core = record(at)->Processor;
        if ((core.GroupMask[0].Mask & mask) == 0 || core.EfficiencyClass < best) {
            continue;
        }
        n = core.EfficiencyClass > best ? 1 : n + 1;
        best = core.EfficiencyClass;
    }
    return n;
}

#endif

} // namespace

int32_t distinct_cores(const std::vector<int32_t> &allowed, const std::string &devices) {
    // Intel's hybrids name their kinds of cores; ARM's tell each processor's capacity, the greatest being 1024.
    const std::set<int32_t> efficient = numbers_in(devices + "/cpu_atom/cpus");
    const auto capacity = [&](int32_t id) {
        const auto number = numbers_in(devices + "/system/cpu/cpu" + std::to_string(id) + "/cpu_capacity");
        return number.empty() ? 1024 : *number.begin();
    };
    int32_t greatest = 0;
    for (const int32_t id : allowed) {
        greatest = std::max(greatest, capacity(id));
    }
    int32_t n_full = 0;
    int32_t n_all = 0;
    for (const int32_t id : allowed) {
        const auto siblings =
            numbers_in(devices + "/system/cpu/cpu" + std::to_string(id) + "/topology/thread_siblings_list");
        const bool is_first = std::none_of(allowed.begin(), allowed.end(),
                                           [&](int32_t other) { return other < id && siblings.count(other) > 0; });
        n_all += is_first ? 1 : 0;
        n_full += is_first && efficient.count(id) == 0 && 2 * capacity(id) > greatest ? 1 : 0;
    }
    return std::max(1, n_full > 0 ? n_full : n_all);
}

int32_t granted_cores(const std::string &groups, std::string group) {
    int32_t granted = 0;
    for (;; group.erase(group.rfind('/'))) {
        const std::string folder = groups + group;
        double quota = 0.0;
        double period = 0.0;
        std::ifstream(folder + "/cpu.max") >> quota >> period; // "max 100000" leaves 0
        if (period <= 0.0) {
            quota = 0.0;
            std::ifstream(folder + "/cpu.cfs_quota_us") >> quota; // -1: none
            std::ifstream(folder + "/cpu.cfs_period_us") >> period;
        }
        if (quota > 0.0 && period > 0.0) {
            const auto n = static_cast<int32_t>(std::clamp(quota / period, 1.0, 65536.0));
            granted = granted == 0 ? n : std::min(granted, n);
        }
        if (group.rfind('/') == std::string::npos) {
            return granted;
        }
    }
}

int32_t usable_cores() {
    auto n = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
    if (const std::vector<int32_t> allowed = allowed_processors(); !allowed.empty()) {
        n = distinct_cores(allowed, "/sys/devices");
    }
    if (const int32_t granted = granted_to_this_process(); granted > 0) {
        n = std::min(n, granted);
    }
#elif defined(_WIN32)
    if (const int32_t allowed = allowed_cores(); allowed > 0) {
        n = allowed;
    }
#elif defined(__APPLE__)
    for (const char *name : {"hw.perflevel0.physicalcpu", "hw.physicalcpu"}) {
        int cores = 0;
        size_t size = sizeof cores;
        if (sysctlbyname(name, &cores, &size, nullptr, 0) == 0 && cores > 0) {
            return cores;
        }
    }
#endif
    return n;
}

} // namespace dg
