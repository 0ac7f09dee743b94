// The block of threads that the kernels' bodies are written against, on the CPU: for tests without a GPU.
//
// Every collective runs its function for one lane after the other, so that indices, bounds and the logic of the bodies
// are the device's. Lanes and rows go forwards or backwards: where two of them race, the two orders differ. What only
// a device has (barriers, tensor cores, the layout of their fragments) is in cuda_policy.cuh and not tested by this.
#pragma once

#include <cstring>

#include "tile.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// 10 of float's 23 bits, to nearest with ties away from zero, as the tensor cores' operands are rounded.
inline float round_to_tf32(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & ~uint32_t(0x1fff);
  std::memcpy(&a, &bits, sizeof bits);
  return a;
}
inline double round_to_tf32(double a) { return a; }

// f(i) for i in [0, n), in either order.
template <class F>
void in_order(int n, bool reversed, F f) {
  for (int k = 0; k < n; ++k) f(reversed ? n - 1 - k : k);
}

class HostLanes {
 public:
  HostLanes(int width, int rotation, bool reversed) : width_(width), rotation_(rotation), reversed_(reversed) {}

  template <class F>
  void each(int n, F f) const {
    in_order(width_, reversed_, [&](int lane) {
      for (int k = lane; k < n; k += width_) f(rotated(k, rotation_, n));
    });
  }
  template <class F>
  auto sum(int n, F f) const {
    return reduce(n, f, [](auto a, auto b) { return a + b; });
  }
  template <class F>
  auto sum2(int n, F f) const {
    return reduce(n, f, [](auto a, auto b) { return decltype(a){a.a + b.a, a.b + b.b}; });
  }
  template <class F>
  auto largest(int n, F f) const {
    using T = decltype(f(0));
    return reduce(n, f, [](T a, T b) { return ScalarLane<T>::maximum(a, b); });
  }
  template <class F>
  void groups(int count, int n, F f) const {
    const int lanes = lanes_per_group(count), parts = kWarp / lanes;
    in_order(parts, reversed_, [&](int part) {
      for (int g = part; g < count; g += parts) f(HostLanes(lanes, rotation(g, lanes, n), reversed_), g);
    });
  }
  template <class F>
  void once(F f) const {
    f();
  }

 private:
  template <class F, class Add>
  auto reduce(int n, F f, Add add) const {
    decltype(f(0)) part[kWarp] = {};
    in_order(width_, reversed_, [&](int lane) {
      for (int k = lane; k < n; k += width_) part[lane] = add(part[lane], f(rotated(k, rotation_, n)));
    });
    for (int half = width_ / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) part[lane] = add(part[lane], part[lane + half]);
    return part[0];
  }

  const int width_, rotation_;
  const bool reversed_;
};

// `kRows` rows to a tile, `kTileCount` tiles to a product.
template <class T, int kRows, int kTileCount>
class HostPolicy {
 public:
  static constexpr int kTiles = kTileCount;

  // Products fill features [begin, end) of their results.
  HostPolicy(bool reversed, int begin, int end) : reversed_(reversed), begin_(begin), end_(end) {}

  template <class F>
  void for_rows(int count, F f) const {
    in_order(count, reversed_, [&](int r) { f(HostLanes(kWarp, 0, reversed_), r); });
  }
  template <class F>
  void each(int n, F f) const {
    in_order(n, reversed_, f);
  }
  template <class F>
  bool any(int count, F f) const {
    bool found = false;
    for (int i = 0; i < count; ++i) found |= f(i);
    return found;
  }
  void sync() const {}

  template <bool kTransposed>
  void product(const Matrix<T>& a, const T* in, T* out, const AdjointProblem<T>& p, int stride,
               const Dressing<T>& dress, int tiles = 1, ptrdiff_t tile_bytes = 0) const {
    T line[kRows];
    for (int tile = 0; tile < tiles; ++tile) {
      const ptrdiff_t shift = tile * tile_bytes / ptrdiff_t(sizeof(T));
      T* results = new T[kRows * size_t(end_ - begin_)];  // `out` may be `in`
      for (int j = begin_; j < end_; ++j) {
        for (int r = 0; r < kRows; ++r) line[r] = T(0);
        for (int k = 0; k < p.d; ++k) {
          T w = kTransposed ? a.a[k * a.stride + j] : a.a[j * a.stride + k];
          if (!p.exact) w = round_to_tf32(w);
          for (int r = 0; r < kRows; ++r) {
            const T v = in[shift + r * stride + k];
            line[r] += w * (p.exact ? v : round_to_tf32(v));
          }
        }
        for (int r = 0; r < kRows; ++r) {
          T value = dress.scale * line[r];
          if (dress.bias) value += dress.bias_scale * dress.bias[j];
          if (dress.add) value += dress.add[shift + r * stride + j];
          results[r * (end_ - begin_) + j - begin_] = value;
        }
      }
      for (int r = 0; r < kRows; ++r)
        std::memcpy(out + shift + r * stride + begin_, results + r * (end_ - begin_), sizeof(T) * (end_ - begin_));
      delete[] results;
    }
  }

 private:
  const bool reversed_;
  const int begin_, end_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
