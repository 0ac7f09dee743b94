// GroupNorm's Jacobian times matrices, from either side, in the pieces of which a product with a panel is made.
#pragma once

#include "row_norm.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Columns of W diag(gamma) S, for one norm: the sums over each group of features that all its columns share.
template <class S>
struct RightNorm {
  S *mean, *projected;  // (d, groups): of gamma_j W_ij and of x_hat_j gamma_j W_ij

  static int64_t values(int64_t d, int64_t groups) { return 2 * Arena<S>::size(d * groups); }
  void take(Arena<S>& memory, int64_t d, int64_t groups) {
    mean = memory.take(d * groups);
    projected = memory.take(d * groups);
  }

  // `work`: 2 d values.
  template <class T>
  void prepare(const T* w, const T* gamma, const NormAt<S>& norm, int64_t d, int64_t groups, S* work) {
    const int64_t width = d / groups;
    const S inverse = S(1) / S(width);
    S *weight = work, *turned = work + d;
    for (int64_t j = 0; j < d; ++j) {
      weight[j] = S(gamma[j]) * inverse;
      turned[j] = weight[j] * norm.x_hat[j];
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < d; ++i) {
        const T* row = w + i * d + g * width;
        S a, b;
        both(width, row, weight + g * width, turned + g * width, a, b);
        mean[i * groups + g] = a;
        projected[i * groups + g] = b;
      }
  }

 private:
  template <class T>
  static void both(int64_t n, const T* row, const S* u, const S* v, S& a, S& b) {
    constexpr int W = kLanes<S>;
    Vec<S> sum[2] = {};
    int64_t k = 0;
    for (; k + W <= n; k += W) {
      const Vec<S> r = load_as<S>(row + k);
      sum[0] = fma(r, load_unaligned(u + k), sum[0]);
      sum[1] = fma(r, load_unaligned(v + k), sum[1]);
    }
    a = sum_of<S>(sum[0]);
    b = sum_of<S>(sum[1]);
    for (; k < n; ++k) {
      a += S(row[k]) * u[k];
      b += S(row[k]) * v[k];
    }
  }
};

// Some columns of a matrix, to lie side by side in a panel; the rest of the panel is zero.
template <class S>
struct PanelColumns {
  int count;
  int64_t column[kPanel<S>];

  PanelColumns(const Active& active, int64_t begin) {
    count = active.count - begin < kPanel<S> ? int(active.count - begin) : kPanel<S>;
    for (int q = 0; q < kPanel<S>; ++q) column[q] = q < count ? active.index[begin + q] : 0;
  }
};

// panel[i][q] = W_ij, j the q-th of these columns.
template <class S, class T>
void gather(const T* w, int64_t d, const PanelColumns<S>& c, S* panel) {
  for (int64_t i = 0; i < d; ++i) {
    const T* row = w + i * d;
    S* to = panel + i * kPanel<S>;
    for (int q = 0; q < kPanel<S>; ++q) to[q] = q < c.count ? S(row[c.column[q]]) : S(0);
  }
}
// panel[i][q] = (W diag(gamma) S)_ij
template <class S, class T>
void gather_normed(const T* w, const T* gamma, const NormAt<S>& norm, const RightNorm<S>& right, int64_t d,
                   int64_t groups, const PanelColumns<S>& c, S* panel) {
  constexpr int P = kPanel<S>;
  S scale[P] = {}, shift[P] = {}, turn[P] = {};
  int64_t group[P] = {};
  for (int q = 0; q < c.count; ++q) {
    const int64_t j = c.column[q];
    group[q] = j / (d / groups);
    shift[q] = norm.rstd[group[q]];
    scale[q] = shift[q] * S(gamma[j]);
    turn[q] = shift[q] * norm.x_hat[j];
  }
  for (int64_t i = 0; i < d; ++i) {
    const T* row = w + i * d;
    const S *mean = right.mean + i * groups, *projected = right.projected + i * groups;
    S* to = panel + i * P;
    for (int q = 0; q < P; ++q)
      to[q] = scale[q] * S(row[c.column[q]]) - shift[q] * mean[group[q]] - turn[q] * projected[group[q]];
  }
}

// The rows of `active` of diag(gamma) S X, X a panel (d, kPanel), in place and next to each other.
template <class S, class T>
void norm_panel(S* panel, const T* gamma, const NormAt<S>& norm, const Active& active, int64_t d, int64_t groups) {
  constexpr int P = kPanel<S>, W = kLanes<S>, V = kPanelVectors;
  const int64_t width = d / groups;
  const Vec<S> inverse = splat(S(1) / S(width));
  int64_t next = 0;
  for (int64_t g = 0; g < groups; ++g) {
    Vec<S> mean[V] = {}, projected[V] = {};
    for (int64_t i = g * width; i < (g + 1) * width; ++i)
      for (int v = 0; v < V; ++v) {
        const Vec<S> a = load(panel + i * P + v * W);
        mean[v] += a;
        projected[v] = fma(a, splat(norm.x_hat[i]), projected[v]);
      }
    for (int v = 0; v < V; ++v) {
      mean[v] *= inverse;
      projected[v] *= inverse;
    }
    for (; next < active.count && active.index[next] < (g + 1) * width; ++next) {
      const int64_t i = active.index[next];
      const Vec<S> scale = splat(S(gamma[i]) * norm.rstd[g]), x = splat(norm.x_hat[i]);
      for (int v = 0; v < V; ++v)
        store(panel + next * P + v * W, scale * (load(panel + i * P + v * W) - mean[v] - x * projected[v]));
    }
  }
}

// Rows of diag(gamma) S diag(mask) W, those of `active`, next to each other: all columns, or those of `columns`.
// `mask` may be null; `sums`: 2 d values.
template <class S, class T>
void norm_rows(const T* w, const T* mask, const T* gamma, const NormAt<S>& norm, const Active& active,
               const Active* columns, int64_t d, int64_t groups, S* sums, S* out) {
  const int64_t width = d / groups, count = columns ? columns->count : d;
  const S inverse = S(1) / S(width);
  S *mean = sums, *projected = sums + d;
  int64_t next = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t j = 0; j < d; ++j) mean[j] = projected[j] = 0;
    for (int64_t l = g * width; l < (g + 1) * width; ++l) {
      const S part = (mask ? S(mask[l]) : S(1)) * inverse;
      add_row(d, part, w + l * d, mean);
      add_row(d, part * norm.x_hat[l], w + l * d, projected);
    }
    for (; next < active.count && active.index[next] < (g + 1) * width; ++next) {
      const int64_t i = active.index[next];
      const S scale = S(gamma[i]) * norm.rstd[g], x = norm.x_hat[i], own = mask ? S(mask[i]) : S(1);
      const T* row = w + i * d;
      S* to = out + next * count;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t j = columns ? columns->index[k] : k;
        to[k] = scale * (own * S(row[j]) - mean[j] - x * projected[j]);
      }
    }
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
