// Products in full float32 on units that multiply TF32 numbers, ten bits behind the point: three products each.
//
// The units cut off what does not fit while they add up, always towards zero. A sum that stays in them loses something
// at every step, and over hundreds of features that is ten times the error of float32. So the products of one step
// start from zero, and their sum is added by the ordinary unit, which rounds to nearest.
#pragma once

#include "../common/lane.h"

#ifdef __CUDACC__
#define DEQFUSE_EXACT __device__ __forceinline__
#else
#define DEQFUSE_EXACT inline
#endif

namespace deqfuse {
namespace DEQFUSE_ISA {

// c += a b. Unit: `Bits`, a TF32 number; rounded(float), number(Bits), multiply(float (&c)[kC], a, b).
template <class Unit, int kA, int kB, int kC>
DEQFUSE_EXACT void add_exact_product(float (&c)[kC], const float (&a)[kA], const float (&b)[kB]) {
  typename Unit::Bits high[kA], low[kA], right[kB], rest[kB];
  for (int q = 0; q < kA; ++q) {
    high[q] = Unit::rounded(a[q]);
    low[q] = Unit::rounded(a[q] - Unit::number(high[q]));
  }
  for (int q = 0; q < kB; ++q) {
    right[q] = Unit::rounded(b[q]);
    rest[q] = Unit::rounded(b[q] - Unit::number(right[q]));
  }
  float sum[kC] = {};
  Unit::multiply(sum, low, right);  // the small terms first
  Unit::multiply(sum, high, rest);
  Unit::multiply(sum, high, right);
  for (int q = 0; q < kC; ++q) c[q] += sum[q];
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
