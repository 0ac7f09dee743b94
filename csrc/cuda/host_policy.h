// The block of threads that the kernels' bodies are written against, on the CPU: for tests without a GPU.
//
// Every collective runs its function for one lane after the other, so that indices, bounds and the logic of the bodies
// are the device's. Lanes and rows go forwards or backwards: where two of them race, the two orders differ. What only
// a device has (barriers, tensor cores, the layout of their fragments) is in cuda_policy.cuh and not tested by this.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "exact.h"
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

// A tensor core's float32 sum of one result, as published measurements have it: the products, exact, and what was there
// are aligned to the largest of them, cut off behind its 24th bit, added, and cut off again.
struct HostUnit {
  static constexpr int kDepth = 8;
  using Bits = float;

  static float rounded(float a) { return round_to_tf32(a); }
  static float number(Bits bits) { return bits; }
  static void multiply(float (&c)[1], const Bits (&a)[kDepth], const Bits (&b)[kDepth]) {
    double terms[kDepth + 1] = {c[0]}, largest = std::fabs(double(c[0])), sum = 0;
    for (int k = 0; k < kDepth; ++k) {
      terms[k + 1] = double(a[k]) * double(b[k]);
      largest = std::fmax(largest, std::fabs(terms[k + 1]));
    }
    if (!(largest > 0) || !is_finite(largest)) {  // nothing to align
      for (double term : terms) sum += term;
    } else {
      const double unit = std::ldexp(1.0, std::ilogb(largest) - 23), per_unit = 1 / unit;
      for (double term : terms) sum += std::trunc(term * per_unit);
      sum *= unit;
    }
    c[0] = float(sum);
    if (std::fabs(double(c[0])) > std::fabs(sum)) c[0] = std::nextafter(c[0], 0.0f);
  }
};

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
  // `tensor_cores`: exact float products are summed up as a tensor core does it.
  HostPolicy(bool reversed, bool tensor_cores, int begin, int end)
      : reversed_(reversed), tensor_cores_(tensor_cores), begin_(begin), end_(end) {}

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
        auto weight = [&](int k) { return kTransposed ? a.a[k * a.stride + j] : a.a[j * a.stride + k]; };
        if (std::is_same<T, float>::value && p.exact && tensor_cores_) {
          for (int r = 0; r < kRows; ++r) line[r] = in_steps(p.d, weight, in + shift + r * stride);
        } else {
          for (int k = 0; k < p.d; ++k) {
            const T w = p.exact ? weight(k) : round_to_tf32(weight(k));
            for (int r = 0; r < kRows; ++r) {
              const T v = in[shift + r * stride + k];
              line[r] += w * (p.exact ? v : round_to_tf32(v));
            }
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
  template <class Weight>
  static T in_steps(int d, Weight weight, const T* in) {
    float sum[1] = {0};
    for (int k = 0; k < d; k += HostUnit::kDepth) {
      float left[HostUnit::kDepth] = {}, right[HostUnit::kDepth] = {};
      for (int q = 0; q < HostUnit::kDepth && k + q < d; ++q) {
        left[q] = float(weight(k + q));
        right[q] = float(in[k + q]);
      }
      add_exact_product<HostUnit>(sum, left, right);
    }
    return T(sum[0]);
  }

  const bool reversed_, tensor_cores_;
  const int begin_, end_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
