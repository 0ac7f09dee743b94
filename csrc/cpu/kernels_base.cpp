#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define DEQFUSE_ISA base
#include "kernels.inc"


const deqfuse::KernelTable& deqfuse::kernels_base() {
  using namespace base;
  static const KernelTable table{"base", kBytes, plan, kKernels<float>, kKernels<double>};
  return table;
}
