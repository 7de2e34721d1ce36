// What this machine's CPU can do.

#pragma once

#include <set>
#include <string>

namespace blockffn {

// As uname tells: "x86_64", "aarch64".
std::string architecture();

// Names of CPU features, those of Linux's /proc/cpuinfo.
std::set<std::string> cpu_features();

}  // namespace blockffn
