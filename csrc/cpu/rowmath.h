// Arithmetic along the features of each sample of a tile: GroupNorm forward and backward, dots; sums over
// the rows of a tile.
#pragma once

#include <cmath>

#include "../common/group_norm.h"
#include "lanes.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Sum of body(k, v) over k < count for each vector of a row of the tile. Several partial sums, since one would wait
// for its own latency; which term goes to which depends on k alone, so a row's sum does not depend on the tile's width.
template <class T, int NV, class Body>
DEQFUSE_INLINE void sum_features(int64_t count, Vec<T> (&sum)[NV], Body body) {
  Vec<T> part[4][NV] = {};
  int64_t k = 0;
  for (; k + 4 <= count; k += 4)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) part[q][v] = body(k + q, v, part[q][v]);
  for (; k < count; ++k)
    for (int v = 0; v < NV; ++v) part[0][v] = body(k, v, part[0][v]);
  for (int v = 0; v < NV; ++v) sum[v] = (part[0][v] + part[1][v]) + (part[2][v] + part[3][v]);
}

// As sum_features, over `count` numbers of one row: add(s, a) adds the terms of a to s, of four neighbours or of one.
template <class T, class Add>
DEQFUSE_INLINE T sum_row(const T* row, int64_t count, Add add) {
  Four<T> part{};
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    Four<T> a;
    std::memcpy(&a, row + k, sizeof a);
    part = add(part, a);
  }
  T first = part[0];
  for (; k < count; ++k) first = add(first, row[k]);
  return (first + part[1]) + (part[2] + part[3]);
}

// Several such sums: body(k, v, part) adds its terms to part[0], part[1], ...
template <class T, int NV, int kSums, class Body>
DEQFUSE_INLINE void sum_features(int64_t count, Vec<T> (&sums)[NV][kSums], Body body) {
  for (int v = 0; v < NV; ++v) {
    Vec<T> part[4][kSums] = {};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) body(k + q, v, part[q]);
    for (; k < count; ++k) body(k, v, part[0]);
    for (int i = 0; i < kSums; ++i) sums[v][i] = (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]);
  }
}

// Mean and 1 / sqrt(var + eps) of one group of every sample, in two passes so that no digits cancel.
template <class T, int NV>
DEQFUSE_INLINE void moments(const T* y, int64_t width, bool rectify, Vec<T> (&mean)[NV], Vec<T> (&rstd)[NV]) {
  constexpr int W = kLanes<T>, R = NV * W;
  const Vec<T> inv = splat(T(1) / T(width));
  Vec<T> square[NV];
  if (rectify)
    sum_features<T, NV>(width, mean, [&](int64_t k, int v, Vec<T> s) { return s + relu(load(y + k * R + v * W)); });
  else sum_features<T, NV>(width, mean, [&](int64_t k, int v, Vec<T> s) { return s + load(y + k * R + v * W); });
  for (int v = 0; v < NV; ++v) mean[v] *= inv;
  if (rectify)
    sum_features<T, NV>(width, square, [&](int64_t k, int v, Vec<T> s) {
      const Vec<T> a = relu(load(y + k * R + v * W)) - mean[v];
      return fma(a, a, s);
    });
  else
    sum_features<T, NV>(width, square, [&](int64_t k, int v, Vec<T> s) {
      const Vec<T> a = load(y + k * R + v * W) - mean[v];
      return fma(a, a, s);
    });
  for (int v = 0; v < NV; ++v) rstd[v] = inverse_deviation<VecLane<T>>(square[v], T(1) / T(width));
}

// How one GroupNorm of the layer is dressed: relu on its input, a skip added to its output, relu last.
struct NormForm {
  bool rectify_input = false, rectify_output = false;
};

