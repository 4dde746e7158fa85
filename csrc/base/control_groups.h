// The control groups that this process is in: what a container or a service manager grants it.
#pragma once

#include <string>
#include <vector>

namespace dg {

struct ControlGroup {
    bool unified;     // version 2, with one tree for all controllers
    std::string root; // "/sys/fs/cgroup/memory"; the root of version 2 has no name behind it
    std::string path; // below the root, with a slash in front; inside a container it may not exist there
};

// Those that a controller such as "memory" counts in. Each group above one (its path cut at a slash) sets limits of its
// own. Empty where the system has none.
std::vector<ControlGroup> control_groups(const std::string &controller);

} // namespace dg
