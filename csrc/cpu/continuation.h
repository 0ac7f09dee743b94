// Zeros of z - f(z) of one row where no iteration finds them: along the curve of the zeros of
//   H(z, t) = z - t f(z) - (1 - t) a,   from (a, 0) to (z*, 1),
// by arc length, since the curve may turn back in t (Chow, Mallet-Paret and Yorke 1978; Allgower and Georg, "Numerical
// Continuation Methods", 1990). docs/explanation/numerics.md says why there is such a curve.
//
// What decides whether it is found:
//   - the direction along the curve is that in which det [DH; tangent] is positive, as it is at (a, 0): an invariant
//     of the curve, also across the kinks that relu makes, where the tangents of both sides have nothing in common;
//   - the curve is followed closely (kOnCurve): points further away lie on other curves, which lead back or around;
//   - where no step succeeds, a kink is jumped across. The jump doubles until a step succeeds, since it must be longer
//     than the distance from the curve, which is not known.
#pragma once

#include <utility>

#include "../common/outcome.h"
#include "row_cell.h"
#include "row_fuse.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr double kOnCurve = 3e-4;       // |H| / |f| of an accepted point; a tenth after each failure to land, down to
constexpr double kClosest = 1e-6;       // this, since a zero is missed from as far as that
constexpr double kChord = 0.5;          // a correction must bring |H| down by this much, or the Jacobian is made anew
constexpr double kClose = 0.3;          // corrections this short, in steps, keep a Jacobian good for the next tangent
constexpr double kLeastStep = 1e-5;     // below it a step has failed at a kink
constexpr double kPastKink = 1e-2;      // a step as long as this ends the jumps at a kink, of which there are
constexpr int kMostJumps = 16;          // at most so many, the last of 0.7
constexpr int kCorrections = 10, kNewtons = 4;  // at most, per step
constexpr int kLanding = 8;                     // Newton steps at t = 1

// One row: a Jacobian class of row_cell.h or row_fuse.h in double precision, whatever T is.
template <class Map>
class Continuation {
 public:
  using Point = typename Map::Point;
  using S = double;

  static int64_t values(int64_t d, int64_t groups) {
    return 2 * Point::values(d, groups) + 8 * Arena<S>::size(d + 1) + Arena<S>::size(Factors<S>::values(d + 1));
  }

  // `pivots`: d + 1 numbers. Ends at a residual of `tol`, or after `most` Jacobians.
  Continuation(Map& map, int64_t d, int64_t groups, S tol, int most, Arena<S>& memory, int32_t* pivots)
      : map_(map), d_(d), tol_(tol), most_(most), factors_(memory.take(Factors<S>::values(d + 1)), pivots, d + 1) {
    at_.take(memory, d, groups);
    now_.take(memory, d, groups);
    for (S** slot : {&u_, &tangent_, &row_, &b_, &a_, &r_, &step_, &core_}) *slot = memory.take(d + 1);
  }

  // The current iterate, to be set before evaluate() or to be read after a success.
  S* z() { return now_.z; }
  const S* image() const { return now_.f; }
  bool is_exhausted() const { return jacobians_ >= most_; }
  int jacobians() const { return jacobians_; }
  int evaluations() const { return evaluations_; }

  // |f(z) - z| / (|f(z)| + 1e-5)
  S evaluate() { return residual_at(S(1)); }

  // Newton's method with a line search from an iterate that has just been evaluated. Ends where a step leaves more than
  // `least` of the residual.
  bool newton(S residual, int steps, S least) {
    fresh_ = false;
    for (int k = 0; k < steps && residual > tol_ && jacobians_ < most_; ++k) {
      keep_t();
      if (!factor(S(1))) return false;
      solve(r_, step_);
      S next = residual;
      for (S length = 1; length > S(0.1); length /= 2) {
        for (int64_t i = 0; i < d_; ++i) now_.z[i] = at_.z[i] + length * step_[i];
        next = evaluate();
        if (next <= (1 - S(0.1) * length) * residual) break;
      }
      if (!(next <= least * residual)) return false;
      residual = next;
    }
    return residual <= tol_;
  }

