// The two maps linearised at their equilibria, in the form that RowSolver wants: u <- J^T u + g.
//
// A tile of rows is linearised once and stays in place until all its rows are solved; its starts are
// free, since J^T 0 + g = g.
#pragma once

#include <cstring>
#include <limits>

#include "gradients.h"
#include "linearisation.h"

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
  T magnitude(int lane) const { return magnitude_[lane]; }  // what the lane's right-hand side was divided by
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

template <class T, int NV>
class CellAdjoint : public AdjointBase<T, NV> {
  using Base = AdjointBase<T, NV>;
  using Base::R;
  using Base::W;
  using Linear = LinearCell<T, NV>;

 public:
  static constexpr int kSums = 8;
  static int64_t tiles(int64_t d, int64_t groups) { return 5 + work_tiles<NV>(d) + Linear::tiles(d, groups); }

  CellAdjoint(const CellLinearWeights<T, NV>& w, const T* z, const T* x, const T* g, int64_t d, int64_t groups, T* memory)
      : at_(w, d, groups, memory + d * R), z_rows_(z), x_rows_(x), g_rows_(g), d_(d), groups_(groups) {
    this->g_ = memory;
    T** slots[] = {&de_, &dy2_, &pulled_, &dn1_};
    work_ = place_tiles<T, R>(slots, d, memory + (1 + Linear::tiles(d, groups)) * d * R);
  }

  void stage(const LaneRows<R>& rows, T* start, bool) {
    this->load_rhs(g_rows_, rows, tiles(d_, groups_), d_);
    std::memcpy(start, this->g_, sizeof(T) * d_ * R);
    at_.take(z_rows_, x_rows_, rows, de_, dn1_, work_);
  }

  template <Digits kDigits>
  void evaluate(const T* u, T* f, bool) {
    pull<kDigits>(u);
    group_norm_backward<T, NV>(pulled_, at_.h, at_.w.forward.g1, at_.xh1, at_.rstd, nullptr, dn1_, d_, groups_);
    product<T, NV, kDigits>(at_.w.w1_transposed, dn1_, work_, nullptr, at_.w.forward.skip ? de_ : nullptr, f, d_);
    this->add_rhs(f, d_);
  }

  // After the solve: the cotangents of this tile's rows, and what the parameters' gradients need of them, if anything.
  // `solution`: theirs, one after the other. `evaluated`: all of them were what evaluate() was last given. `place`:
  // theirs in `parts`.
  void finish(const T* solution, bool evaluated, const LaneRows<R>& rows, T* dx, const GradientParts<T, NV>* parts,
              const LaneRows<R>& place) {
    T* u = this->g_;  // the right-hand side is no longer needed
    rows_to_lanes<T, NV>(solution, lane_rows<R>(0, rows.count()), u, d_);
    if (!evaluated) pull<Digits::kAll>(u);
    this->rescale(dy2_, d_);
    lanes_to_rows<T, NV>(dy2_, nullptr, rows, dx, d_);
    if (parts == nullptr) return;
    for (T* tile : {u, de_, pulled_}) this->rescale(tile, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(dn1_ + o, load(at_.h + o) > Vec<T>{} ? load(pulled_ + o) : Vec<T>{});
    T* sums = parts->sums;
    norm_sums<T, NV>(dn1_, at_.xh1, sums + 2 * d_, sums + 3 * d_, d_);
    norm_sums<T, NV>(de_, at_.xh2, sums + 4 * d_, sums + 5 * d_, d_);
    norm_sums<T, NV>(u, at_.xh3, sums + 6 * d_, sums + 7 * d_, d_);
    group_norm_backward<T, NV>(dn1_, nullptr, at_.w.forward.g1, at_.xh1, at_.rstd, nullptr, dn1_, d_, groups_);
    row_sums<T, NV>(dn1_, sums, d_);
    row_sums<T, NV>(dy2_, sums + d_, d_);
    parts->cotangent[0].take(dn1_, place);
    parts->input[0].take(at_.z, place);
    parts->cotangent[1].take(dy2_, place);
    parts->input[1].take(at_.h, place);
  }

 private:
  // The cotangents at GN2's output (de), W2's output (dy2) and its input (pulled).
  template <Digits kDigits>
  void pull(const T* u) {
    at_.pull(u, de_, dy2_);
    product<T, NV, kDigits>(at_.w.w2_transposed, dy2_, work_, nullptr, nullptr, pulled_, d_);
  }

  Linear at_;
  const T *z_rows_, *x_rows_, *g_rows_;
  const int64_t d_, groups_;
  T *de_, *dy2_, *pulled_, *dn1_, *work_;
};

template <class T, int NV>
class FuseAdjoint : public AdjointBase<T, NV> {
  using Base = AdjointBase<T, NV>;
  using Base::R;
  using Base::W;
  using Linear = LinearFuse<T, NV>;

