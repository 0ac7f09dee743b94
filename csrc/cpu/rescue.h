// Rows that a solve left behind, one at a time: Newton's method from the best iterate, then continuation from several
// starts. Values are double precision whatever the storage; an answer is judged as it is stored.
#pragma once

#include "continuation.h"
#include "row_problems.h"
#include "tasks.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kNewtonSteps = 8;          // from the best iterate, before any curve
constexpr int kStarts = 24;              // curves to try, one from f(0) and the others from fixed random points
// The most Jacobians of a curve, which has the more kinks the more features there are.
constexpr int jacobians_per_start(int64_t d) { return int(400 + 15 * d); }
constexpr double kPathTolerance = 0.1;   // of the tolerance; the rest is for rounding
constexpr int kRoundings = 16;           // stored numbers that are tried for a zero

template <class T, class Rows>
class RowRescue {
  using Jacobian = JacobianOf<T, Rows>;
  using Map = typename Jacobian::Evaluation;  // as its user evaluates it
  using Point = typename Map::Point;

 public:
  static int64_t doubles(int64_t d, int64_t groups) {
    return Jacobian::values(d, groups) + Continuation<Jacobian>::values(d, groups) + Arena<double>::size(d);
  }
  static int64_t stored(int64_t d, int64_t groups) { return Map::values(d) + Point::values(d, groups); }
  static int64_t indices(int64_t d) { return 3 * d + 1; }

  RowRescue(const Rows& rows, int64_t row, double tol, int most, Arena<double> doubles, Arena<T> stored,
            int32_t* indices)
      : d_(rows.d), tol_(T(tol)), jacobian_(row_jacobian(rows, row, doubles, indices)),
        map_(row_map(rows, row, stored)),
        path_(jacobian_, d_, rows.groups, kPathTolerance * tol, most, doubles, indices + 2 * d_),
        zero_(doubles.take(d_)) {
    answer_.take(stored, d_, rows.groups);
  }

  // Whether a zero was found, from the best iterate so far.
  bool find(const T* best) {
    bool finite = true;
    for (int64_t i = 0; i < d_; ++i) {
      path_.z()[i] = double(best[i]);
      finite = finite && is_finite(best[i]);
    }
    if (finite && path_.newton(path_.evaluate(), kNewtonSteps, 0.95)) return true;
    for (int64_t k = 0; k < kStarts; ++k) {
      for (int64_t i = 0; i < d_; ++i) path_.z()[i] = k == 0 ? 0 : start_value(k, i);
      if (path_.is_exhausted() || !is_finite(path_.evaluate())) return false;
      for (int64_t i = 0; i < d_; ++i) path_.z()[i] = path_.image()[i];
      if (path_.follow(jacobians_per_start(d_))) return true;
    }
    return false;
  }
  int work() const { return path_.jacobians() + path_.evaluations(); }

  // Stores the zero, and says with what residual. Where the Jacobian is large, float32's own evaluation errs by about
  // the tolerance, differently at each of the numbers around the zero. The best of some is the answer if none of them
  // is much above the tolerance, so that whoever evaluates it in another order of sums agrees.
  T store(T* z) {
    T best = std::numeric_limits<T>::infinity(), worst = 0;
    std::memcpy(zero_, path_.z(), sizeof(double) * d_);
    for (int64_t k = 0; k < kRoundings && !(worst > 0 && worst <= T(0.25) * tol_); ++k) {
      for (int64_t i = 0; i < d_; ++i)
        answer_.z[i] = T(zero_[i] * (1 + (k == 0 ? 0 : 0.5 * kEpsilon<T> * start_value(k, i))));
      const T found = residual();
      if (!(found <= worst)) worst = found;
      if (!(found < best)) continue;
      best = found;
      std::memcpy(z, answer_.z, sizeof(T) * d_);
    }
    return best <= tol_ && worst <= T(1.5) * tol_ ? best : worst;
  }

 private:
  // Of the stored numbers: the larger of what the stored map says and what double precision does.
  T residual() {
    for (int64_t i = 0; i < d_; ++i) path_.z()[i] = double(answer_.z[i]);
    const T exact = T(path_.evaluate());
    map_.evaluate(answer_);
    const T size = norm_of(answer_.f, d_) + T(1e-5);
    for (int64_t i = 0; i < d_; ++i) answer_.f[i] -= answer_.z[i];
    const T rounded = norm_of(answer_.f, d_) / size;
    return exact > rounded ? exact : rounded;
  }

  const int64_t d_;
  const T tol_;
  Jacobian jacobian_;
  Map map_;
  Continuation<Jacobian> path_;
  double* const zero_;
  Point answer_;
};

template <class T, class Rows>
void rescue(const RescueProblem<T, Rows>& p, int threads, ParallelFor parallel) {
  const Rows& rows = p.rows;
  const int64_t d = rows.d;
  using Row = RowRescue<T, Rows>;
  run_tasks(rows.count, threads, parallel, [&](int64_t t) {
    const int64_t row = rows.which[t];
    Scratch<double> doubles(Row::doubles(d, rows.groups));
    Scratch<T> stored(Row::stored(d, rows.groups) + Arena<T>::size(d));
    Scratch<int32_t> indices(Row::indices(d));
    Arena<T> memory(stored.get());
    T* answer = memory.take(d);
    Row work(rows, row, p.tol, p.most, Arena<double>(doubles.get()), memory, indices.get());
    const bool found = work.find(p.z + row * d);
    const T residual = found ? work.store(answer) : p.residual[row];
    p.nfe[row] += work.work();
    const bool converged = found && residual <= T(p.tol);
    if (!converged && !(residual < p.residual[row])) return;
    std::memcpy(p.z + row * d, answer, sizeof(T) * d);
    p.residual[row] = residual;
    p.outcome[row] = int8_t(converged ? Outcome::kRescued : Outcome::kStalled);
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
