// The small solve of Anderson mixing, one row per lane.
#pragma once

#include "lane.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Weights with sum 1 that minimise |sum_a alpha_a g_a|, per lane, from the Gram matrix ordered by age (its lower
// half). Entries beyond a lane's count carry no weight. Cholesky with a relative ridge and a pivot floor.
template <class L, int M>
DEQFUSE_INLINE void mixing_weights(const typename L::Value (&gram)[M][M], typename L::Value count,
                                   typename L::Scalar lam, typename L::Value (&alpha)[M]) {
  using T = typename L::Scalar;
  using V = typename L::Value;
  const V zero{}, one = L::splat(T(1));
  V largest{}, lower[M][M], y[M];
  DEQFUSE_UNROLL
  for (int i = 0; i < M; ++i) largest = L::maximum(largest, L::splat(T(i)) < count ? gram[i][i] : zero);
  const V ridge = largest * L::splat(lam);
  const V floor = L::fma(largest, L::splat(T(2.4e-7)), L::splat(T(1e-30)));
  DEQFUSE_UNROLL
  for (int i = 0; i < M; ++i) {
    DEQFUSE_UNROLL
    for (int j = 0; j <= i; ++j) {
      V a = L::splat(T(i)) < count ? gram[i][j] : zero;
      if (i == j) a += ridge;
      DEQFUSE_UNROLL
      for (int k = 0; k < j; ++k) a -= lower[i][k] * lower[j][k];
      lower[i][j] = i == j ? one / L::square_root(L::maximum(floor, a)) : a * lower[j][j];
    }
    V a = L::splat(T(i)) < count ? one : zero;
    DEQFUSE_UNROLL
    for (int k = 0; k < i; ++k) a -= lower[i][k] * y[k];
    y[i] = L::splat(T(i)) < count ? a * lower[i][i] : zero;
  }
  V sum{};
  DEQFUSE_UNROLL
  for (int i = M - 1; i >= 0; --i) {
    V a = y[i];
    DEQFUSE_UNROLL
    for (int k = i + 1; k < M; ++k) a -= lower[k][i] * alpha[k];
    alpha[i] = L::splat(T(i)) < count ? a * lower[i][i] : zero;
    sum += alpha[i];
  }
  DEQFUSE_UNROLL
  for (int i = 0; i < M; ++i) alpha[i] /= sum;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
