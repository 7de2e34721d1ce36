#include "machine.h"

#include <sys/utsname.h>

#include <fstream>
#include <sstream>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace blockffn {

std::string architecture() {
  utsname names;
  return uname(&names) == 0 ? names.machine : "unknown";
}

#if defined(__aarch64__)

namespace {

// Names of the bits of AT_HWCAP and AT_HWCAP2 from bit 0 on (arch/arm64/kernel/cpuinfo.c of Linux).
const char* const HWCAP =
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma "
    "lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg";
const char* const HWCAP2 =
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm "
    "svebf16 i8mm bf16 dgh rng bti mte ecv afp rpres mte3 sme";

}  // namespace

// Not from /proc/cpuinfo: an emulator may show that of its host.
std::set<std::string> cpu_features() {
  std::set<std::string> features;
  for (auto [type, text] : {std::pair(AT_HWCAP, HWCAP), std::pair(AT_HWCAP2, HWCAP2)}) {
    std::istringstream names(text);
    unsigned long bits = getauxval(type);
    for (std::string name; names >> name; bits >>= 1) {
      if (bits & 1) features.insert(name);
    }
  }
  return features;
}

#else

std::set<std::string> cpu_features() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream names(line.substr(line.find(':') + 1));
    std::set<std::string> features;
    for (std::string name; names >> name;) features.insert(name);
    return features;  // all x86 cores of a machine have the same
  }
  return {};
}

#endif

}  // namespace blockffn
