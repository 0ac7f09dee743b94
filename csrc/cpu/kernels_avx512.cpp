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
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define DEQFUSE_ISA avx512
#define DEQFUSE_VECTOR_BYTES 64
#include "kernels.inc"
#pragma GCC pop_options

const deqfuse::KernelTable& deqfuse::kernels_avx512() {
  using namespace avx512;
  static const KernelTable table{"avx512", kBytes, kKernels<float>, kKernels<double>};
  return table;
}
