#include "base/control_groups.h"

#include <fstream>

namespace dg {

std::vector<ControlGroup> control_groups(const std::string &controller) {
    std::vector<ControlGroup> found;
    std::ifstream groups("/proc/self/cgroup"); // lines of ID:CONTROLLERS:PATH; version 2 has the one line 0::PATH
    for (std::string line; std::getline(groups, line);) {
        const size_t first = line.find(':');
        const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) {
            continue;
        }
        const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
        const bool unified = controllers == ",,";
        if (unified || controllers.find("," + controller + ",") != std::string::npos) {
            found.push_back(
                {unified, unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller, line.substr(second + 1)});
        }
    }
    return found;
}

} // namespace dg
