// The two maps linearised at their equilibria, in the form that RowSolver wants: u <- J^T u + g.
//
// A tile of rows is linearised once and stays in place until all its rows are solved; its starts are
// free, since J^T 0 + g = g.
#pragma once

#include <cstring>
#include <limits>

#include "maps.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// What both adjoint maps share: the right-hand sides and their norms. A run never has more rows than lanes.
template <class T, int NV>
class AdjointBase {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;
  static constexpr bool kAnswerIsImage = false;

  bool first_is_free() const { return true; }
  Vec<T> scale(int v, Vec<T>) const { return load(scale_ + v * W); }
  void admit(const LaneMoves<T, NV>&) {}  // a run has one tile of rows, staged where they stay

 protected:
  // Solved for g / max|g|, row by row, so that squares neither vanish nor overflow.
  void load_rhs(const T* g, const LaneRows<R>& rows, int64_t tiles, int64_t d) {
    // The rows of a tile are its first lanes; the others must add nothing to a sum.
    if (rows.row[R - 1] < 0) std::memset(g_, 0, sizeof(T) * tiles * d * R);
    rows_to_lanes<T, NV>(g, rows, g_, d);
    const Vec<T> zero{}, one = splat(T(1)), least = splat(std::numeric_limits<T>::min());
    Vec<T> largest[NV] = {}, inverse[NV], sum[NV];
    for (int64_t i = 0; i < d; ++i)
      for (int v = 0; v < NV; ++v) {
        const Vec<T> a = load(g_ + i * R + v * W);
        largest[v] = maximum(largest[v], a < zero ? -a : a);
      }
    for (int v = 0; v < NV; ++v) {
      // u = 0 solves a row of zeros; the inverse of a denormal number overflows, that of a huge one is denormal.
      const Vec<T> magnitude = largest[v] == zero ? one : maximum(largest[v], least);
      inverse[v] = maximum(one / magnitude, least);
      store(magnitude_ + v * W, one / inverse[v]);
    }
    sum_features<T, NV>(d, sum, [&](int64_t i, int v, Vec<T> s) {
      T* at = g_ + i * R + v * W;
      const Vec<T> a = load(at) * inverse[v];
      store(at, a);
      return fma(a, a, s);
    });
    for (int v = 0; v < NV; ++v) {
      const Vec<T> norm = square_root<T>(sum[v]);
      store(scale_ + v * W, norm == zero ? one : norm);
    }
  }
  // A tile, linear in the solution, for the cotangents as they came.
  void rescale(T* tile, int64_t d) const {
    for (int64_t o = 0; o < d * R; o += W) store(tile + o, load(tile + o) * load(magnitude_ + o % R));
  }
  void add_rhs(T* f, int64_t d) const {
    for (int64_t o = 0; o < d * R; o += W) store(f + o, load(f + o) + load(g_ + o));
  }

  T* g_ = nullptr;
  alignas(64) T scale_[R], magnitude_[R];
};

// What the parameters' gradients are made of: for each of the block's two matrices the rows of the cotangent of its
// product and of the vector that it multiplied; for all its vectors their gradients from this tile, (kSums, d), in the
// order of the parameters.
template <class T, int NV>
struct GradientParts {
  Cotangents<T, NV> cotangent[2];
  Inputs<T, NV> input[2];
  T* sums;
};

template <class T, int NV>
struct CellAdjointWeights {
  typename CellMap<T, NV>::Weights forward;
  typename TransposedForm<T, NV>::Matrix w1_transposed, w2_transposed;
};

template <class T, int NV>
class CellAdjoint : public AdjointBase<T, NV> {
  using Base = AdjointBase<T, NV>;
  using Base::R;
  using Base::W;

 public:
  static constexpr int kSums = 8;
  static int64_t tiles(int64_t d, int64_t groups) { return 11 + work_tiles<NV>(d) + (3 * groups + d - 1) / d; }