  // Along the curve from z, which becomes the start a, for at most `most` Jacobians.
  bool follow(int most) {
    const int all = most_;
    on_curve_ = kOnCurve;
    most_ = jacobians_ + most < most_ ? jacobians_ + most : most_;
    const bool found = follow();
    most_ = all;
    return found;
  }

 private:
  bool follow() {
    for (int64_t i = 0; i < d_; ++i) a_[i] = u_[i] = now_.z[i];
    u_[d_] = 0;
    keep_t();
    if (!is_finite(residual_at(0)) || !look_ahead()) return false;
    S h = S(0.1) * std::sqrt(S(d_));
    bool may_land = true;  // not again from where it has failed
    for (int jumps = 0; jacobians_ < most_;) {
      if (may_land && u_[d_] + h * tangent_[d_] >= 1) {
        h = (1 - u_[d_]) / tangent_[d_];
        if (land(h)) return true;
        may_land = false;
      }
      S t = place(h);
      if (!correct(t, h)) {
        h *= S(0.35);
        if (h >= kLeastStep) continue;
        if (++jumps > kMostJumps) return false;
        const S jump = std::ldexp(kLeastStep, jumps);
        for (int64_t i = 0; i <= d_; ++i) u_[i] += jump * tangent_[i];
        h = 10 * jump;
      } else if (t >= 1) {  // the curve has crossed t = 1
        if (land_between(t)) return true;
        on_curve_ = on_curve_ > 10 * kClosest ? on_curve_ / 10 : kClosest;
        h *= S(0.35);
        if (h < kLeastStep) return false;
        continue;
      } else {
        may_land = true;
        const S done = h;
        if (done > kPastKink) jumps = 0;
        if (newtons_ == 0 && corrections_ <= 2) h *= 2;
        if (newtons_ > 1) h *= S(0.7);
        for (int64_t i = 0; i < d_; ++i) u_[i] = now_.z[i];
        u_[d_] = t;
        if (newtons_ > 0 && moved_ < kClose * done) {
          take_tangent();
          continue;
        }
      }
      if (u_[d_] < S(-0.5)) return false;  // far behind the start: another curve
      for (int64_t i = 0; i < d_; ++i) now_.z[i] = u_[i];
      residual_at(u_[d_]);
      for (int64_t i = 0; i <= d_; ++i) row_[i] = tangent_[i];
      if (!look_ahead()) return false;
    }
    return false;
  }

  // The tangent at the point of the curve that was evaluated last.
  bool look_ahead() {
    move_with_t(now_);
    if (!factor(u_[d_])) return false;
    take_tangent();
    return true;
  }
  void take_tangent() {
    for (int64_t i = 0; i < d_; ++i) step_[i] = 0;
    solve(step_, tangent_, S(1));
    // [DH; row] has the sign of [DH; tangent], the solution of row . tangent = 1.
    const S scale = S(factors_.sign()) / norm_of(tangent_, d_ + 1);
    for (int64_t i = 0; i <= d_; ++i) tangent_[i] *= scale;
    fresh_ = true;
  }

  // now.z and t a step of length h along the tangent.
  S place(S h) {
    for (int64_t i = 0; i < d_; ++i) now_.z[i] = u_[i] + h * tangent_[i];
    return u_[d_] + h * tangent_[d_];
  }

  // Back to the curve, with the factors that there are while they serve.
  bool correct(S& t, S h) {
    newtons_ = 0;
    S size = residual_at(t), before = size;
    for (corrections_ = 0; corrections_ < kCorrections; ++corrections_) {
      if (size <= on_curve_) return true;
      if (!is_finite(size)) return false;
      if (!fresh_ || (corrections_ > 0 && size > kChord * before)) {
        if (newtons_ == kNewtons || jacobians_ >= most_ || (newtons_ > 0 && size > S(0.9) * before)) return false;
        for (int64_t i = 0; i <= d_; ++i) row_[i] = tangent_[i];
        move_with_t(now_);
        if (!factor(t)) return false;
        for (int64_t i = 0; i < d_; ++i) now_.z[i] = at_.z[i];
        ++newtons_;
        moved_ = 0;
        fresh_ = true;
      }
      solve(r_, step_);
      S far = 0;
      for (int64_t i = 0; i < d_; ++i) {
        now_.z[i] += step_[i];
        far += (now_.z[i] - u_[i]) * (now_.z[i] - u_[i]);
      }
      t += step_[d_];
      far += (t - u_[d_]) * (t - u_[d_]);
      moved_ += norm_of(step_, d_ + 1);
      if (!(std::sqrt(far) <= 4 * h + S(1e-2))) {
        fresh_ = fresh_ && newtons_ == 0;
        return false;
      }
      before = size;
      size = residual_at(t);
    }
    return false;
  }

