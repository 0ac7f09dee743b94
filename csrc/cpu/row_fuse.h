// One row of the purify-then-combine step, z <- GN(relu(mask * (W_f (z * (N W_a z + c)) + b_f) + x)) or relu(GN(.)),
// c = W_a S + N b_a, and its Jacobian; what both have and do: row_cell.h.
#pragma once

#include "norm_panels.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
struct FuseInputs {
  const T *x, *cell_sum, *mask;  // of this row; mask may be null
  int64_t modalities;
  bool relu_last;
};

template <class S, class T>
class FuseRow {
 public:
  struct Point {
    S *z, *f, *gate, *sum;  // sum: what the relu sees
    NormAt<S> norm;
    static int64_t values(int64_t d, int64_t groups) { return 4 * Arena<S>::size(d) + NormAt<S>::values(d, groups); }
    void take(Arena<S>& memory, int64_t d, int64_t groups) {
      for (S** slot : {&z, &f, &gate, &sum}) *slot = memory.take(d);
      norm.take(memory, d, groups);
    }
  };

  static int64_t values(int64_t d) { return 2 * Arena<S>::size(d); }
  // `params` in the order of FuseParams.
  FuseRow(const T* const* params, const FuseInputs<T>& in, int64_t d, int64_t groups, Arena<S>& memory)
      : gate_(params[0]), fuse_(params[2]), fuse_bias_(params[3]), gamma_(params[4]), beta_(params[5]), in_(in),
        modalities_(S(in.modalities)), d_(d), groups_(groups), y_(memory.take(d)), constant_(memory.take(d)) {
    for (int64_t i = 0; i < d; ++i) y_[i] = S(in.cell_sum[i]);
    times(gate_, y_, constant_);
    for (int64_t i = 0; i < d; ++i) constant_[i] += modalities_ * S(params[1][i]);
  }

  void evaluate(Point& p) {
    times(gate_, p.z, p.gate);
    for (int64_t i = 0; i < d_; ++i) {
      p.gate[i] = modalities_ * p.gate[i] + constant_[i];
      y_[i] = p.gate[i] * p.z[i];
    }
    times(fuse_, y_, p.sum);
    for (int64_t i = 0; i < d_; ++i) {
      p.sum[i] = mask(i) * (p.sum[i] + S(fuse_bias_[i])) + S(in_.x[i]);
      y_[i] = in_.relu_last ? p.sum[i] : relu(p.sum[i]);
    }
    p.norm.normalise(y_, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) {
      const S a = p.norm.x_hat[i] * S(gamma_[i]) + S(beta_[i]);
      if (in_.relu_last) p.sum[i] = a;
      p.f[i] = in_.relu_last ? relu(a) : a;
    }
  }

 protected:
  S mask(int64_t i) const { return in_.mask ? S(in_.mask[i]) : S(1); }
  void times(const T* w, const S* v, S* out) const {
    dots(d_, d_, v, out, [&](int64_t i) { return w + i * d_; });
  }

  const T *const gate_, *const fuse_, *const fuse_bias_, *const gamma_, *const beta_;
  const FuseInputs<T> in_;
  const S modalities_;
  const int64_t d_, groups_;
  S *const y_, *const constant_;
};

template <class S, class T>
class FuseJacobian : public FuseRow<S, T> {
  using Row = FuseRow<S, T>;
  using Row::d_;
  using Row::fuse_;
  using Row::gamma_;
  using Row::gate_;
  using Row::groups_;
  using Row::in_;
  using Row::modalities_;
  using Row::y_;

 public:
  using Point = typename Row::Point;
  using Evaluation = FuseRow<T, T>;  // as a user evaluates it

  static int64_t values(int64_t d, int64_t groups) {
    return Row::values(d) + Arena<S>::size(2 * d) + RightNorm<S>::values(d, groups) + Arena<S>::size(d * d) +
           d * kPanel<S>;
  }
  // `indices`: d numbers.
  FuseJacobian(const T* const* params, const FuseInputs<T>& in, int64_t d, int64_t groups, Arena<S>& memory,
               int32_t* indices)
      : Row(params, in, d, groups, memory), spare_(memory.take(2 * d)), active_{indices} {
    right_.take(memory, d, groups);
    left_ = memory.take(d * d);
    panel_ = memory.take(d * kPanel<S>);
  }

  void linearise(const Point& p) {
    at_ = &p;
    active_.find(p.sum, d_);
  }
  int64_t rank() const { return active_.count; }

