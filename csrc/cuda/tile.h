// The part of an adjoint that both block kinds share: the cotangents of a tile's rows, and each row's solve.
//
// Written against a policy P (cuda_policy.cuh, host_policy.h), which is a block of threads:
//   for_rows(count, f)   f(lanes, r) for every row, a row by the lanes of one warp
//   each(n, f)           f(i), i shared out over all threads
//   any(count, f)        whether f(r) holds for any row; a barrier
//   sync()               a barrier
//   product(...)         out = scale * A in + bias_scale * bias + add, begins and ends with a barrier
// and `lanes` is a warp, or a part of one:
//   each(n, f), sum(n, f), sum2(n, f), largest(n, f)     over the values of a row; all lanes get the result
//   groups(count, n, f)  f(lanes, g) for each group of n values, by a part of the lanes
//   once(f)              f() by one lane
// What one of these writes the next one reads, within a row; across rows there must be a barrier between.
#pragma once

#include "../common/group_norm.h"
#include "lanes.h"
#include "problem.h"

#ifdef __CUDACC__
#define DEQFUSE_BODY __device__ __forceinline__
#else
#define DEQFUSE_BODY inline
#endif

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
struct Matrix {
  const T* a;  // (d, d), row-major
  int stride;
};

// out = scale * A in + bias_scale * bias + add; bias (d) and add (a slot) may be null.
template <class T>
struct Dressing {
  T scale = T(1), bias_scale = T(1);
  const T *bias = nullptr, *add = nullptr;
};

template <class T, int kRows>
class Tile {
 public:
  // `first`: the tile's first row within its block; `product_slot`: where products leave their results.
  DEQFUSE_BODY Tile(const AdjointProblem<T>& problem, int block, int tile, const TileMemory<T, kRows>& memory,
                    int product_slot)
      : p(problem),
        m(memory),
        d(problem.d),
        groups(problem.groups),
        width(problem.d / problem.groups),
        product_slot_(product_slot),
        tile_(tile),
        block_(block),
        first(int64_t(block) * problem.rows + int64_t(tile) * kRows),
        count(int(problem.rows - int64_t(tile) * kRows < kRows ? problem.rows - int64_t(tile) * kRows : kRows)),
        cotangents_(problem.g + block * problem.g_stride + int64_t(tile) * kRows * problem.d),
        q(problem.params[block]) {}

  // Row r of a matrix of all rows.
  template <class A>
  DEQFUSE_BODY A* row_of(A* matrix, int r) const {
    return matrix + (first + r) * d;
  }

  // Places without a row take part in products. Nobody reads what becomes of them, but what is read has been written.
  template <class P>
  DEQFUSE_BODY void clear_idle(P& policy) {
    const int idle = (kRows - count) * d;
    policy.each(idle,
                [&](int i) { m.slot(kWork, count + i / d)[i % d] = m.slot(kExtra, count + i / d)[i % d] = T(0); });
  }

  // Where every row starts.
  template <class Lanes>
  DEQFUSE_BODY void begin_row(const Lanes& lanes, int r) {
    const T* g = cotangents_ + int64_t(r) * d;
    T *x = m.slot(kX, r), *residual = m.slot(kResidual, r), *shadow = m.slot(kShadow, r),
      *direction = m.slot(kDirection, r);
    T* u = row_of(p.u, r);
    T largest = lanes.largest(d, [&](int i) { return g[i] < T(0) ? -g[i] : g[i]; });
    if (largest == T(0)) largest = T(1);  // u = 0 solves such a row
    const bool from_zero = p.options.method == Method::kBiCGStab;
    const T squares = lanes.sum(d, [&](int i) {
      const T a = g[i] / largest;
      residual[i] = shadow[i] = direction[i] = a;
      x[i] = from_zero ? T(0) : a;
      u[i] = p.options.method == Method::kSeries ? a : T(0);
      return a * a;
    });
    LinearRow<T> row;
    row.begin(largest, squares, p.options);
    end_row(lanes, r, row);
  }

  // The vector that the row's next application of J^T is for.
  DEQFUSE_BODY const T* operand(int r) const {
    switch (m.row(r).phase) {
      case Phase::kDirection:
        return m.slot(kDirection, r);
      case Phase::kStabilise:
        return m.slot(kResidual, r);
      default:
        return m.slot(kX, r);
    }
  }
  DEQFUSE_BODY bool active(int r) const { return m.row(r).phase != Phase::kDone; }

