// How many threads a process can keep busy with arithmetic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dg {

// Cores that the process may run on, one thread of each: two threads of a core share its units for vectors, and each
// other's cache. No more than the control groups above the process grant, since threads that are stopped in the midst
// of an operator let all others wait (masks and threads: Linux and Windows; groups: Linux). No efficiency cores beside
// others. At least 1.
int32_t usable_cores();

// The same for given processors: those `allowed` that a Linux's files below `devices` (/sys/devices) tell apart.
int32_t distinct_cores(const std::vector<int32_t> &allowed, const std::string &devices);

// Whole processors that a Linux control group and those above it grant; 0 without a limit. `groups`: where the tree is
// mounted; `group`: from there on, "/" or "/a/b". Version 2 has cpu.max, version 1 cpu.cfs_quota_us.
int32_t granted_cores(const std::string &groups, std::string group);

} // namespace dg