  CellAdjoint(const CellAdjointWeights<T, NV>& w, const T* z, const T* x, const T* g, int64_t d, int64_t groups, T* memory)
      : w_(w), z_rows_(z), x_rows_(x), g_rows_(g), d_(d), groups_(groups) {
    T** slots[] = {&this->g_, &z_, &h_, &e_, &xh1_, &xh2_, &xh3_, &de_, &dy2_, &pulled_, &dn1_};
    for (T** slot : slots) {
      *slot = memory;
      memory += d * R;
    }
    work_ = memory;
    rstd_ = memory + work_tiles<NV>(d) * d * R;
  }

  void stage(const LaneRows<R>& rows, T* start, bool) {
    const typename CellMap<T, NV>::Weights& f = w_.forward;
    this->load_rhs(g_rows_, rows, tiles(d_, groups_), d_);
    std::memcpy(start, this->g_, sizeof(T) * d_ * R);
    rows_to_lanes<T, NV>(z_rows_, rows, z_, d_);
    rows_to_lanes<T, NV>(x_rows_, rows, de_, d_);
    product<T, NV>(f.w1, z_, work_, f.b1, nullptr, dn1_, d_);
    normalise<T, NV>(dn1_, xh1_, rstd_, d_, groups_, false);
    affine(xh1_, f.g1, f.c1, nullptr, h_, true);
    product<T, NV>(f.w2, h_, work_, f.b2, de_, dn1_, d_);
    normalise<T, NV>(dn1_, xh2_, rstd_ + groups_ * R, d_, groups_, false);
    affine(xh2_, f.g2, f.c2, f.skip ? z_ : nullptr, e_, false);
    normalise<T, NV>(e_, xh3_, rstd_ + 2 * groups_ * R, d_, groups_, true);
  }

  template <Digits kDigits>
  void evaluate(const T* u, T* f, bool) {
    pull<kDigits>(u);
    group_norm_backward<T, NV>(pulled_, h_, w_.forward.g1, xh1_, rstd_, nullptr, dn1_, d_, groups_);
    product<T, NV, kDigits>(w_.w1_transposed, dn1_, work_, nullptr, w_.forward.skip ? de_ : nullptr, f, d_);
    this->add_rhs(f, d_);
  }

  // After the solve: the cotangents of this tile's rows, and what the parameters' gradients need of them, if anything.
  // `solution`: theirs, one after the other. `evaluated`: all of them were what evaluate() was last given.
  void finish(const T* solution, bool evaluated, const LaneRows<R>& rows, T* dx, const GradientParts<T, NV>* parts) {
    T* u = this->g_;  // the right-hand side is no longer needed
    rows_to_lanes<T, NV>(solution, lane_rows<R>(0, rows.count()), u, d_);
    if (!evaluated) pull<Digits::kAll>(u);
    this->rescale(dy2_, d_);
    lanes_to_rows<T, NV>(dy2_, nullptr, rows, dx, d_);
    if (parts == nullptr) return;
    for (T* tile : {u, de_, pulled_}) this->rescale(tile, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(dn1_ + o, load(h_ + o) > Vec<T>{} ? load(pulled_ + o) : Vec<T>{});
    T* sums = parts->sums;
    norm_sums<T, NV>(dn1_, xh1_, sums + 2 * d_, sums + 3 * d_, d_);
    norm_sums<T, NV>(de_, xh2_, sums + 4 * d_, sums + 5 * d_, d_);
    norm_sums<T, NV>(u, xh3_, sums + 6 * d_, sums + 7 * d_, d_);
    group_norm_backward<T, NV>(dn1_, nullptr, w_.forward.g1, xh1_, rstd_, nullptr, dn1_, d_, groups_);
    row_sums<T, NV>(dn1_, sums, d_);
    row_sums<T, NV>(dy2_, sums + d_, d_);
    parts->cotangent[0].take(dn1_, rows);
    parts->input[0].take(z_, rows);
    parts->cotangent[1].take(dy2_, rows);
    parts->input[1].take(h_, rows);
  }

 private:
  // The cotangents at GN2's output (de), W2's output (dy2) and its input (pulled); both norms of a group while it is in
  // the cache.
  template <Digits kDigits>
  void pull(const T* u) {
    const typename CellMap<T, NV>::Weights& f = w_.forward;
    const int64_t width = d_ / groups_;
    for (int64_t g = 0, at = 0; g < groups_; ++g, at += width) {
      const int64_t o = at * R;
      const T *rstd2 = rstd_ + (groups_ + g) * R, *rstd3 = rstd_ + (2 * groups_ + g) * R;
      norm_group_backward<T, NV>(u + o, nullptr, f.g3 + at, xh3_ + o, rstd3, e_ + o, de_ + o, width);
      norm_group_backward<T, NV>(de_ + o, nullptr, f.g2 + at, xh2_ + o, rstd2, nullptr, dy2_ + o, width);
    }
    product<T, NV, kDigits>(w_.w2_transposed, dy2_, work_, nullptr, nullptr, pulled_, d_);
  }

  void affine(const T* x_hat, const T* gamma, const T* beta, const T* skip, T* out, bool rectify) {
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        Vec<T> a = fma(load(x_hat + o), splat(gamma[i]), splat(beta[i]));
        if (skip) a += load(skip + o);
        store(out + o, rectify ? relu(a) : a);
      }
  }

