// The two maps linearised at given states, a tile of rows at a time: what their adjoint and their penalty start from.
#pragma once

#include "maps.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Points each slot to a tile of d * R values, one after the other; the end of the last.
template <class T, int R, size_t kCount>
T* place_tiles(T** const (&slots)[kCount], int64_t d, T* memory) {
  for (T** slot : slots) {
    *slot = memory;
    memory += d * R;
  }
  return memory;
}

template <class T, int NV>
struct CellLinearWeights {
  typename CellMap<T, NV>::Weights forward;
  typename TransposedForm<T, NV>::Matrix w1_transposed, w2_transposed;

  // Of block `i` of the matrices, whose parameters begin at q.
  template <class Straight, class Transposed>
  CellLinearWeights(const Straight& straight, const Transposed& transposed, int64_t i, const T* const* q, bool skip)
      : forward{straight.at(i, 0), straight.at(i, 1), q[1], q[3], q[4], q[5], q[6], q[7], q[8], q[9], nullptr, skip},
        w1_transposed(transposed.at(i, 0)),
        w2_transposed(transposed.at(i, 1)) {}
};

// Of a residual cell: x_hat and rstd of its norms, h and the signs of e, at the states z.
template <class T, int NV>
struct LinearCell {
  static constexpr int W = kLanes<T>, R = NV * W;
  static int64_t tiles(int64_t d, int64_t groups) { return 6 + (3 * groups + d - 1) / d; }

  const CellLinearWeights<T, NV> w;
  const int64_t d, groups;
  T *z, *h, *e, *xh1, *xh2, *xh3, *rstd;

  LinearCell(const CellLinearWeights<T, NV>& weights, int64_t features, int64_t groups_, T* memory)
      : w(weights), d(features), groups(groups_) {
    T** slots[] = {&z, &h, &e, &xh1, &xh2, &xh3};
    rstd = place_tiles<T, R>(slots, d, memory);
  }

  // `x`, `y`: a tile each to work in.
  void take(const T* z_rows, const T* x_rows, const LaneRows<R>& rows, T* x, T* y, T* work) {
    const typename CellMap<T, NV>::Weights& f = w.forward;
    rows_to_lanes<T, NV>(z_rows, rows, z, d);
    rows_to_lanes<T, NV>(x_rows, rows, x, d);
    product<T, NV>(f.w1, z, work, f.b1, nullptr, y, d);
    normalise<T, NV>(y, xh1, rstd, d, groups, false);
    affine(xh1, f.g1, f.c1, nullptr, h, true);
    product<T, NV>(f.w2, h, work, f.b2, x, y, d);
    normalise<T, NV>(y, xh2, rstd + groups * R, d, groups, false);
    affine(xh2, f.g2, f.c2, f.skip ? z : nullptr, e, false);
    normalise<T, NV>(e, xh3, rstd + 2 * groups * R, d, groups, true);
  }

  // From a cotangent of the map's value to those at GN2's output (de) and W2's output (dy2); both norms of a group
  // while it is in the cache. `projected` (2 groups, R): what norm_group_backward() says of GN2 and GN3, or null.
  void pull(const T* u, T* de, T* dy2, T* projected = nullptr) const {
    const typename CellMap<T, NV>::Weights& f = w.forward;
    const int64_t width = d / groups;
    for (int64_t g = 0, at = 0; g < groups; ++g, at += width) {
      const int64_t o = at * R;
      const T *rstd2 = rstd + (groups + g) * R, *rstd3 = rstd + (2 * groups + g) * R;
      T* const p2 = projected ? projected + g * R : nullptr;
      T* const p3 = projected ? projected + (groups + g) * R : nullptr;
      norm_group_backward<T, NV>(u + o, nullptr, f.g3 + at, xh3 + o, rstd3, e + o, de + o, width, p3);
      norm_group_backward<T, NV>(de + o, nullptr, f.g2 + at, xh2 + o, rstd2, nullptr, dy2 + o, width, p2);
    }
  }

 private:
  void affine(const T* x_hat, const T* gamma, const T* beta, const T* skip, T* out, bool rectify) {
    for (int64_t i = 0; i < d; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        Vec<T> a = fma(load(x_hat + o), splat(gamma[i]), splat(beta[i]));
        if (skip) a += load(skip + o);
        store(out + o, rectify ? relu(a) : a);
      }
  }
};