  // R is mask W_f (diag(gate) + N diag(z) W_a), behind diag(gamma) S where relu is last; L is the rest. What stands
  // left of the bracket makes rows, the bracket and what stands right of it columns.
  void core(S p, S* matrix, int64_t stride) {
    const int64_t count = active_.count;
    prepare_left();
    if (!in_.relu_last) right_.prepare(gate_, gamma_, at_->norm, d_, groups_, spare_);
    for (int64_t begin = 0; begin < count; begin += kPanel<S>) {
      fill_panel(PanelColumns<S>(active_, begin));
      panel_product(left_, d_, count, d_, panel_, [&](int64_t i, int v, Vec<S> sum) {
        store(matrix + i * stride + begin + v * kLanes<S>, sum * splat(-p));
      });
    }
    for (int64_t i = 0; i < count; ++i) matrix[i * stride + i] += S(1);
  }

  void into(const S* v, S* w) {
    this->times(gate_, v, spare_);
    for (int64_t i = 0; i < d_; ++i) spare_[i] = at_->gate[i] * v[i] + modalities_ * at_->z[i] * spare_[i];
    if (in_.relu_last) {
      this->times(fuse_, spare_, y_);
      for (int64_t i = 0; i < d_; ++i) y_[i] *= this->mask(i);
      at_->norm.symmetric(y_, d_, groups_);
      for (int64_t k = 0; k < active_.count; ++k) w[k] = y_[active_.index[k]] * S(gamma_[active_.index[k]]);
      return;
    }
    dots(active_.count, d_, spare_, w, [&](int64_t k) { return fuse_ + active_.index[k] * d_; });
    for (int64_t k = 0; k < active_.count; ++k) w[k] *= this->mask(active_.index[k]);
  }
  void into_transposed(const S* w, S* v) {
    for (int64_t i = 0; i < d_; ++i) y_[i] = spare_[i] = v[i] = 0;
    for (int64_t k = 0; k < active_.count; ++k) {
      const int64_t i = active_.index[k];
      y_[i] = in_.relu_last ? w[k] * S(gamma_[i]) : w[k];
    }
    if (in_.relu_last) at_->norm.symmetric(y_, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) add_row(d_, y_[i] * this->mask(i), fuse_ + i * d_, spare_);
    for (int64_t i = 0; i < d_; ++i) add_row(d_, modalities_ * at_->z[i] * spare_[i], gate_ + i * d_, v);
    for (int64_t i = 0; i < d_; ++i) v[i] += at_->gate[i] * spare_[i];
  }
  void out_of(const S* w, S* u) {
    for (int64_t i = 0; i < d_; ++i) u[i] = 0;
    for (int64_t k = 0; k < active_.count; ++k) u[active_.index[k]] = w[k];
    if (in_.relu_last) return;
    at_->norm.symmetric(u, d_, groups_);
    for (int64_t i = 0; i < d_; ++i) u[i] *= S(gamma_[i]);
  }
  void out_of_transposed(const S* u, S* w) {
    for (int64_t i = 0; i < d_; ++i) y_[i] = in_.relu_last ? u[i] : u[i] * S(gamma_[i]);
    if (!in_.relu_last) at_->norm.symmetric(y_, d_, groups_);
    for (int64_t k = 0; k < active_.count; ++k) w[k] = y_[active_.index[k]];
  }

 private:
  void prepare_left() {
    if (in_.relu_last) {
      norm_rows<S, T>(fuse_, in_.mask, gamma_, at_->norm, active_, nullptr, d_, groups_, spare_, left_);
      return;
    }
    for (int64_t k = 0; k < active_.count; ++k) {
      const T* row = fuse_ + active_.index[k] * d_;
      const S scale = this->mask(active_.index[k]);
      for (int64_t j = 0; j < d_; ++j) left_[k * d_ + j] = scale * S(row[j]);
    }
  }

  // Columns of (diag(gate) + N diag(z) W_a) [diag(gamma) S]
  void fill_panel(const PanelColumns<S>& columns) {
    constexpr int P = kPanel<S>;
    const int64_t width = d_ / groups_;
    const NormAt<S>& norm = at_->norm;
    if (in_.relu_last) gather(gate_, d_, columns, panel_);
    else gather_normed(gate_, gamma_, norm, right_, d_, groups_, columns, panel_);
    for (int64_t i = 0; i < d_; ++i)
      for (int q = 0; q < P; ++q) panel_[i * P + q] *= modalities_ * at_->z[i];
    for (int q = 0; q < columns.count; ++q) {
      const int64_t j = columns.column[q], g = j / width;
      if (in_.relu_last) panel_[j * P + q] += at_->gate[j];
      for (int64_t i = g * width; !in_.relu_last && i < (g + 1) * width; ++i)
        panel_[i * P + q] += at_->gate[i] * S(gamma_[i]) * norm.rstd[g] *
                             (S(i == j) - (S(1) + norm.x_hat[i] * norm.x_hat[j]) / S(width));
    }
  }

  S *const spare_;
  Active active_;
  RightNorm<S> right_;
  S *left_, *panel_;
  const Point* at_ = nullptr;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