  const CellAdjointWeights<T, NV> w_;
  const T *z_rows_, *x_rows_, *g_rows_;
  const int64_t d_, groups_;
  T *z_, *h_, *e_, *xh1_, *xh2_, *xh3_, *de_, *dy2_, *pulled_, *dn1_, *work_, *rstd_;
};

template <class T, int NV>
struct FuseAdjointWeights {
  typename FuseMap<T, NV>::Weights forward;
  typename TransposedForm<T, NV>::Matrix gate_transposed, fuse_transposed;
};

template <class T, int NV>
class FuseAdjoint : public AdjointBase<T, NV> {
  using Base = AdjointBase<T, NV>;
  using Base::R;
  using Base::W;

 public:
  static constexpr int kSums = 4;
  static int64_t tiles(int64_t d, int64_t groups) { return 12 + work_tiles<NV>(d) + (groups + d - 1) / d; }

  FuseAdjoint(const FuseAdjointWeights<T, NV>& w, const T* z, const FuseRows<T>& from, const T* mask, const T* g, int64_t d,
              int64_t groups, T* memory)
      : w_(w), from_(from), z_rows_(z), mask_rows_(mask), g_rows_(g), d_(d), groups_(groups) {
    T** slots[] = {&this->g_, &z_, &input_, &gate_, &q_, &sign_, &xh_, &mask_, &de_, &dq_, &gated_, &pulled_};
    for (T** slot : slots) {
      *slot = memory;
      memory += d * R;
    }
    work_ = memory;
    rstd_ = memory + work_tiles<NV>(d) * d * R;
  }

