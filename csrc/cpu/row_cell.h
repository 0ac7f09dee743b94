// One row of the residual cell, z <- GN3(relu(GN2(W2 relu(GN1(W1 z + b1)) + b2 + x) [+ z])), and its Jacobian.
//
// relu leaves the features of its inactive inputs without influence, so a map's Jacobian is J = L R with k columns and
// rows, k the number of active ones, about d / 2:
//   L   (d, k)   from the active inputs of the last relu on to f
//   R   (k, d)   from z to these inputs
// I - p J is solved, and the sign of its determinant known, by way of I - p R L, which is k x k: a product of an eighth
// to a quarter of d^3 terms and LU factors of k^3 / 3, where J itself takes d^3 and d^3 / 3.
//
// A map of one row has a Point (z, f(z) and what is known there) and
//   evaluate(point)         point.f = f(point.z)
// and its Jacobian, from where linearise(point) was called last; the point must stay as it is meanwhile:
//   rank()                  k
//   core(p, matrix, stride)                  I - p R L, rows `stride` apart, in columns up to padded(k)
//   into(v, w), out_of(w, u)                 w = R v, u = L w
//   into_transposed(w, v), out_of_transposed(u, w)   v = R^T w, w = L^T u
#pragma once

#include "norm_panels.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// S: precision of values, T: of the weights.
template <class S, class T>
class CellRow {
 public:
  struct Point {
    S *z, *f, *hidden, *sum;  // hidden = relu(GN1(.)); sum: what the last relu sees
    NormAt<S> norm1, norm2, norm3;
    static int64_t values(int64_t d, int64_t groups) {
      return 4 * Arena<S>::size(d) + 3 * NormAt<S>::values(d, groups);
    }
    void take(Arena<S>& memory, int64_t d, int64_t groups) {
      for (S** slot : {&z, &f, &hidden, &sum}) *slot = memory.take(d);
      for (NormAt<S>* norm : {&norm1, &norm2, &norm3}) norm->take(memory, d, groups);
    }
  };

  static int64_t values(int64_t d) { return Arena<S>::size(d); }
  // `params` of this cell, in the order of CellParams.
  CellRow(const T* const* params, const T* x, bool skip, int64_t d, int64_t groups, Arena<S>& memory)
      : w1_(params[0]), b1_(params[1]), w2_(params[2]), b2_(params[3]), g1_(params[4]), c1_(params[5]), g2_(params[6]),
        c2_(params[7]), g3_(params[8]), c3_(params[9]), x_(x), skip_(skip), d_(d), groups_(groups),
        y_(memory.take(d)) {}

  void evaluate(Point& p) {
    times(w1_, p.z, y_);
    for (int64_t i = 0; i < d_; ++i) y_[i] += S(b1_[i]);
    p.norm1.normalise(y_, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) p.hidden[i] = relu(p.norm1.x_hat[i] * S(g1_[i]) + S(c1_[i]));
    times(w2_, p.hidden, y_);
    for (int64_t i = 0; i < d_; ++i) y_[i] += S(b2_[i]) + S(x_[i]);
    p.norm2.normalise(y_, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) {
      p.sum[i] = p.norm2.x_hat[i] * S(g2_[i]) + S(c2_[i]);
      if (skip_) p.sum[i] += p.z[i];
      y_[i] = relu(p.sum[i]);
    }
    p.norm3.normalise(y_, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) p.f[i] = p.norm3.x_hat[i] * S(g3_[i]) + S(c3_[i]);
  }

 protected:
  void times(const T* w, const S* v, S* out) const {
    dots(d_, d_, v, out, [&](int64_t i) { return w + i * d_; });
  }
  void times_transposed(const T* w, const S* v, S* out) const {
    for (int64_t i = 0; i < d_; ++i) out[i] = 0;
    for (int64_t i = 0; i < d_; ++i) add_row(d_, v[i], w + i * d_, out);
  }

  const T *const w1_, *const b1_, *const w2_, *const b2_, *const g1_, *const c1_, *const g2_, *const c2_, *const g3_,
      *const c3_, *const x_;
  const bool skip_;
  const int64_t d_, groups_;
  S* const y_;
};

template <class S, class T>
class CellJacobian : public CellRow<S, T> {
  using Row = CellRow<S, T>;
  using Row::d_;
  using Row::groups_;
  using Row::skip_;
  using Row::w1_;
  using Row::w2_;
  using Row::y_;

 public:
  using Point = typename Row::Point;
  using Evaluation = CellRow<T, T>;  // as a user evaluates it

