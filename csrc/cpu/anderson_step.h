// One Anderson step for rows stored row-major, for maps that are evaluated outside (DEQ of any callable):
// residual, new Gram row, small solve, mix, best iterate, stopping, in one pass over each active row.
#pragma once

#include <cmath>

#include "../common/outcome.h"
#include "mixing.h"
#include "rowmath.h"
#include "tasks.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
void anderson_row(const StepProblem<T>& p, int64_t row) {
  const int64_t n = p.n;
  const int m = p.history, slot = int(p.step % m), count = int(p.step + 1 < m ? p.step + 1 : m);
  T* z = p.z + row * n;
  const T* fz = p.fz + row * n;
  auto at = [&](int age) { return (slot - age + m) % m; };  // the slot of an age
  auto image = [&](int age) { return p.images + (int64_t(at(age)) * p.rows + row) * n; };
  auto residual_of = [&](int age) { return p.residuals + (int64_t(at(age)) * p.rows + row) * n; };
  T *f = image(0), *g = residual_of(0);
  for (int64_t i = 0; i < n; ++i) {
    f[i] = fz[i];
    g[i] = fz[i] - z[i];
  }
  T* gram = p.gram + row * m * m;  // by slot
  for (int a = 0; a < count; ++a) {
    const int other = at(a);
    gram[slot * m + other] = gram[other * m + slot] = dot(g, residual_of(a), n);
  }
  const T residual = std::sqrt(gram[slot * m + slot]) / residual_scale<ScalarLane<T>>(std::sqrt(dot(f, f, n)));
  const int k = ++p.nfe[row];
  if (p.trace) p.trace[int64_t(k - 1) * p.rows + row] = residual;
  const bool better = residual < p.best_residual[row];
  if (better) {
    p.best_residual[row] = residual;
    p.best_at[row] = k;
  }
  if (better || k == 1)
    for (int64_t i = 0; i < n; ++i) p.best[row * n + i] = f[i];
  Outcome outcome;
  if (!row_ends(residual, T(p.tol), k, p.max_iter, p.best_at[row], outcome)) {
    Vec<T> alpha[kMaxHistory];
    with_history(count, [&](auto m) {
      Vec<T> by_age[m()][m()], weights[m()];
      for (int a = 0; a < m(); ++a)
        for (int b = 0; b <= a; ++b) by_age[a][b] = splat(gram[at(a) * p.history + at(b)]);
      mixing_weights<VecLane<T>, m()>(by_age, splat(T(m())), T(p.lam), weights);
      for (int a = 0; a < m(); ++a) alpha[a] = weights[a];
    });
    const T damp = T(1) - T(p.beta);
    for (int64_t i = 0; i < n; ++i) z[i] = 0;
    for (int a = 0; a < count; ++a) {
      const T *fa = image(a), *ga = residual_of(a), weight = alpha[a][0];
      for (int64_t i = 0; i < n; ++i) z[i] += weight * (damp == T(0) ? fa[i] : fa[i] - damp * ga[i]);
    }
    return;
  }
  p.outcome[row] = int8_t(outcome);
  p.active[row] = false;
}

template <class T>
void anderson_step(const StepProblem<T>& p, int threads, ParallelFor parallel) {
  const int64_t chunk = 1 + 16384 / (p.n + 1);  // rows that are worth a task
  run_tasks((p.rows + chunk - 1) / chunk, threads, parallel, [&](int64_t t) {
    const int64_t end = (t + 1) * chunk < p.rows ? (t + 1) * chunk : p.rows;
    for (int64_t row = t * chunk; row < end; ++row)
      if (p.active[row]) anderson_row(p, row);
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
