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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define DEQFUSE_ISA avx2
#define DEQFUSE_VECTOR_BYTES 32
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const deqfuse::KernelTable& deqfuse::kernels_avx2() {
  using namespace avx2;
  static const KernelTable table{"avx2", kBytes, plan, kKernels<float>, kKernels<double>};
  return table;
}

#endif