template <class T, int NV>
struct FuseLinearWeights {
  typename FuseMap<T, NV>::Weights forward;
  typename TransposedForm<T, NV>::Matrix gate_transposed, fuse_transposed;

  template <class Straight, class Transposed>
  FuseLinearWeights(const Straight& straight, const Transposed& transposed, int64_t i, const T* const* q,
                    bool relu_last)
      : forward{straight.at(i, 0), straight.at(i, 1), q[1], q[3], q[4], q[5], relu_last},
        gate_transposed(transposed.at(i, 0)),
        fuse_transposed(transposed.at(i, 1)) {}
};

// Of the fuse step: the gate and what it is made of (input = N z + S), q = z * gate, x_hat and rstd of the norm, and in
// `sign` what its relu looks at.
template <class T, int NV>
struct LinearFuse {
  static constexpr int W = kLanes<T>, R = NV * W;
  static int64_t tiles(int64_t d, int64_t groups) { return 7 + (groups + d - 1) / d; }

  const FuseLinearWeights<T, NV> w;
  const int64_t d, groups;
  const bool has_mask;
  alignas(64) T modalities[R];  // of each lane's row
  T *z, *input, *gate, *q, *sign, *xh, *mask, *rstd;

  LinearFuse(const FuseLinearWeights<T, NV>& weights, bool masked, int64_t features, int64_t groups_, T* memory)
      : w(weights), d(features), groups(groups_), has_mask(masked) {
    T** slots[] = {&z, &input, &gate, &q, &sign, &xh, &mask};
    rstd = place_tiles<T, R>(slots, d, memory);
  }

  // `x`: a tile to work in. `mask_rows` may be null without a mask.
  void take(const T* z_rows, const FuseRows<T>& from, const T* mask_rows, const LaneRows<R>& rows, T* x, T* work) {
    const typename FuseMap<T, NV>::Weights& f = w.forward;
    rows_to_lanes<T, NV>(z_rows, rows, z, d);
    from.take_cell_sum(RowsAsLanes<T, NV>(d), rows, input, q);
    from.take_x(RowsAsLanes<T, NV>(d), rows, x, q);
    if (has_mask) rows_to_lanes<T, NV>(mask_rows, rows, mask, d);
    for (int l = 0; l < R; ++l) modalities[l] = rows.row[l] < 0 ? T(0) : T(from.count(rows.row[l]));
    for (int64_t o = 0; o < d * R; o += W) store(input + o, fma(count(o), load(z + o), load(input + o)));
    product<T, NV>(f.gate, input, work, nullptr, nullptr, gate, d);
    for (int64_t i = 0; i < d; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        const Vec<T> a = load(gate + o) + count(o) * splat(f.gate_bias[i]);
        store(gate + o, a);
        store(q + o, a * load(z + o));
      }
    product<T, NV>(f.fuse, q, work, f.fuse_bias, nullptr, sign, d);
    masked(sign);
    for (int64_t o = 0; o < d * R; o += W) store(sign + o, load(sign + o) + load(x + o));
    normalise<T, NV>(sign, xh, rstd, d, groups, !f.relu_last);
    if (!f.relu_last) return;
    for (int64_t i = 0; i < d; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        store(sign + o, fma(load(xh + o), splat(f.gamma[i]), splat(f.beta[i])));
      }
  }

  // From a cotangent of the map's value to that in front of the norm, before the mask. `projected` (groups, R) or null.
  void pull(const T* u, T* out, T* projected = nullptr) const {
    const T *gate_in = w.forward.relu_last ? sign : nullptr, *gate_out = w.forward.relu_last ? nullptr : sign;
    group_norm_backward<T, NV>(u, gate_in, w.forward.gamma, xh, rstd, gate_out, out, d, groups, projected);
  }
  void masked(T* t) const {
    if (has_mask)
      for (int64_t o = 0; o < d * R; o += W) store(t + o, load(t + o) * load(mask + o));
  }
  // N of the rows at a tile's offset.
  Vec<T> count(int64_t o) const { return load(modalities + o % R); }
  // The gate's bias enters N times: its gradient from this tile, of the cotangent at the gate.
  void gate_bias_sums(const T* t, T* out) const {
    sum_lanes<T, NV>(out, d, [&](int64_t i, int v) { return count(v * W) * load(t + i * R + v * W); });
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
