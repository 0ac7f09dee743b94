// Products of a packed matrix with a tile, and of two row-major matrices over their rows.
//
// A tile holds R = NV vectors of samples side by side: element i of sample l lies at tile[i * R + l].
// Samples are SIMD lanes, so everything that couples the features of one sample (GroupNorm, dots, the
// small solves) is vertical arithmetic and no sample can touch another.
#pragma once

#include "vec.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Output rows per block, so that accumulators fill the register file: 32 registers, or 16 on AVX2.
constexpr int block_rows(int nv) { return (kBytes == 64 || kBytes == 16 ? 16 : 8) / nv; }

DEQFUSE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// acc[j][v] += sum_k p[k][j] * z[k][v]
template <class T, int NV, int JR>
DEQFUSE_INLINE void accumulate(const T* __restrict p, ptrdiff_t p_stride, const T* __restrict z,
                               ptrdiff_t z_stride, int64_t depth, Vec<T> (&acc)[JR][NV]) {
  for (int64_t k = 0; k < depth; ++k, p += p_stride, z += z_stride) {
    Vec<T> zv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) zv[v] = load_unaligned(z + v * kLanes<T>);
#pragma GCC unroll 16
    for (int j = 0; j < JR; ++j) {
      Vec<T> w = splat(p[j]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[j][v] = fma(w, zv[v], acc[j][v]);
    }
  }
}

// Packed form of a (d x d) matrix A: blocks of JR output rows, [block][k][JR], rows padded with zeros.
// `transposed` packs A^T.
template <class T>
void pack(const T* __restrict a, T* __restrict out, int64_t d, int jr, bool transposed, int64_t block_begin,
          int64_t block_end) {
  for (int64_t b = block_begin; b < block_end; ++b) {
    T* o = out + b * d * jr;
    const int64_t rows = d - b * jr < jr ? d - b * jr : jr;
    if (transposed) {
      for (int64_t k = 0; k < d; ++k)
        for (int j = 0; j < jr; ++j) o[k * jr + j] = j < rows ? a[k * d + b * jr + j] : T(0);
      continue;
    }
    for (int64_t k0 = 0; k0 < d; k0 += 16)  // blocked, so that both sides stay in cache
      for (int j = 0; j < jr; ++j) {
        const int64_t end = k0 + 16 < d ? k0 + 16 : d;
        for (int64_t k = k0; k < end; ++k) o[k * jr + j] = j < rows ? a[(b * jr + j) * d + k] : T(0);
      }
  }
}

// out = scale * A z + bias + add, for a whole tile. `bias` (d) and `add` (tile) may be null.
template <class T, int NV>
void product(const T* __restrict packed, const T* __restrict z, const T* __restrict bias,
             const T* __restrict add, T* __restrict out, int64_t d, T scale = T(1)) {
  constexpr int JR = block_rows(NV), R = NV * kLanes<T>;
  for (int64_t j0 = 0; j0 < d; j0 += JR) {
    Vec<T> acc[JR][NV] = {};
    accumulate<T, NV, JR>(packed + j0 * d, JR, z, R, d, acc);
    const int rows = d - j0 < JR ? int(d - j0) : JR;
    for (int j = 0; j < JR; ++j) {
      if (j >= rows) break;
      const Vec<T> b = splat(bias ? bias[j0 + j] : T(0)), s = splat(scale);
      for (int v = 0; v < NV; ++v) {
        const int64_t at = (j0 + j) * R + v * kLanes<T>;
        Vec<T> r = fma(acc[j][v], s, b);
        if (add) r += load(add + at);
        store(out + at, r);
      }
    }
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
