// What the operating system says about this process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dg {

// Differs between a process and its fork.
int64_t process_id();

// How much memory the process may still take, and which limit says so: the least of what the machine has left, what the
// control groups above the process leave (Linux), and RLIMIT_AS and RLIMIT_DATA. SIZE_MAX where nothing is known.
struct MemoryLeft {
    size_t bytes;
    std::string limit;
};
MemoryLeft memory_left();

// How much memory is there for pages that are used again and again, file pages among them: without swap, and without
// limits on addresses. 0 where nothing is known.
size_t memory_available();

// Throws DG_ERROR_MEMORY when `bytes` are more than there are: systems that overcommit grant them, and end the process
// when it writes to them. `what` begins the message.
void check_memory(const std::string &what, size_t bytes);

} // namespace dg
