// The block of threads that the kernels' bodies are written against, on a GPU: see tile.h.
#pragma once

#include "mma.cuh"

namespace deqfuse {
namespace DEQFUSE_ISA {

// `width` neighbouring lanes of a warp, this thread's number among them, and the bits of all of them.
class CudaLanes {
 public:
  __device__ __forceinline__ CudaLanes(int lane, int width, int rotation, unsigned mask)
      : lane_(lane), width_(width), rotation_(rotation), mask_(mask) {}

  template <class F>
  __device__ __forceinline__ void each(int n, F f) const {
    for (int k = lane_; k < n; k += width_) f(rotated(k, rotation_, n));
    __syncwarp(mask_);
  }
  template <class F>
  __device__ __forceinline__ auto sum(int n, F f) const {
    decltype(f(0)) total = {};
    for (int k = lane_; k < n; k += width_) total += f(rotated(k, rotation_, n));
    for (int half = width_ / 2; half > 0; half /= 2) total += __shfl_xor_sync(mask_, total, half);
    __syncwarp(mask_);
    return total;
  }
  template <class F>
  __device__ __forceinline__ auto sum2(int n, F f) const {
    decltype(f(0)) total = {};
    for (int k = lane_; k < n; k += width_) {
      const auto term = f(rotated(k, rotation_, n));
      total.a += term.a;
      total.b += term.b;
    }
    for (int half = width_ / 2; half > 0; half /= 2) {
      total.a += __shfl_xor_sync(mask_, total.a, half);
      total.b += __shfl_xor_sync(mask_, total.b, half);
    }
    __syncwarp(mask_);
    return total;
  }
  template <class F>
  __device__ __forceinline__ auto largest(int n, F f) const {
    using L = ScalarLane<decltype(f(0))>;
    decltype(f(0)) found = {};
    for (int k = lane_; k < n; k += width_) found = L::maximum(found, f(rotated(k, rotation_, n)));
    for (int half = width_ / 2; half > 0; half /= 2) found = L::maximum(found, __shfl_xor_sync(mask_, found, half));
    return found;
  }
  template <class F>
  __device__ __forceinline__ void groups(int count, int n, F f) const {
    const int lanes = lanes_per_group(count), part = lane_ / lanes;
    const unsigned all = lanes == kWarp ? ~0u : (1u << lanes) - 1, mask = all << part * lanes;
    for (int g = part; g < count; g += kWarp / lanes)
      f(CudaLanes(lane_ % lanes, lanes, rotation(g, lanes, n), mask), g);
    __syncwarp(mask_);
  }
  template <class F>
  __device__ __forceinline__ void once(F f) const {
    if (lane_ == 0) f();
    __syncwarp(mask_);
  }

 private:
  const int lane_, width_, rotation_;
  const unsigned mask_;
};

// `kRows` rows to a tile, `kTileCount` tiles to a product. Products fill features [begin, end) of their results; in a
// whole solve (one tile) they may overwrite what they read.
template <class T, int kRows, int kTileCount>
class CudaPolicy {
 public:
  static constexpr int kTiles = kTileCount;

  __device__ __forceinline__ CudaPolicy(int begin, int end)
      : begin_(begin), end_(end), warp_(threadIdx.x / kWarp), warps_(blockDim.x / kWarp), lane_(threadIdx.x % kWarp) {}

