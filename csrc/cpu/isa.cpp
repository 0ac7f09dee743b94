#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace deqfuse {
namespace {

const KernelTable& choose() {
  const char* variable = std::getenv("DEQFUSE_ISA");
  const std::string widest = variable != nullptr && *variable != '\0' ? variable : "amx";
  const bool amx = widest == "amx", vnni = amx || widest == "vnni", avx512 = vnni || widest == "avx512";
  if (!avx512 && widest != "avx2" && widest != "base")
    throw std::invalid_argument("DEQFUSE_ISA: expected base, avx2, avx512, vnni or amx, got '" + widest + "'");
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    if (amx && may_use_amx()) return kernels_amx();
    return vnni && __builtin_cpu_supports("avx512vnni") ? kernels_vnni() : kernels_avx512();
  }
  if (widest != "base" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
  return kernels_base();
}

}  // namespace

// The widest instruction set that the processor has; DEQFUSE_ISA=base|avx2|avx512|vnni asks for none wider. Read once.
const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace deqfuse