 public:
  static constexpr int kSums = 4;
  static int64_t tiles(int64_t d, int64_t groups) { return 5 + work_tiles<NV>(d) + Linear::tiles(d, groups); }

  FuseAdjoint(const FuseLinearWeights<T, NV>& w, const T* z, const FuseRows<T>& from, const T* mask, const T* g, int64_t d,
              int64_t groups, T* memory)
      : at_(w, mask != nullptr, d, groups, memory + d * R), from_(from), z_rows_(z), mask_rows_(mask), g_rows_(g), d_(d),
        groups_(groups) {
    this->g_ = memory;
    T** slots[] = {&de_, &dq_, &gated_, &pulled_};
    work_ = place_tiles<T, R>(slots, d, memory + (1 + Linear::tiles(d, groups)) * d * R);
  }

  void stage(const LaneRows<R>& rows, T* start, bool) {
    this->load_rhs(g_rows_, rows, tiles(d_, groups_), d_);
    std::memcpy(start, this->g_, sizeof(T) * d_ * R);
    at_.take(z_rows_, from_, mask_rows_, rows, gated_, work_);
  }

  template <Digits kDigits>
  void evaluate(const T* u, T* f, bool) {
    pull<kDigits>(u);
    for (int64_t o = 0; o < d_ * R; o += W)
      store(f + o, fma(at_.count(o), load(pulled_ + o), load(dq_ + o) * load(at_.gate + o)));
    this->add_rhs(f, d_);
  }

  // As CellAdjoint::finish; matrix 0 is the gate's.
  void finish(const T* solution, bool evaluated, const LaneRows<R>& rows, T* dx, T* dcell_sum,
              const GradientParts<T, NV>* parts, const LaneRows<R>& place) {
    T* u = this->g_;
    rows_to_lanes<T, NV>(solution, lane_rows<R>(0, rows.count()), u, d_);
    if (!evaluated) pull<Digits::kAll>(u);
    T* unmasked = de_;  // x enters behind the mask
    if (mask_rows_) {
      at_.pull(u, unmasked = dq_);
      this->rescale(dq_, d_);
    }
    for (T* tile : {u, de_, gated_, pulled_}) this->rescale(tile, d_);
    lanes_to_rows<T, NV>(unmasked, nullptr, rows, dx, d_);
    lanes_to_rows<T, NV>(pulled_, nullptr, rows, dcell_sum, d_);
    if (parts == nullptr) return;
    if (at_.w.forward.relu_last)
      for (int64_t o = 0; o < d_ * R; o += W) store(u + o, load(at_.sign + o) > Vec<T>{} ? load(u + o) : Vec<T>{});
    at_.gate_bias_sums(gated_, parts->sums);
    row_sums<T, NV>(de_, parts->sums + d_, d_);
    norm_sums<T, NV>(u, at_.xh, parts->sums + 2 * d_, parts->sums + 3 * d_, d_);
    parts->cotangent[0].take(gated_, place);
    parts->input[0].take(at_.input, place);
    parts->cotangent[1].take(de_, place);
    parts->input[1].take(at_.q, place);
  }

 private:
  // The cotangents at W_f's output (de) and input (dq), at the gate (gated) and, over N, at its input (pulled).
  template <Digits kDigits>
  void pull(const T* u) {
    at_.pull(u, de_);
    at_.masked(de_);
    product<T, NV, kDigits>(at_.w.fuse_transposed, de_, work_, nullptr, nullptr, dq_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(gated_ + o, load(dq_ + o) * load(at_.z + o));
    product<T, NV, kDigits>(at_.w.gate_transposed, gated_, work_, nullptr, nullptr, pulled_, d_);
  }

  Linear at_;
  const FuseRows<T> from_;
  const T *z_rows_, *mask_rows_, *g_rows_;
  const int64_t d_, groups_;
  T *de_, *dq_, *gated_, *pulled_, *work_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
