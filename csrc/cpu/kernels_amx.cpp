#if defined(__x86_64__)  // empty elsewhere

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,amx-tile,amx-bf16")
#endif
#define DEQFUSE_ISA amx
#define DEQFUSE_VECTOR_BYTES 64
#define DEQFUSE_AMX
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// Double precision has no use for the matrix unit.
const deqfuse::KernelTable& deqfuse::kernels_amx() {
  using namespace amx;
  static const KernelTable table{"amx", kBytes, plan, kKernels<float>, kernels_avx512().f64};
  return table;
}

bool deqfuse::may_use_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bfloat16 = d >> 22 & 1, tiles = d >> 24 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return bfloat16 && tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else  // a compiler or a system that does not know the unit

const deqfuse::KernelTable& deqfuse::kernels_amx() { return kernels_avx512(); }
bool deqfuse::may_use_amx() { return false; }

#endif
#endif