  static int64_t values(int64_t d, int64_t groups) {
    return Row::values(d) + Arena<S>::size(2 * d) + RightNorm<S>::values(d, groups) + Arena<S>::size(d * d) +
           d * kPanel<S>;
  }
  // `indices`: 2 d numbers.
  CellJacobian(const T* const* params, const T* x, bool skip, int64_t d, int64_t groups, Arena<S>& memory,
               int32_t* indices)
      : Row(params, x, skip, d, groups, memory), spare_(memory.take(2 * d)), hidden_{indices}, active_{indices + d} {
    right_.take(memory, d, groups);
    left_ = memory.take(d * d);
    panel_ = memory.take(d * kPanel<S>);
  }

  void linearise(const Point& p) {
    at_ = &p;
    hidden_.find(p.hidden, d_);
    active_.find(p.sum, d_);
  }
  int64_t rank() const { return active_.count; }

  void core(S p, S* matrix, int64_t stride) {
    const int64_t width = d_ / groups_, depth = hidden_.count;
    const NormAt<S>& norm3 = at_->norm3;
    right_.prepare(w1_, this->g3_, norm3, d_, groups_, spare_);
    norm_rows<S, T>(w2_, nullptr, this->g2_, at_->norm2, active_, &hidden_, d_, groups_, spare_, left_);
    for (int64_t begin = 0; begin < active_.count; begin += kPanel<S>) {
      const PanelColumns<S> columns(active_, begin);
      gather_normed(w1_, this->g3_, norm3, right_, d_, groups_, columns, panel_);
      norm_panel(panel_, this->g1_, at_->norm1, hidden_, d_, groups_);
      panel_product(left_, depth, active_.count, depth, panel_, [&](int64_t i, int v, Vec<S> sum) {
        store(matrix + i * stride + begin + v * kLanes<S>, sum * splat(-p));
      });
    }
    for (int64_t i = 0; i < active_.count; ++i) {
      matrix[i * stride + i] += S(1);
      const int64_t a = active_.index[i], g = a / width;
      for (int64_t j = 0; skip_ && j < active_.count; ++j) {
        const int64_t b = active_.index[j];
        if (b / width == g)
          matrix[i * stride + j] -= p * S(this->g3_[a]) * norm3.rstd[g] *
                                    (S(a == b) - (S(1) + norm3.x_hat[a] * norm3.x_hat[b]) / S(width));
      }
    }
  }

  void into(const S* v, S* w) {
    this->times(w1_, v, y_);
    at_->norm1.symmetric(y_, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) y_[i] = at_->hidden[i] > S(0) ? y_[i] * S(this->g1_[i]) : S(0);
    this->times(w2_, y_, spare_);
    at_->norm2.symmetric(spare_, d_, groups_);
    for (int64_t k = 0; k < active_.count; ++k) {
      const int64_t i = active_.index[k];
      w[k] = spare_[i] * S(this->g2_[i]);
      if (skip_) w[k] += v[i];
    }
  }
  void into_transposed(const S* w, S* v) {
    for (int64_t i = 0; i < d_; ++i) y_[i] = 0;
    for (int64_t k = 0; k < active_.count; ++k) y_[active_.index[k]] = w[k] * S(this->g2_[active_.index[k]]);
    at_->norm2.symmetric(y_, d_, groups_);
    this->times_transposed(w2_, y_, spare_);
    for (int64_t i = 0; i < d_; ++i) spare_[i] = at_->hidden[i] > S(0) ? spare_[i] * S(this->g1_[i]) : S(0);
    at_->norm1.symmetric(spare_, d_, groups_);
    this->times_transposed(w1_, spare_, v);
    for (int64_t k = 0; skip_ && k < active_.count; ++k) v[active_.index[k]] += w[k];
  }
  void out_of(const S* w, S* u) {
    for (int64_t i = 0; i < d_; ++i) u[i] = 0;
    for (int64_t k = 0; k < active_.count; ++k) u[active_.index[k]] = w[k];
    at_->norm3.symmetric(u, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) u[i] *= S(this->g3_[i]);
  }
  void out_of_transposed(const S* u, S* w) {
    for (int64_t i = 0; i < d_; ++i) y_[i] = u[i] * S(this->g3_[i]);
    at_->norm3.symmetric(y_, d_, groups_);
    for (int64_t k = 0; k < active_.count; ++k) w[k] = y_[active_.index[k]];
  }

 private:
  S *const spare_;
  Active hidden_, active_;
  RightNorm<S> right_;
  S *left_, *panel_;
  const Point* at_ = nullptr;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
