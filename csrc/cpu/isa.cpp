#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace deqfuse {
namespace {

// AMX with bfloat16, which a process has to ask the kernel for.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return bf16 && tile && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

const KernelTable& choose() {
  const char* variable = std::getenv("DEQFUSE_ISA");
  const std::string widest = variable != nullptr && *variable != '\0' ? variable : "amx";
  if (widest != "base" && widest != "avx2" && widest != "avx512" && widest != "amx")
    throw std::invalid_argument("DEQFUSE_ISA: expected base, avx2, avx512 or amx, got '" + widest + "'");
#if defined(__x86_64__)
  __builtin_cpu_init();
  if ((widest == "avx512" || widest == "amx") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return widest == "amx" && may_use_amx() ? kernels_amx() : kernels_avx512();
  if (widest != "base" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
  return kernels_base();
}

}  // namespace

// The widest instruction set that the processor has; DEQFUSE_ISA=base|avx2|avx512 asks for none wider. Read once.
const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace deqfuse
