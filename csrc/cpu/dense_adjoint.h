// The adjoint of rows that no iteration solves: u = (I - J^T)^-1 g by LU factors, one row at a time.
#pragma once

#include "anderson.h"
#include "row_problems.h"
#include "tasks.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kPowerSteps = 8;  // of the estimates of norms
constexpr int kRefinements = 2;
constexpr double kSingular = 1e13;  // a condition number beyond which factors say nothing

// I - J at a point, J = L R (row_cell.h), and its inverse.
template <class Jacobian>
class DenseSystem {
  using S = double;
  using Point = typename Jacobian::Point;

 public:
  static int64_t values(int64_t d, int64_t groups) {
    return Point::values(d, groups) + 3 * Arena<S>::size(d) + Arena<S>::size(Factors<S>::values(d));
  }
  // `pivots`: d numbers.
  DenseSystem(Jacobian& jacobian, int64_t d, int64_t groups, Arena<S>& memory, int32_t* pivots)
      : jacobian_(jacobian), d_(d), factors_(memory.take(Factors<S>::values(d)), pivots, d) {
    point_.take(memory, d, groups);
    for (S** slot : {&core_, &a_, &b_}) *slot = memory.take(d);
  }

  // Whether I - J has an inverse at z.
  template <class T>
  bool factor(const T* z) {
    for (int64_t i = 0; i < d_; ++i) point_.z[i] = S(z[i]);
    jacobian_.evaluate(point_);
    jacobian_.linearise(point_);
    const int64_t k = jacobian_.rank(), stride = padded<S>(k);
    S* matrix = factors_.matrix();
    jacobian_.core(S(1), matrix, stride);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = k; j < stride; ++j) matrix[i * stride + j] = 0;
    factors_.factor(k);
    return factors_.sign() != 0;
  }

  // v <- (I - J)^-1 v, (I - J)^-T v, (I - J) v, (I - J)^T v
  void solve(S* v) {
    jacobian_.into(v, core_);
    factors_.solve(core_);
    add_out_of(S(1), v);
  }
  void solve_transposed(S* v) {
    jacobian_.out_of_transposed(v, core_);
    factors_.solve_transposed(core_);
    add_into_transposed(S(1), v);
  }
  void apply(S* v) {
    jacobian_.into(v, core_);
    add_out_of(S(-1), v);
  }
  void apply_transposed(S* v) {
    jacobian_.out_of_transposed(v, core_);
    add_into_transposed(S(-1), v);
  }

  // The product of the largest singular values of I - J and of its inverse, from below, by steps of the power method.
  S condition() {
    if (factors_.sign() == 0) return std::numeric_limits<S>::infinity();
    return largest([&](S* v) { apply(v), apply_transposed(v); }) *
           largest([&](S* v) { solve_transposed(v), solve(v); });
  }

 private:
  void add_out_of(S sign, S* v) {
    jacobian_.out_of(core_, a_);
    for (int64_t i = 0; i < d_; ++i) v[i] += sign * a_[i];
  }
  void add_into_transposed(S sign, S* v) {
    jacobian_.into_transposed(core_, a_);
    for (int64_t i = 0; i < d_; ++i) v[i] += sign * a_[i];
  }
  // The square root of the largest eigenvalue of a positive map.
  template <class Apply>
  S largest(Apply apply) {
    for (int64_t i = 0; i < d_; ++i) b_[i] = start_value(1, i);
    S norm = 0;
    for (int k = 0; k < kPowerSteps; ++k) {
      const S scale = S(1) / norm_of(b_, d_);
      for (int64_t i = 0; i < d_; ++i) b_[i] *= scale;
      apply(b_);
      norm = norm_of(b_, d_);
    }
    return std::sqrt(norm);
  }

  Jacobian& jacobian_;
  const int64_t d_;
  Factors<S> factors_;
  Point point_;
  S *core_, *a_, *b_;
};

// Of the `count` rows of a tile, `out.rows`, those that no iteration solved, u <- (I - J^T)^-1 g / magnitude(lane), and
// whether there were any. Those whose I - J is singular as far as these numbers go say so, with its condition number as their
// residual. jacobian(r, memory, indices): the Jacobian of row r; `values`: what it takes.
template <class T, class Magnitude, class MakeJacobian>
bool solve_left(const T* z, const T* g, int64_t d, int64_t groups, T tol, int count,
                const RowResults<T>& out, Magnitude magnitude, MakeJacobian jacobian) {
  using Jacobian = decltype(jacobian(0, std::declval<Arena<double>&>(), nullptr));
  using System = DenseSystem<Jacobian>;
  bool any = false;
  for (int lane = 0; lane < count; ++lane) {
    const int64_t r = out.rows[lane];
    if (Outcome(out.outcome[r]) == Outcome::kConverged) continue;
    bool finite = true;  // an iteration that overflowed says nothing about the row
    for (int64_t i = 0; i < d; ++i) finite = finite && is_finite(z[r * d + i]) && is_finite(g[r * d + i]);
    if (!finite) continue;
    any = true;
    Scratch<double> scratch(Jacobian::values(d, groups) + System::values(d, groups) + 2 * Arena<double>::size(d));
    Scratch<int32_t> indices(3 * d);
    Arena<double> memory(scratch.get());
    double *u = memory.take(d), *check = memory.take(d);
    Jacobian j = jacobian(r, memory, indices.get());
    System system(j, d, groups, memory, indices.get() + 2 * d);
    const double scale = 1 / double(magnitude(lane));
    for (int64_t i = 0; i < d; ++i) u[i] = double(g[r * d + i]) * scale;
    const double norm = norm_of(u, d);
    double error = std::numeric_limits<double>::infinity();
    if (system.factor(z + r * d)) {
      system.solve_transposed(u);
      for (int k = 0; k <= kRefinements; ++k) {
        std::memcpy(check, u, sizeof(double) * d);
        system.apply_transposed(check);
        for (int64_t i = 0; i < d; ++i) check[i] = double(g[r * d + i]) * scale - check[i];
        const double now = norm_of(check, d) / norm;
        if (!(now < error)) break;
        error = now;
        if (k == kRefinements) break;
        system.solve_transposed(check);
        for (int64_t i = 0; i < d; ++i) u[i] += check[i];
      }
    }
    // As exact as double precision allows, whatever was asked for, unless the matrix is singular in it.
    double condition = 0;
    const bool solved = error <= double(tol) || (condition = system.condition()) < kSingular;
    if (error < double(out.residual[r]) || !is_finite(out.residual[r]))
      for (int64_t i = 0; i < d; ++i) out.z[lane * d + i] = T(u[i]);
    out.outcome[r] = int8_t(solved ? Outcome::kConverged : Outcome::kSingular);
    out.residual[r] = T(solved ? error : condition);
  }
  return any;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
