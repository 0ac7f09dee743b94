// How the solve of a row can end; the values of deqfuse.Outcome.
#pragma once

#include <cstdint>

#include "lane.h"

namespace deqfuse {

enum class Outcome : int8_t { kConverged = 0, kMaxIter = 1, kStalled = 2, kNonFinite = 3, kRescued = 5, kSingular = 6 };

constexpr int kStallSteps = 20;

namespace DEQFUSE_ISA {

// What the residual of a row is divided by, from the norm of f(z). NaN where that overflows: any residual over an
// infinite number would be none.
template <class L>
DEQFUSE_INLINE typename L::Value residual_scale(typename L::Value norm) {
  return norm + L::splat(typename L::Scalar(1e-5)) + (norm - norm);
}

// Whether a row ends at a relative residual, after `count` evaluations of which number `best_at` was the best.
template <class T>
DEQFUSE_INLINE bool row_ends(T residual, T tol, int count, int max_iter, int best_at, Outcome& outcome) {
  if (residual <= tol)
    outcome = Outcome::kConverged;
  else if (!is_finite(residual))
    outcome = Outcome::kNonFinite;
  else if (count >= max_iter)
    outcome = Outcome::kMaxIter;
  else if (count - best_at >= kStallSteps)
    outcome = Outcome::kStalled;
  else
    return false;
  return true;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