  // An application of J^T has arrived: the row's next step.
  template <class Lanes>
  DEQFUSE_BODY void advance_row(const Lanes& lanes, int r) {
    LinearRow<T> row = m.row(r);
    T *image = m.slot(product_slot_, r), *x = m.slot(kX, r), *residual = m.slot(kResidual, r);
    T *shadow = m.slot(kShadow, r), *direction = m.slot(kDirection, r), *v = m.slot(kV, r), *u = row_of(p.u, r);
    const T* g = cotangents_ + int64_t(r) * d;
    if (row.phase == Phase::kDirection) {
      const T shadow_v = lanes.sum(d, [&](int i) {
        v[i] = direction[i] - image[i];
        return shadow[i] * v[i];
      });
      row.along_direction(shadow_v);
      lanes.each(d, [&](int i) { residual[i] -= row.alpha * v[i]; });
    } else if (row.phase == Phase::kStabilise) {
      const Two<T> dots = lanes.sum2(d, [&](int i) {
        const T t = residual[i] - image[i];
        image[i] = t;
        return Two<T>{t * residual[i], t * t};
      });
      const T omega = row.stabilising_step(dots.a, dots.b);
      const Two<T> next = lanes.sum2(d, [&](int i) {
        const T s = residual[i], a = s - omega * image[i];
        x[i] += row.alpha * direction[i] + omega * s;
        residual[i] = a;
        return Two<T>{a * a, shadow[i] * a};
      });
      T beta;
      if (row.continues(next.a, next.b, omega, p.options, beta))
        lanes.each(d, [&](int i) { direction[i] = residual[i] + beta * (direction[i] - omega * v[i]); });
      else if (row.phase == Phase::kDirection)
        lanes.each(d, [&](int i) { shadow[i] = direction[i] = residual[i]; });
    } else if (row.phase == Phase::kCheck) {
      const T squares = lanes.sum(d, [&](int i) {
        const T a = g[i] / row.magnitude - x[i] + image[i];
        residual[i] = shadow[i] = direction[i] = a;
        return a * a;
      });
      if (row.check(squares, p.options)) lanes.each(d, [&](int i) { u[i] = x[i]; });
    } else if (row.phase == Phase::kPicard) {
      const T squares = lanes.sum(d, [&](int i) {
        const T a = image[i] + g[i] / row.magnitude - x[i];
        residual[i] = a;
        return a * a;
      });
      if (row.picard(squares, p.options)) lanes.each(d, [&](int i) { u[i] = x[i]; });
      lanes.each(d, [&](int i) { x[i] += p.options.damping * residual[i]; });
    } else {
      row.term(p.options);
      lanes.each(d, [&](int i) { u[i] = x[i] = image[i] + g[i] / row.magnitude; });
    }
    end_row(lanes, r, row);
  }

  // The row's answer for the cotangents as they came, in kX. A poisoned row must not look solved.
  template <class Lanes>
  DEQFUSE_BODY void load_answer(const Lanes& lanes, int r) {
    const LinearRow<T> row = m.row(r);
    const bool poisoned = row.outcome == Outcome::kNonFinite;
    const T* u = row_of(p.u, r);
    T* x = m.slot(kX, r);
    lanes.each(d, [&](int i) { x[i] = poisoned ? kNaN<T> : u[i] * row.magnitude; });
  }

  // Sums over the tile's rows of f(row, feature): the gradient of vector `kind` of `kinds`.
  template <class P, class F>
  DEQFUSE_BODY void sum_rows(P& policy, int kind, int kinds, F f) {
    const int64_t tiles = (p.rows + kRows - 1) / kRows;
    T* out = p.sums + ((int64_t(block_) * tiles + tile_) * kinds + kind) * d;
    policy.each(d, [&](int i) {
      T sum = f(0, i);
      for (int r = 1; r < count; ++r) sum += f(r, i);
      out[i] = sum;
    });
  }

  // Mean and inverse standard deviation of a group of n values f(i).
  template <class Lanes, class F>
  static DEQFUSE_BODY Two<T> moments(const Lanes& lanes, int n, F f) {
    const T inv = T(1) / T(n), mean = lanes.sum(n, f) * inv;
    const T squares = lanes.sum(n, [&](int i) {
      const T a = f(i) - mean;
      return a * a;
    });
    return {mean, inverse_deviation<ScalarLane<T>>(squares, inv)};
  }

 protected:
  const AdjointProblem<T>& p;
  const TileMemory<T, kRows> m;
  const int d, groups, width, product_slot_, tile_, block_;

 public:
  const int64_t first;  // among the rows of all blocks
  const int count;      // rows that there are

 protected:
  const T* const cotangents_;
  const T* const* const q;  // the block's parameters

 private:
  template <class Lanes>
  DEQFUSE_BODY void end_row(const Lanes& lanes, int r, const LinearRow<T>& row) {
    lanes.once([&] {
      m.row(r) = row;
      if (row.phase != Phase::kDone) return;
      const int64_t at = first + r;
      p.residual[at] = p.options.method == Method::kSeries ? kNaN<T> : row.best;
      p.nfe[at] = row.nfe;
      p.outcome[at] = int8_t(row.outcome);
    });
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
