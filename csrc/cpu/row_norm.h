// GroupNorm of one row and its Jacobian diag(gamma) S: S t = rstd (t - mean(t) - x_hat mean(t x_hat)) per group.
#pragma once

#include "../common/group_norm.h"
#include "dense.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Memory handed out piece by piece, each aligned for vectors.
template <class S>
class Arena {
 public:
  explicit Arena(S* memory) : next_(memory) {}
  static int64_t size(int64_t count) { return round_up(count, 64 / int64_t(sizeof(S))); }
  S* take(int64_t count) {
    S* piece = next_;
    next_ += size(count);
    return piece;
  }

 private:
  S* next_;
};

// A sum of `count` terms in four parts, so that none waits for the addition before it.
template <class S, class Term>
DEQFUSE_INLINE S sum_terms(int64_t count, Term term) {
  S part[4] = {};
  int64_t k = 0;
  for (; k + 4 <= count; k += 4)
    for (int q = 0; q < 4; ++q) part[q] += term(k + q);
  for (; k < count; ++k) part[0] += term(k);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// One norm at one input.
template <class S>
struct NormAt {
  S *x_hat, *rstd;  // (d,), (groups,)

  static int64_t values(int64_t d, int64_t groups) { return Arena<S>::size(d) + Arena<S>::size(groups); }
  void take(Arena<S>& memory, int64_t d, int64_t groups) {
    x_hat = memory.take(d);
    rstd = memory.take(groups);
  }

  void normalise(const S* y, int64_t d, int64_t groups) {
    const int64_t width = d / groups;
    const S inverse = S(1) / S(width);
    for (int64_t g = 0; g < groups; ++g) {
      const S* from = y + g * width;
      S* to = x_hat + g * width;
      const S mean = sum_terms<S>(width, [&](int64_t k) { return from[k]; }) * inverse;
      const S squares = sum_terms<S>(width, [&](int64_t k) { return (from[k] - mean) * (from[k] - mean); });
      rstd[g] = inverse_deviation<ScalarLane<S>>(squares, inverse);
      for (int64_t k = 0; k < width; ++k) to[k] = (from[k] - mean) * rstd[g];
    }
  }

  // t <- S t
  void symmetric(S* t, int64_t d, int64_t groups) const {
    const int64_t width = d / groups;
    const S inverse = S(1) / S(width);
    for (int64_t g = 0; g < groups; ++g) {
      S* at = t + g * width;
      const S* x = x_hat + g * width;
      const S mean = sum_terms<S>(width, [&](int64_t k) { return at[k]; }) * inverse;
      const S projected = sum_terms<S>(width, [&](int64_t k) { return at[k] * x[k]; }) * inverse;
      for (int64_t k = 0; k < width; ++k) at[k] = norm_symmetric<ScalarLane<S>>(at[k], mean, x[k], projected, rstd[g]);
    }
  }
};

// Which features are positive, as a list.
struct Active {
  int32_t* index;
  int64_t count = 0;

  template <class S>
  void find(const S* value, int64_t d) {
    count = 0;
    for (int64_t i = 0; i < d; ++i)
      if (value[i] > S(0)) index[count++] = int32_t(i);
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
