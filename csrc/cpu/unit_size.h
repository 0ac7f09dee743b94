// Rows divided by their root mean square, which is how a layer takes its injections, and the gradient of that.
#pragma once

#include "tasks.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Below this root mean square a row has no direction that float32 could hold: it becomes zeros without a gradient.
constexpr double kLeastRms = 1e-12;

// Sixteen sums side by side, which compilers turn into vectors.
template <class T, class Term>
DEQFUSE_INLINE T wide_sum(int64_t count, Term term) {
  T part[16] = {};
  int64_t k = 0;
  for (; k + 16 <= count; k += 16)
    for (int q = 0; q < 16; ++q) part[q] += term(k + q);
  for (int q = 0; k < count; ++k, ++q) part[q] += term(k);
  for (int width = 8; width > 0; width /= 2)
    for (int q = 0; q < width; ++q) part[q] += part[q + width];
  return part[0];
}

// What a row is multiplied by. NaN where its squares overflow: as zeros it would be an input like any other.
template <class T>
DEQFUSE_INLINE T unit_scale(const T* x, int64_t d) {
  const T norm = std::sqrt(wide_sum<T>(d, [&](int64_t k) { return x[k] * x[k]; })), width = std::sqrt(T(d));
  if (!(norm < std::numeric_limits<T>::infinity())) return std::numeric_limits<T>::quiet_NaN();
  return norm > T(kLeastRms) * width ? width / norm : T(0);
}

// y = s x has dx = s (g - y mean(y g)).
template <class T>
void unit_size(const UnitProblem<T>& p, int threads, ParallelFor parallel) {
  const int64_t d = p.d;
  // A few rows take less time than a second thread to wake.
  for_rows(p.tensors * p.rows, p.tensors * p.rows * d < (1 << 15) ? 1 : threads, parallel, [&](int64_t k) {
    const int64_t i = k / p.rows, at = k % p.rows * d;
    const T *x = p.x[i] + at, scale = unit_scale(x, d);
    T* out = p.out[i] + at;
    if (p.grads == nullptr) {
      for (int64_t j = 0; j < d; ++j) out[j] = scale * x[j];
      return;
    }
    const T* g = p.grads[i] + at;
    const T along = scale * scale / T(d) * wide_sum<T>(d, [&](int64_t j) { return x[j] * g[j]; });
    for (int64_t j = 0; j < d; ++j) out[j] = scale * (g[j] - along * x[j]);
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
