// One tensor-core step on fragments held by a warp: float in TF32 or, from three of those, in full float32; double.
//
// The matrix is the A operand (features by k), the rows of a tile are the columns of B (k by rows). Lane l holds
//   a[q] = A(l / 4 + 8 (q % 2), l % 4 + 4 (q / 2))     b[q] = B(l % 4 + 4 q, l / 4)
//   c[q] = C(l / 4 + 8 (q / 2), 2 (l % 4) + q % 2)
#pragma once

#include "exact.h"
#include "tile.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
struct Mma;

template <>
struct Mma<float> {
  static constexpr int kFeatures = 16, kDepth = 8, kA = 4, kB = 2, kC = 4;
  static constexpr int kUnits = 1;  // blocks of features to a warp of a whole solve

  using Bits = uint32_t;

  static __device__ __forceinline__ Bits rounded(float a) {
    Bits bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(a));
    return bits;
  }
  static __device__ __forceinline__ float number(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ void multiply(float (&c)[kC], const Bits (&a)[kA], const Bits (&b)[kB]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  // c[n] += a b[n]
  template <bool kExact, int kTiles>
  static __device__ __forceinline__ void accumulate(float (&c)[kTiles][kC], const float (&a)[kA],
                                                    const float (&b)[kTiles][kB]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if constexpr (kExact) {
        add_exact_product<Mma>(c[n], a, b[n]);
      } else {
        Bits left[kA], right[kB];
#pragma unroll
        for (int q = 0; q < kA; ++q) left[q] = rounded(a[q]);
#pragma unroll
        for (int q = 0; q < kB; ++q) right[q] = rounded(b[n][q]);
        multiply(c[n], left, right);
      }
    }
  }
};

template <>
struct Mma<double> {
  static constexpr int kFeatures = 8, kDepth = 4, kA = 1, kB = 1, kC = 2;
  static constexpr int kUnits = 2;

  template <bool kExact, int kTiles>
  static __device__ __forceinline__ void accumulate(double (&c)[kTiles][kC], const double (&a)[kA],
                                                    const double (&b)[kTiles][kB]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
                   : "+d"(c[n][0]), "+d"(c[n][1])
                   : "d"(a[0]), "d"(b[n][0]));
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
