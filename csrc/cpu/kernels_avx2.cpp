#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "kernels.h"
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define DEQFUSE_ISA avx2
#define DEQFUSE_VECTOR_BYTES 32
#include "kernels.inc"
#pragma GCC pop_options

const deqfuse::KernelTable& deqfuse::kernels_avx2() {
  using namespace avx2;
  static const KernelTable table{"avx2", kBytes, kKernels<float>, kKernels<double>};
  return table;
}
