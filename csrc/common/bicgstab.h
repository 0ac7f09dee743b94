// The linear solve (I - A) x = b of one row, as scalars: every decision about it, none of its vectors.
//
// BiCGStab (van der Vorst 1992) needs an application of A for the direction p and one for the residual r. When the
// recurrence says that it is done, one more gives the true residual b - x + A x, by which alone a row is judged; a row
// that is not there yet starts anew from x. Rows take these steps independently of each other: what the next
// application is for is the row's phase. See docs/explanation/kernels-gpu-adjoint.md.
#pragma once

#include "outcome.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

enum class Method : int8_t { kBiCGStab, kPicard, kSeries };
// What the row's next application of A is for; kDone: nothing.
enum class Phase : int32_t { kDirection, kStabilise, kCheck, kPicard, kSeries, kDone };

template <class T>
struct LinearOptions {
  T tol, damping;
  int max_iter;  // applications of A
  Method method;
};

// Too small a budget for one step and its check is spent on the fixed-point iteration.
template <class T>
LinearOptions<T> linear_options(int mode, double tol, int max_iter, int history, double beta) {
  if (mode >= 0) return {T(0), T(1), mode, Method::kSeries};
  return {T(tol), T(beta), max_iter, history == 0 || max_iter < 3 ? Method::kPicard : Method::kBiCGStab};
}

// A breakdown becomes a step of length zero.
template <class T>
DEQFUSE_INLINE T divide(T a, T b) {
  return b == T(0) ? T(0) : a / b;
}

template <class T>
struct LinearRow {
  T magnitude;  // b was divided by its largest entry, so that squares neither vanish nor overflow
  T norm;       // |b| after that; 1 where b is zero
  T best;       // the residual of the answer so far, relative
  T rho, alpha, shadow_norm, run_best;
  int32_t nfe, best_at;  // applications of A; the one that found the answer
  int32_t run_steps, run_best_at;
  Phase phase;
  Outcome outcome;

  DEQFUSE_INLINE void end(Outcome how) {
    outcome = how;
    phase = Phase::kDone;
  }

  // b is there, b / magnitude has `squares`; x = 0 for BiCGStab.
  DEQFUSE_INLINE void begin(T largest, T squares, const LinearOptions<T>& options) {
    magnitude = largest;
    norm = squares == T(0) ? T(1) : std::sqrt(squares);
    best = std::sqrt(squares) / norm;
    // All of the row is copied, whether it is used or not: nothing of it may be left unwritten.
    rho = alpha = shadow_norm = run_best = T(0);
    nfe = best_at = run_steps = run_best_at = 0;
    outcome = Outcome::kMaxIter;
    if (options.method == Method::kSeries) {
      phase = Phase::kSeries;
      if (options.max_iter == 0) end(Outcome::kMaxIter);
    } else if (row_ends(best, options.tol, 0, options.max_iter, 0, outcome)) {
      phase = Phase::kDone;
    } else if (options.method == Method::kPicard) {
      phase = Phase::kPicard;
    } else {
      restart(squares);
    }
  }

  // r, of this many squares, becomes the shadow residual and the direction.
  DEQFUSE_INLINE void look_along(T squares) {
    rho = squares;
    shadow_norm = std::sqrt(squares);
    phase = Phase::kDirection;
  }

  // The same at the start of a run.
  DEQFUSE_INLINE void restart(T squares) {
    run_best = squares;
    run_steps = run_best_at = 0;
    look_along(squares);
  }

  // With v = (I - A) p: how far to go along it.
  DEQFUSE_INLINE void along_direction(T shadow_v) {
    ++nfe;
    alpha = divide(rho, shadow_v);
    phase = Phase::kStabilise;
  }

  // With t = (I - A) s: the step of least residual along s.
  DEQFUSE_INLINE T stabilising_step(T ts, T tt) {
    ++nfe;
    return divide(ts, tt);
  }

  // What follows the step, given (r, r) and (shadow, r): true if p <- r + beta (p - omega v). Otherwise x is checked,
  // or, after a breakdown, r is the new shadow residual and direction (the phase tells).
  DEQFUSE_INLINE bool continues(T squares, T shadow_r, T omega, const LinearOptions<T>& options, T& beta) {
    const T length = std::sqrt(squares);
    ++run_steps;
    if (squares < run_best) {
      run_best = squares;
      run_best_at = run_steps;
    }
    if (length <= T(0.5) * options.tol * norm || !is_finite(length) || nfe + 3 > options.max_iter ||
        run_steps - run_best_at >= kStallSteps) {
      phase = Phase::kCheck;
      return false;
    }
    const T size = shadow_r < T(0) ? -shadow_r : shadow_r;
    if (size <= kEpsilon<T> * kEpsilon<T> * shadow_norm * length || omega == T(0)) {
      look_along(squares);
      return false;
    }
    beta = divide(shadow_r, rho) * divide(alpha, omega);
    rho = shadow_r;
    phase = Phase::kDirection;
    return true;
  }

  // The true residual of x: true if x is better than the answer so far and takes its place. A run that ends worse than
  // it began would only be repeated: the row has stalled.
  DEQFUSE_INLINE bool check(T squares, const LinearOptions<T>& options) {
    ++nfe;
    const T residual = std::sqrt(squares) / norm;
    const bool taken = !(residual >= best);
    if (taken) {
      best = residual;
      best_at = nfe;
    }
    if (residual <= options.tol)
      end(Outcome::kConverged);
    else if (!is_finite(residual))
      end(Outcome::kNonFinite);
    else if (nfe + 3 > options.max_iter)
      end(Outcome::kMaxIter);
    else if (!taken)
      end(Outcome::kStalled);
    else
      restart(squares);
    return taken;
  }

  // One step of x <- A x + b, whose residual is also that of the x before it: true if that x becomes the answer.
  DEQFUSE_INLINE bool picard(T squares, const LinearOptions<T>& options) {
    ++nfe;
    const T residual = std::sqrt(squares) / norm;
    const bool taken = residual < best || nfe == 1;
    if (taken) {
      best = residual;
      best_at = nfe;
    }
    if (row_ends(residual, options.tol, nfe, options.max_iter, best_at, outcome)) phase = Phase::kDone;
    return taken;
  }

  // The series sum_{i <= max_iter} A^i b promises no accuracy; its residual is not computed.
  DEQFUSE_INLINE void term(const LinearOptions<T>& options) {
    if (++nfe == options.max_iter) end(Outcome::kMaxIter);
  }
};

// Seven numbers, four counts, where it is and how it ended. Padding would never be written.
template <class T>
constexpr size_t kRowBytes = 7 * sizeof(T) + 4 * sizeof(int32_t) + sizeof(Phase) + sizeof(Outcome);
static_assert(sizeof(LinearRow<float>) == kRowBytes<float>, "a row has padding");
static_assert(sizeof(LinearRow<double>) == kRowBytes<double>, "a row has padding");

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
