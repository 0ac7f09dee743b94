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
#include <immintrin.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma")
#endif
#define DEQFUSE_ISA vnni
#define DEQFUSE_VECTOR_BYTES 64
#define DEQFUSE_VNNI
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const deqfuse::KernelTable& deqfuse::kernels_vnni() {
  using namespace vnni;
  static const KernelTable table{"vnni", kBytes, plan, kKernels<float>, kernels_avx512().f64};
  return table;
}

#endif