  template <class F>
  __device__ __forceinline__ void for_rows(int count, F f) const {
    for (int r = warp_; r < count; r += warps_) f(CudaLanes(lane_, kWarp, 0, ~0u), r);
  }
  template <class F>
  __device__ __forceinline__ void each(int n, F f) const {
    for (int i = threadIdx.x; i < n; i += blockDim.x) f(i);
  }
  template <class F>
  __device__ __forceinline__ bool any(int count, F f) const {
    __syncthreads();
    return __syncthreads_or(int(threadIdx.x) < count && f(int(threadIdx.x)));
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  template <bool kTransposed>
  __device__ __forceinline__ void product(const Matrix<T>& a, const T* in, T* out, const AdjointProblem<T>& p,
                                          int stride, const Dressing<T>& dress, int tiles = 1,
                                          ptrdiff_t tile_bytes = 0) const {
    if (sizeof(T) == 8 || p.exact)
      product_as<kTransposed, true>(a, in, out, p.d, stride, dress, tiles, tile_bytes);
    else
      product_as<kTransposed, false>(a, in, out, p.d, stride, dress, tiles, tile_bytes);
  }

 private:
  using M = Mma<T>;
  static constexpr int kUnits = kTiles == 1 ? M::kUnits : 1;
  static constexpr int kColumns = kRows * kTiles / 8;  // fragments of eight rows

  template <bool kTransposed, bool kExact>
  __device__ __forceinline__ void product_as(const Matrix<T>& a, const T* in, T* out, int d, int stride,
                                             const Dressing<T>& dress, int tiles, ptrdiff_t tile_bytes) const {
    T sums[kUnits][kColumns][M::kC] = {};
    const T* rows[kColumns];  // of this lane, in each fragment; a missing tile repeats the last
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int tile = n * 8 / kRows < tiles ? n * 8 / kRows : tiles - 1;
      rows[n] = shifted(in, tile * tile_bytes) + (n * 8 % kRows + lane_ / 4) * stride + lane_ % 4;
    }
    if (kTiles == 1) __syncthreads();
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int first = first_of(unit);
      if (first < end_) unit_product<kTransposed, kExact>(a, rows, d, first, sums[unit]);
    }
    if (kTiles == 1) __syncthreads();
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit)
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (n * 8 / kRows >= tiles) break;
        const ptrdiff_t shift = n * 8 / kRows * tile_bytes;
#pragma unroll
        for (int q = 0; q < M::kC; ++q) {
          const int j = first_of(unit) + lane_ / 4 + 8 * (q / 2),
                    at = (n * 8 % kRows + 2 * (lane_ % 4) + q % 2) * stride + j;
          if (j >= end_) continue;
          T value = dress.scale * sums[unit][n][q];
          if (dress.bias) value += dress.bias_scale * dress.bias[j];
          if (dress.add) value += shifted(dress.add, shift)[at];
          shifted(out, shift)[at] = value;
        }
      }
    if (kTiles == 1) __syncthreads();
  }

  __device__ __forceinline__ int first_of(int unit) const { return begin_ + (unit * warps_ + warp_) * M::kFeatures; }

  template <class V>
  static __device__ __forceinline__ V* shifted(V* pointer, ptrdiff_t bytes) {
    return pointer + bytes / ptrdiff_t(sizeof(V));
  }

  // sums += A in, for the features from `first` on. Features beyond d repeat the last; their sums are not stored.
  template <bool kTransposed, bool kExact>
  __device__ __forceinline__ void unit_product(const Matrix<T>& a, const T* const (&rows)[kColumns], int d, int first,
                                               T (&sums)[kColumns][M::kC]) const {
    const int depth = lane_ % 4, along = kTransposed ? a.stride : 1, across = kTransposed ? 1 : a.stride;
    const T* from[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = first + lane_ / 4 + 8 * half;
      from[half] = a.a + (j < d ? j : d - 1) * across + depth * along;
    }
    int k = 0;
#pragma unroll 4
    for (; k + M::kDepth <= d; k += M::kDepth)
      step<kExact>(
          from, rows, along, k, [](int) { return true; }, sums);
    if (k < d)
      step<kExact>(
          from, rows, along, k, [&](int q) { return k + depth + 4 * q < d; }, sums);
  }

  template <bool kExact, class There>
  __device__ __forceinline__ void step(const T* const (&from)[2], const T* const (&rows)[kColumns], int along, int k,
                                       There there, T (&sums)[kColumns][M::kC]) const {
    T left[M::kA], right[kColumns][M::kB];
#pragma unroll
    for (int q = 0; q < M::kA; ++q) left[q] = there(q / 2) ? from[q % 2][(k + 4 * (q / 2)) * along] : T(0);
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int q = 0; q < M::kB; ++q) right[n][q] = there(q) ? rows[n][k + 4 * q] : T(0);
    M::template accumulate<kExact>(sums, left, right);
  }

  const int begin_, end_, warp_, warps_, lane_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