// One group of `width` features: y <- [relu](norm([relu] y) * gamma + beta [+ skip])
template <class T, int NV>
void norm_group(T* __restrict y, const T* gamma, const T* beta, const T* skip, int64_t width, NormForm form) {
  constexpr int W = kLanes<T>, R = NV * W;
  Vec<T> mean[NV], rstd[NV];
  moments<T, NV>(y, width, form.rectify_input, mean, rstd);
  for (int64_t k = 0; k < width; ++k) {
    const Vec<T> scale = splat(gamma[k]), shift = splat(beta[k]);
    for (int v = 0; v < NV; ++v) {
      T* p = y + k * R + v * W;
      Vec<T> a = load(p);
      a = standardised<VecLane<T>>(form.rectify_input ? relu(a) : a, mean[v], rstd[v]);
      a = fma(a, scale, shift);
      if (skip) a += load(skip + k * R + v * W);
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
  for (int64_t g = 0; g < groups; ++g) {
    Vec<T> mean[NV], inv[NV];
    moments<T, NV>(y + g * width * R, width, rectify, mean, inv);
    for (int64_t k = g * width; k < (g + 1) * width; ++k)
      for (int v = 0; v < NV; ++v) {
        const Vec<T> a = load(y + k * R + v * W);
        store(x_hat + k * R + v * W, standardised<VecLane<T>>(rectify ? relu(a) : a, mean[v], inv[v]));
      }
    for (int v = 0; v < NV; ++v) store(rstd + g * R + v * W, inv[v]);
  }
}

// One group: write(k, v, S s) for s = value(k, v), which is asked twice; S the symmetric part of GroupNorm's Jacobian,
//   S s = rstd (s - mean(s) - x_hat mean(s x_hat)).
// `projected` receives mean(s x_hat) unless it is null.
template <class T, int NV, class Value, class Write>
DEQFUSE_INLINE void norm_group_symmetric(const T* x_hat, const T* rstd, T* projected, int64_t width, Value value,
                                         Write write) {
  constexpr int W = kLanes<T>, R = NV * W;
  const Vec<T> inv = splat(T(1) / T(width));
  Vec<T> sums[NV][2];
  sum_features<T, NV>(width, sums, [&](int64_t k, int v, Vec<T>(&s)[2]) {
    const Vec<T> a = value(k, v);
    s[0] += a;
    s[1] = fma(a, load(x_hat + k * R + v * W), s[1]);
  });
  for (int v = 0; v < NV; ++v) {
    const Vec<T> r = load(rstd + v * W), m = sums[v][0] * inv, p = sums[v][1] * inv;
    if (projected) store(projected + v * W, p);
    for (int64_t k = 0; k < width; ++k)
      write(k, v, norm_symmetric<VecLane<T>>(value(k, v), m, load(x_hat + k * R + v * W), p, r));
  }
}

// One group: out = S (gamma * t). t is first set to zero where `gate_in` <= 0, the result where `gate_out` <= 0 (either
// may be null). `projected` as above.
template <class T, int NV>
void norm_group_backward(const T* t, const T* gate_in, const T* gamma, const T* x_hat, const T* rstd,
                         const T* gate_out, T* out, int64_t width, T* projected = nullptr) {
  constexpr int W = kLanes<T>, R = NV * W;
  const Vec<T> zero{};
  norm_group_symmetric<T, NV>(
      x_hat, rstd, projected, width,
      [&](int64_t k, int v) {
        const int64_t o = k * R + v * W;
        Vec<T> a = load(t + o) * splat(gamma[k]);
        if (gate_in) a = load(gate_in + o) > zero ? a : zero;
        return a;
      },
      [&](int64_t k, int v, Vec<T> a) {
        const int64_t o = k * R + v * W;
        if (gate_out) a = load(gate_out + o) > zero ? a : zero;
        store(out + o, a);
      });
}

// All groups; `projected`: (groups, R) or null.
template <class T, int NV>
void group_norm_backward(const T* t, const T* gate_in, const T* gamma, const T* x_hat, const T* rstd,
                         const T* gate_out, T* out, int64_t d, int64_t groups, T* projected = nullptr) {
  constexpr int R = NV * kLanes<T>;
  const int64_t width = d / groups;
  for (int64_t g = 0, at = 0; g < groups; ++g, at += width) {
    const int64_t o = at * R;
    norm_group_backward<T, NV>(t + o, gate_in ? gate_in + o : nullptr, gamma + at, x_hat + o, rstd + g * R,
                               gate_out ? gate_out + o : nullptr, out + o, width,
                               projected ? projected + g * R : nullptr);
  }
}

// One group of what a function <t, S s> of a norm's derivative passes on: each(k, v, S t, its gradient with respect to
// the norm's input). `s`: S s, whose x_hat component before S was `projected` = mean(s x_hat).
template <class T, int NV, class Each>
DEQFUSE_INLINE void norm_group_slope(const T* t, const T* s, const T* projected, const T* x_hat, const T* rstd,
                                     int64_t width, Each each) {
  constexpr int W = kLanes<T>, R = NV * W;
  const Vec<T> inv = splat(T(1) / T(width));
  Vec<T> sums[NV][3];
  sum_features<T, NV>(width, sums, [&](int64_t k, int v, Vec<T>(&part)[3]) {
    const int64_t o = k * R + v * W;
    const Vec<T> a = load(t + o);
    part[0] += a;
    part[1] = fma(a, load(x_hat + o), part[1]);
    part[2] = fma(a, load(s + o), part[2]);
  });
  for (int v = 0; v < NV; ++v) {
    const Vec<T> r = load(rstd + v * W), before = load(projected + v * W);
    const Vec<T> mean = sums[v][0] * inv, along = sums[v][1] * inv, both = sums[v][2] * inv;
    for (int64_t k = 0; k < width; ++k) {
      const int64_t o = k * R + v * W;
      const Vec<T> x = load(x_hat + o), pulled = norm_symmetric<VecLane<T>>(load(t + o), mean, x, along, r);
      each(k, v, pulled, norm_slope<VecLane<T>>(x, both, pulled, before, load(s + o), along, r));
    }
  }
}

// The sum over the lanes of each of m, in the order of a tree.
template <class T>
DEQFUSE_INLINE Vec<T> sums_of_lanes(Vec<T> (&m)[kLanes<T>]) {
  transpose<T>(m);
#pragma GCC unroll 16
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int l = 0; l < half; ++l) m[l] += m[l + half];
  return m[0];
}

// out[i] = the sum of term(i, v) over all lanes.
template <class T, int NV, class Term>
DEQFUSE_INLINE void sum_lanes(T* out, int64_t d, Term term) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < d; i += W) {
    Vec<T> m[W] = {};
    for (int q = 0; q < W && i + q < d; ++q)
      for (int v = 0; v < NV; ++v) m[q] += term(i + q, v);
    store_some(out + i, sums_of_lanes<T>(m), d - i);
  }
}

// The sums over a tile's rows.
template <class T, int NV>
void row_sums(const T* t, T* out, int64_t d) {
  sum_lanes<T, NV>(out, d, [&](int64_t i, int v) { return load(t + (i * NV + v) * kLanes<T>); });
}

// Gradients of a norm's weight and bias from one tile: the sums over its rows of t * x_hat and of t.
template <class T, int NV>
void norm_sums(const T* t, const T* x_hat, T* weight, T* bias, int64_t d) {
  sum_lanes<T, NV>(weight, d, [&](int64_t i, int v) {
    const int64_t o = (i * NV + v) * kLanes<T>;
    return load(t + o) * load(x_hat + o);
  });
  row_sums<T, NV>(t, bias, d);
}

// a . b for two rows. Four partial sums: one would wait for its own latency.
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int q = 0; q < 4; ++q)
      sums[q] = fma(load_unaligned(a + i + q * W), load_unaligned(b + i + q * W), sums[q]);
  const Vec<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int l = 0; l < W; ++l) sum += total[l];
  for (; i < n; ++i) sum = std::fma(a[i], b[i], sum);
  return sum;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
