// Arithmetic along the features of each sample of a tile: GroupNorm forward and backward, dot products.
#pragma once

#include "vec.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
constexpr T kGroupNormEps = T(1e-5);

// For every group and sample: mean and 1 / sqrt(var + eps) of y, in two passes so that no digits cancel.
template <class T>
DEQFUSE_INLINE void moments(const T* y, int64_t width, int64_t stride, bool rectify, Vec<T>& mean,
                            Vec<T>& rstd) {
  const Vec<T> inv = splat(T(1) / T(width));
  Vec<T> sum{}, square{};
  for (int64_t k = 0; k < width; ++k) {
    Vec<T> a = load(y + k * stride);
    sum += rectify ? relu(a) : a;
  }
  mean = sum * inv;
  for (int64_t k = 0; k < width; ++k) {
    Vec<T> a = load(y + k * stride);
    a = (rectify ? relu(a) : a) - mean;
    square = fma(a, a, square);
  }
  rstd = splat(T(1)) / square_root<T>(fma(square, inv, splat(kGroupNormEps<T>)));
}

// How one GroupNorm of the layer is dressed: relu on its input, a skip added to its output, relu last.
struct NormForm {
  bool rectify_input = false, rectify_output = false;
};

// y <- [relu](GN([relu] y) * gamma + beta [+ skip])
template <class T, int NV>
void group_norm(T* __restrict y, const T* gamma, const T* beta, const T* skip, int64_t d, int64_t groups,
                NormForm form) {
  constexpr int W = kLanes<T>, R = NV * W;
  const int64_t width = d / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = g * width * R + v * W;
      Vec<T> mean, rstd;
      moments(y + at, width, R, form.rectify_input, mean, rstd);
      for (int64_t k = 0; k < width; ++k) {
        T* p = y + at + k * R;
        Vec<T> a = load(p);
        a = ((form.rectify_input ? relu(a) : a) - mean) * rstd;
        a = fma(a, splat(gamma[g * width + k]), splat(beta[g * width + k]));
        if (skip) a += load(skip + at + k * R);
        store(p, form.rectify_output ? relu(a) : a);
      }
    }
}

// Saves what the backward needs: x_hat (tile) and rstd (groups x R), from y.
template <class T, int NV>
void normalise(const T* __restrict y, T* __restrict x_hat, T* __restrict rstd, int64_t d, int64_t groups,
               bool rectify) {
  constexpr int W = kLanes<T>, R = NV * W;
  const int64_t width = d / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = g * width * R + v * W;
      Vec<T> mean, inv;
      moments(y + at, width, R, rectify, mean, inv);
      for (int64_t k = 0; k < width; ++k) {
        Vec<T> a = load(y + at + k * R);
        store(x_hat + at + k * R, ((rectify ? relu(a) : a) - mean) * inv);
      }
      store(rstd + g * R + v * W, inv);
    }
}

// out = S (gamma * t), S the symmetric part of GroupNorm's Jacobian:
//   S s = rstd (s - mean(s) - x_hat mean(s x_hat))   per group.
// t is first set to zero where `gate_in` <= 0, the result where `gate_out` <= 0 (either may be null).
template <class T, int NV>
void group_norm_backward(const T* t, const T* gate_in, const T* gamma, const T* x_hat, const T* rstd,
                         const T* gate_out, T* out, int64_t d, int64_t groups) {
  constexpr int W = kLanes<T>, R = NV * W;
  const int64_t width = d / groups;
  const Vec<T> inv = splat(T(1) / T(width)), zero{};
  for (int64_t g = 0; g < groups; ++g)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = g * width * R + v * W;
      Vec<T> sum{}, projected{};
      for (int64_t k = 0; k < width; ++k) {
        const int64_t o = at + k * R;
        Vec<T> a = load(t + o) * splat(gamma[g * width + k]);
        if (gate_in) a = load(gate_in + o) > zero ? a : zero;
        sum += a;
        projected = fma(a, load(x_hat + o), projected);
        store(out + o, a);
      }
      sum *= inv;
      projected *= inv;
      const Vec<T> r = load(rstd + g * R + v * W);
      for (int64_t k = 0; k < width; ++k) {
        const int64_t o = at + k * R;
        Vec<T> a = r * (load(out + o) - sum - load(x_hat + o) * projected);
        if (gate_out) a = load(gate_out + o) > zero ? a : zero;
        store(out + o, a);
      }
    }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
