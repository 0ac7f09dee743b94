// Vector types that GCC and Clang map onto the registers of the instruction set being compiled for.
// A kernel file is compiled once per instruction set, each time in its own namespace (isa.h).
// The only intrinsics here are the multiply-adds and the loads and stores of parts below; amx.h has those of the matrix
// unit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/lane.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

// DEQFUSE_VECTOR_BYTES comes from the including kernel file: 64 means AVX-512, 32 AVX2 with FMA, 16 what
// every processor has. `#pragma GCC target` does not reliably define the compiler's own macros.
#ifndef DEQFUSE_VECTOR_BYTES
#define DEQFUSE_VECTOR_BYTES 16
#endif

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kBytes = DEQFUSE_VECTOR_BYTES;

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t M __attribute__((vector_size(kBytes)));
};
template <>
struct VecTraits<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t M __attribute__((vector_size(kBytes)));
};
template <>
struct VecTraits<int32_t> {
  typedef int32_t V __attribute__((vector_size(kBytes)));
  typedef int32_t M __attribute__((vector_size(kBytes)));
};

template <class T>
using Vec = typename VecTraits<T>::V;
template <class T>
using Mask = typename VecTraits<T>::M;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

template <class T>
DEQFUSE_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
DEQFUSE_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
// Rows of a row-major matrix start anywhere.
template <class T>
DEQFUSE_INLINE Vec<T> load_unaligned(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// A vector of such, zeros behind the first `count`.
template <class T>
DEQFUSE_INLINE Vec<T> load_some(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load_unaligned(p);
  Vec<T> v{};
  if (count > 0) __builtin_memcpy(&v, p, sizeof(T) * size_t(count));
  return v;
}
// Its first `count` values.
template <class T>
DEQFUSE_INLINE void store_some(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) __builtin_memcpy(p, &v, sizeof v);
  else if (count > 0) __builtin_memcpy(p, &v, sizeof(T) * size_t(count));
}
#if DEQFUSE_VECTOR_BYTES == 64
// A copy of a variable number of bytes is a call, and reading it back waits for it; a masked instruction does neither.
DEQFUSE_INLINE uint32_t first_lanes(int64_t count) { return count > 0 ? (1u << count) - 1 : 0; }
DEQFUSE_INLINE Vec<float> load_some(const float* p, int64_t count) {
  return count >= kLanes<float> ? load_unaligned(p) : (Vec<float>)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
DEQFUSE_INLINE Vec<double> load_some(const double* p, int64_t count) {
  return count >= kLanes<double> ? load_unaligned(p) : (Vec<double>)_mm512_maskz_loadu_pd(first_lanes(count), p);
}
DEQFUSE_INLINE void store_some(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, count >= kLanes<float> ? 0xffff : first_lanes(count), (__m512)v);
}
DEQFUSE_INLINE void store_some(double* p, Vec<double> v, int64_t count) {
  _mm512_mask_storeu_pd(p, count >= kLanes<double> ? 0xff : first_lanes(count), (__m512d)v);
}
// The 16 bytes at each of four addresses, side by side.
DEQFUSE_INLINE Vec<float> load_quarters(const float* a, const float* b, const float* c, const float* d) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(a));
  v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(b));
  v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(c));
  return (Vec<float>)_mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(d));
}
DEQFUSE_INLINE Vec<double> load_quarters(const double* a, const double* b, const double* c, const double* d) {
  __m512d v = _mm512_castpd128_pd512(_mm_loadu_pd(a));
  v = _mm512_mask_broadcast_f64x2(v, 0x0c, _mm_loadu_pd(b));
  v = _mm512_mask_broadcast_f64x2(v, 0x30, _mm_loadu_pd(c));
  return (Vec<double>)_mm512_mask_broadcast_f64x2(v, 0xc0, _mm_loadu_pd(d));
}
#endif
template <class T>
DEQFUSE_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};  // x - 0 is x and folds away, x + 0 is not: it would cost an addition
}

// a * b + c in one rounding where the hardware has it. Written out rather than left to contraction,
// so that every instantiation rounds alike and a row's answer does not depend on the tile's width.
DEQFUSE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if DEQFUSE_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DEQFUSE_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
DEQFUSE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if DEQFUSE_VECTOR_BYTES == 64
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif DEQFUSE_VECTOR_BYTES == 32
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// The same of one number.
#if DEQFUSE_VECTOR_BYTES >= 32 || defined(__aarch64__)
DEQFUSE_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEQFUSE_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
DEQFUSE_INLINE float fma(float a, float b, float c) { return a * b + c; }
DEQFUSE_INLINE double fma(double a, double b, double c) { return a * b + c; }
#endif

// Four neighbours of a row: the four partial sums of sum_features (rowmath.h), side by side.
template <class T>
struct FourTraits {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
};
template <class T>
using Four = typename FourTraits<T>::V;

// s + a * b as fma() has it, of four numbers or of one.
DEQFUSE_INLINE Four<float> add_product(Four<float> s, Four<float> a, Four<float> b) {
#if DEQFUSE_VECTOR_BYTES >= 32
  return (Four<float>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)s);
#else
  for (int q = 0; q < 4; ++q) s[q] = fma(a[q], b[q], s[q]);
  return s;
#endif
}
DEQFUSE_INLINE Four<double> add_product(Four<double> s, Four<double> a, Four<double> b) {
#if DEQFUSE_VECTOR_BYTES >= 32
  return (Four<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)s);
#else
  for (int q = 0; q < 4; ++q) s[q] = fma(a[q], b[q], s[q]);
  return s;
#endif
}
DEQFUSE_INLINE float add_product(float s, float a, float b) { return fma(a, b, s); }
DEQFUSE_INLINE double add_product(double s, double a, double b) { return fma(a, b, s); }

#ifdef DEQFUSE_VNNI
// Each lane two 16-bit numbers: a_0 b_0 + a_1 b_1 + c in 32 bits.
DEQFUSE_INLINE Vec<int32_t> fma(Vec<int32_t> a, Vec<int32_t> b, Vec<int32_t> c) {
  return (Vec<int32_t>)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
}
#endif

// max(x, 0) that keeps NaN: a poisoned row must come back poisoned.
template <class V>
DEQFUSE_INLINE V relu(V x) {
  return x < V{} ? V{} : x;
}
// Keeps a NaN in `a`, not one in `b`.
template <class V>
DEQFUSE_INLINE V maximum(V a, V b) {
  return a < b ? b : a;
}
template <class T>
DEQFUSE_INLINE Vec<T> square_root(Vec<T> a) {
  Vec<T> r = a;
  for (int l = 0; l < kLanes<T>; ++l) r[l] = sizeof(T) == 4 ? __builtin_sqrtf(a[l]) : __builtin_sqrt(a[l]);
  return r;
}

// A vector of rows as a lane of csrc/common.
template <class T>
struct VecLane {
  using Scalar = T;
  using Value = Vec<T>;
  static DEQFUSE_INLINE Value splat(T s) { return DEQFUSE_ISA::splat(s); }
  static DEQFUSE_INLINE Value fma(Value a, Value b, Value c) { return DEQFUSE_ISA::fma(a, b, c); }
  static DEQFUSE_INLINE Value square_root(Value a) { return DEQFUSE_ISA::square_root<T>(a); }
  static DEQFUSE_INLINE Value maximum(Value a, Value b) { return DEQFUSE_ISA::maximum(a, b); }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