  bool land(S h) {
    place(h);
    return newton(evaluate(), kLanding, S(0.5));
  }
  // From where the chord from u to now, at t >= 1, crosses t = 1.
  bool land_between(S t) {
    const S part = (1 - u_[d_]) / (t - u_[d_]);
    for (int64_t i = 0; i < d_; ++i) now_.z[i] = u_[i] + part * (now_.z[i] - u_[i]);
    return newton(evaluate(), kLanding, S(0.5));
  }

  // r = -H(now.z, t); its norm over that of f. At t = 1 there is no a.
  S residual_at(S t) {
    ++evaluations_;
    map_.evaluate(now_);
    for (int64_t i = 0; i < d_; ++i) {
      r_[i] = t * now_.f[i] - now_.z[i];
      if (t != S(1)) r_[i] += (1 - t) * a_[i];
    }
    return norm_of(r_, d_) / (norm_of(now_.f, d_) + S(1e-5));
  }

  // The system that solve() solves is [[I - t J, b], [row]]. Here t stands still.
  void keep_t() {
    for (int64_t i = 0; i < d_; ++i) row_[i] = b_[i] = 0;
    row_[d_] = 1;
  }
  // Here it moves along: b = dH/dt.
  void move_with_t(const Point& point) {
    for (int64_t i = 0; i < d_; ++i) b_[i] = a_[i] - point.f[i];
  }

  // Factors of that system at now, which becomes at. With w = R delta, delta = r + t L w - b s, and (w, s) solves
  //   [[I - t R L, R b], [t row L, row_t - row b]],   whose determinant is the same.
  bool factor(S t) {
    ++jacobians_;
    std::swap(at_, now_);
    map_.linearise(at_);
    t_ = t;
    const int64_t k = map_.rank(), stride = padded<S>(k + 1);
    S* matrix = factors_.matrix();
    map_.core(t, matrix, stride);
    map_.into(b_, core_);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = k; j < stride; ++j) matrix[i * stride + j] = 0;
      matrix[i * stride + k] = core_[i];
    }
    S* last = matrix + k * stride;
    map_.out_of_transposed(row_, last);
    for (int64_t j = 0; j < k; ++j) last[j] *= t;
    for (int64_t j = k; j < stride; ++j) last[j] = 0;
    last[k] = row_[d_] - dot(row_, b_, d_);
    factors_.factor(k + 1);
    return factors_.sign() != 0;
  }
  // (I - t J) delta + b s = r, row . (delta, s) = height; s comes behind delta.
  void solve(const S* r, S* delta, S height = 0) {
    const int64_t k = map_.rank();
    map_.into(r, core_);
    core_[k] = height - dot(row_, r, d_);
    factors_.solve(core_);
    const S s = core_[k];
    map_.out_of(core_, delta);
    for (int64_t i = 0; i < d_; ++i) delta[i] = r[i] + t_ * delta[i] - b_[i] * s;
    delta[d_] = s;
  }

  Map& map_;
  const int64_t d_;
  const S tol_;
  int most_, jacobians_ = 0, evaluations_ = 0;
  Factors<S> factors_;
  Point at_, now_;  // of the Jacobian; of the last evaluation
  S *u_, *tangent_, *row_, *b_, *a_, *r_, *step_, *core_;  // (d + 1,); u: the last point accepted, t behind z
  S t_ = 0, moved_ = 0;     // of the Jacobian; by corrections with the latest factors
  S on_curve_ = kOnCurve;
  bool fresh_ = false;      // whether the factors are those of a point close to u, for this curve
  int newtons_ = 0, corrections_ = 0;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
