// What code for every device is written with: how functions are marked, and arithmetic on a lane, which holds one
// value (a thread of a GPU, a plain loop) or a vector of them (cpu/vec.h).
//
// All of csrc/common lives in the namespace of whoever includes it: scalar functions compiled for one instruction set
// must not be shared with code that runs elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define DEQFUSE_INLINE __host__ __device__ __forceinline__
#define DEQFUSE_UNROLL _Pragma("unroll")
#else
#define DEQFUSE_INLINE inline __attribute__((always_inline))
#define DEQFUSE_UNROLL _Pragma("GCC unroll 8")
#endif

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
struct ScalarLane {
  using Scalar = T;
  using Value = T;
  static DEQFUSE_INLINE T splat(T s) { return s; }
  static DEQFUSE_INLINE T fma(T a, T b, T c) { return std::fma(a, b, c); }
  static DEQFUSE_INLINE T square_root(T a) { return std::sqrt(a); }
  // Keeps a NaN in `a`, not one in `b`.
  static DEQFUSE_INLINE T maximum(T a, T b) { return a < b ? b : a; }
  // max(x, 0) that keeps NaN: a poisoned row must come back poisoned.
  static DEQFUSE_INLINE T relu(T x) { return x < T(0) ? T(0) : x; }
};

// As variables: device code may not call the functions.
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kEpsilon = std::numeric_limits<T>::epsilon();

template <class T>
DEQFUSE_INLINE bool is_finite(T a) {
  return a - a == T(0);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