  void stage(const LaneRows<R>& rows, T* start, bool) {
    const typename FuseMap<T, NV>::Weights& f = w_.forward;
    this->load_rhs(g_rows_, rows, tiles(d_, groups_), d_);
    std::memcpy(start, this->g_, sizeof(T) * d_ * R);
    rows_to_lanes<T, NV>(z_rows_, rows, z_, d_);
    from_.template cell_sum_to_lanes<NV>(rows, d_, input_, q_);
    from_.template x_to_lanes<NV>(rows, d_, gated_, q_);
    if (mask_rows_) rows_to_lanes<T, NV>(mask_rows_, rows, mask_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(input_ + o, fma(splat(f.modalities), load(z_ + o), load(input_ + o)));
    product<T, NV>(f.gate, input_, work_, nullptr, nullptr, gate_, d_);
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        const Vec<T> a = load(gate_ + o) + splat(f.modalities * f.gate_bias[i]);
        store(gate_ + o, a);
        store(q_ + o, a * load(z_ + o));
      }
    product<T, NV>(f.fuse, q_, work_, f.fuse_bias, nullptr, sign_, d_);
    masked(sign_);
    for (int64_t o = 0; o < d_ * R; o += W) store(sign_ + o, load(sign_ + o) + load(gated_ + o));
    normalise<T, NV>(sign_, xh_, rstd_, d_, groups_, !f.relu_last);
    if (!f.relu_last) return;
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        store(sign_ + o, fma(load(xh_ + o), splat(f.gamma[i]), splat(f.beta[i])));
      }
  }

  template <Digits kDigits>
  void evaluate(const T* u, T* f, bool) {
    pull<kDigits>(u);
    for (int64_t o = 0; o < d_ * R; o += W)
      store(f + o, fma(splat(w_.forward.modalities), load(pulled_ + o), load(dq_ + o) * load(gate_ + o)));
    this->add_rhs(f, d_);
  }

  // As CellAdjoint::finish; matrix 0 is the gate's.
  void finish(const T* solution, bool evaluated, const LaneRows<R>& rows, T* dx, T* dcell_sum,
              const GradientParts<T, NV>* parts) {
    T* u = this->g_;
    rows_to_lanes<T, NV>(solution, lane_rows<R>(0, rows.count()), u, d_);
    if (!evaluated) pull<Digits::kAll>(u);
    T* unmasked = de_;  // x enters behind the mask
    if (mask_rows_) {
      pull_norm(u, unmasked = dq_);
      this->rescale(dq_, d_);
    }
    for (T* tile : {u, de_, gated_, pulled_}) this->rescale(tile, d_);
    lanes_to_rows<T, NV>(unmasked, nullptr, rows, dx, d_);
    lanes_to_rows<T, NV>(pulled_, nullptr, rows, dcell_sum, d_);
    if (parts == nullptr) return;
    if (w_.forward.relu_last)
      for (int64_t o = 0; o < d_ * R; o += W) store(u + o, load(sign_ + o) > Vec<T>{} ? load(u + o) : Vec<T>{});
    row_sums<T, NV>(gated_, parts->sums, d_);
    row_sums<T, NV>(de_, parts->sums + d_, d_);
    norm_sums<T, NV>(u, xh_, parts->sums + 2 * d_, parts->sums + 3 * d_, d_);
    parts->cotangent[0].take(gated_, rows);
    parts->input[0].take(input_, rows);
    parts->cotangent[1].take(de_, rows);
    parts->input[1].take(q_, rows);
  }

 private:
  // Through the last norm.
  void pull_norm(const T* u, T* out) {
    const T *gate_in = w_.forward.relu_last ? sign_ : nullptr, *gate_out = w_.forward.relu_last ? nullptr : sign_;
    group_norm_backward<T, NV>(u, gate_in, w_.forward.gamma, xh_, rstd_, gate_out, out, d_, groups_);
  }

  // The cotangents at W_f's output (de) and input (dq), at the gate (gated) and, over N, at its input (pulled).
  template <Digits kDigits>
  void pull(const T* u) {
    pull_norm(u, de_);
    masked(de_);
    product<T, NV, kDigits>(w_.fuse_transposed, de_, work_, nullptr, nullptr, dq_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(gated_ + o, load(dq_ + o) * load(z_ + o));
    product<T, NV, kDigits>(w_.gate_transposed, gated_, work_, nullptr, nullptr, pulled_, d_);
  }
  void masked(T* t) {
    if (mask_rows_)
      for (int64_t o = 0; o < d_ * R; o += W) store(t + o, load(t + o) * load(mask_ + o));
  }

  const FuseAdjointWeights<T, NV> w_;
  const FuseRows<T> from_;
  const T *z_rows_, *mask_rows_, *g_rows_;
  const int64_t d_, groups_;
  T *z_, *input_, *gate_, *q_, *sign_, *xh_, *mask_, *de_, *dq_, *gated_, *pulled_, *work_, *rstd_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
