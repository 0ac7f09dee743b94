// GroupNorm value by value; whoever sums over a group's features sums as suits its machine.
#pragma once

#include "lane.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
constexpr T kGroupNormEps = T(1e-5);

// 1 / sqrt(var + eps), from the sum of squares of the centred values; `inv_width` is one over their number. NaN where
// the variance overflows: 0 would make a huge input look like none, with a fixed point that is found at once.
template <class L>
DEQFUSE_INLINE typename L::Value inverse_deviation(typename L::Value squares, typename L::Scalar inv_width) {
  using T = typename L::Scalar;
  const typename L::Value var = L::fma(squares, L::splat(inv_width), L::splat(kGroupNormEps<T>));
  return L::splat(T(1)) / L::square_root(var) + (var - var);
}

template <class L>
DEQFUSE_INLINE typename L::Value standardised(typename L::Value a, typename L::Value mean, typename L::Value rstd) {
  return (a - mean) * rstd;
}

// S t, S the symmetric part of GroupNorm's Jacobian: rstd (t - mean(t) - x_hat mean(t x_hat)).
template <class L>
DEQFUSE_INLINE typename L::Value norm_symmetric(typename L::Value t, typename L::Value mean, typename L::Value x_hat,
                                                typename L::Value projected, typename L::Value rstd) {
  return rstd * (t - mean - x_hat * projected);
}

// S depends on the norm's input y. The gradient of <t, S s> with respect to y, from S t and S s: per group
//   -rstd (x_hat mean(t S s) + mean(s x_hat) S t + mean(t x_hat) S s).
template <class L>
DEQFUSE_INLINE typename L::Value norm_slope(typename L::Value x_hat, typename L::Value both, typename L::Value of_t,
                                            typename L::Value s_projected, typename L::Value of_s,
                                            typename L::Value t_projected, typename L::Value rstd) {
  return -rstd * L::fma(x_hat, both, L::fma(s_projected, of_t, t_projected * of_s));
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
