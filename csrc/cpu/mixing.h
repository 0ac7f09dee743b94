// The small per-row algebra of Anderson mixing, one row per lane: the products of the newest residual with the older
// ones, and the weights of the mix. Unrolled for each length of the history.
#pragma once

#include <type_traits>

#include "../common/cholesky.h"
#include "vec.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kMaxHistory = 8;

// f(std::integral_constant<int, m>) for the m of this run.
template <class F>
DEQFUSE_INLINE void with_history(int m, F f) {
  switch (m) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, kMaxHistory>{});
  }
}

// By slot, for each vector of the tile.
template <class T, int NV>
using Gram = Vec<T>[kMaxHistory][kMaxHistory][NV];

// The residual g = f - z of the newest of m slots, its products with itself and the A - 1 before it, and |f|^2.
template <class T, int NV, int A>
void measure(int64_t d, const T* z, const T* f, T* residuals, int slot, int m, Vec<T> (&ff)[NV], Gram<T, NV>& gram) {
  constexpr int W = kLanes<T>, R = NV * W;
  const T* before[A];
  for (int a = 0; a < A; ++a) before[a] = residuals + d * R * ((slot - a + m) % m);
  T* g = residuals + d * R * slot;
  Vec<T> dots[A][NV] = {}, squares[NV] = {};
  for (int64_t o = 0; o < d * R; o += R)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = o + v * W;
      const Vec<T> fi = load(f + at), gi = fi - load(z + at);
      store(g + at, gi);
      squares[v] = fma(fi, fi, squares[v]);
#pragma GCC unroll 8
      for (int a = 1; a < A; ++a) dots[a][v] = fma(gi, load(before[a] + at), dots[a][v]);
      dots[0][v] = fma(gi, gi, dots[0][v]);
    }
  for (int v = 0; v < NV; ++v) {
    for (int a = 0; a < A; ++a) gram[slot][(slot - a + m) % m][v] = gram[(slot - a + m) % m][slot][v] = dots[a][v];
    ff[v] = squares[v];
  }
}

// The weights of the A newest residuals, whose slots are given by age, for vector v of the tile.
template <class T, int NV, int A>
DEQFUSE_INLINE void weights_by_age(const Gram<T, NV>& gram, const int (&slots)[A], int v, Vec<T> count, T lam,
                                   Vec<T> (&alpha)[A]) {
  Vec<T> by_age[A][A];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a)
#pragma GCC unroll 8
    for (int b = 0; b <= a; ++b) by_age[a][b] = gram[slots[a]][slots[b]][v];
  if (A == 1) alpha[0] = splat(T(1));
  else mixing_weights<VecLane<T>, A>(by_age, count, lam, alpha);
}

// z <- sum_a alpha_a (f_a - (1 - beta) g_a) over the A newest of m slots; lanes that `keep` keep z.
template <class T, int NV, int A>
void mix(int64_t d, T* z, const T* images, const T* residuals, int slot, int m, const Gram<T, NV>& gram,
         const Vec<T> (&count)[NV], const Vec<T> (&keep)[NV], T beta, T lam) {
  constexpr int W = kLanes<T>, R = NV * W;
  const Vec<T> damp = splat(T(1) - beta), zero{};
  int slots[A];  // by age
  for (int a = 0; a < A; ++a) slots[a] = (slot - a + m) % m;
  for (int v = 0; v < NV; ++v) {
    Vec<T> alpha[A];
    weights_by_age<T, NV, A>(gram, slots, v, count[v], lam, alpha);
    for (int64_t o = v * W; o < d * R; o += R) {
      Vec<T> mixed{};
#pragma GCC unroll 8
      for (int a = 0; a < A; ++a) {
        const int64_t at = d * R * slots[a] + o;
        Vec<T> step = load(images + at);
        if (beta != T(1)) step = fma(-damp, load(residuals + at), step);
        // Select, never multiply by zero: a dead slot may hold the NaN of an earlier row.
        mixed = alpha[a] == zero ? mixed : fma(alpha[a], step, mixed);
      }
      store(z + o, keep[v] > zero ? load(z + o) : mixed);
    }
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
