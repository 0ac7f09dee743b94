// Dense linear algebra of one row's problem: products of a matrix with a vector, products with a panel, and LU
// factors with partial pivoting. Row-major throughout. Orders of summation depend on sizes only.
#pragma once

#include "gemm.h"
#include "rowmath.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Columns of a panel: enough sums for a block of rows to hide the latency of a multiply-add.
constexpr int kPanelVectors = 2;
template <class M>
constexpr int kPanel = kPanelVectors * kLanes<M>;
template <class M>
DEQFUSE_INLINE int64_t padded(int64_t n) {
  return round_up(n, kPanel<M>);
}

// Some values of type T as a vector of S; the two agree, or a double is made of a float.
template <class S, class T>
DEQFUSE_INLINE Vec<S> load_as(const T* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load_unaligned(p);
  } else {
    typedef T Half __attribute__((vector_size(kLanes<S> * sizeof(T))));
    Half half;
    __builtin_memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, Vec<S>);
  }
}
template <class S>
DEQFUSE_INLINE S sum_of(Vec<S> v) {
  S sum = v[0];
  for (int l = 1; l < kLanes<S>; ++l) sum += v[l];
  return sum;
}

// out[i] = row(i) . v for i < count, four rows at a time; row(i) points at n values.
template <class S, class Row>
DEQFUSE_INLINE void dots(int64_t count, int64_t n, const S* v, S* out, Row row) {
  constexpr int W = kLanes<S>;
  for (int64_t i = 0; i < count; i += 4) {
    decltype(row(0)) r[4];
    for (int q = 0; q < 4; ++q) r[q] = row(i + q < count ? i + q : count - 1);
    Vec<S> sum[4] = {}, more[4] = {};
    int64_t k = 0;
    for (; k + 2 * W <= n; k += 2 * W) {
      const Vec<S> a = load_unaligned(v + k), b = load_unaligned(v + k + W);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        sum[q] = fma(load_as<S>(r[q] + k), a, sum[q]);
        more[q] = fma(load_as<S>(r[q] + k + W), b, more[q]);
      }
    }
    for (int q = 0; q < 4 && i + q < count; ++q) {
      S s = sum_of<S>(sum[q] + more[q]);
      for (int64_t j = k; j < n; ++j) s = std::fma(S(r[q][j]), v[j], s);
      out[i + q] = s;
    }
  }
}
// y[i] += alpha row[i]
template <class S, class T>
DEQFUSE_INLINE void add_row(int64_t n, S alpha, const T* __restrict row, S* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += alpha * S(row[i]);
}
template <class S>
DEQFUSE_INLINE S norm_of(const S* v, int64_t n) {
  return std::sqrt(dot(v, v, n));
}

// put(i, v, sum_k a[i][k] b[k]) for i < rows: vector v of the product of A, rows `stride` apart, with a panel
// (depth, kPanel).
template <class M, class Put>
DEQFUSE_INLINE void panel_product(const M* a, int64_t stride, int64_t rows, int64_t depth, const M* panel, Put put) {
  constexpr int V = kPanelVectors, JR = block_rows(V);
  for (int64_t i0 = 0; i0 < rows; i0 += JR) {
    const M* row[JR];
    for (int j = 0; j < JR; ++j) row[j] = a + (i0 + j < rows ? i0 + j : rows - 1) * stride;
    Vec<M> acc[JR][V] = {};
    accumulate<M, V, JR>(row, panel, depth, acc);
    for (int j = 0; j < JR && i0 + j < rows; ++j)
      for (int v = 0; v < V; ++v) put(i0 + j, v, acc[j][v]);
  }
}

// P A = L U of an n x n matrix in place, rows padded<M>(n) apart, 64-byte aligned, its padding finite.
template <class M>
class Factors {
 public:
  static constexpr int W = kLanes<M>, B = kPanel<M>;
  static int64_t values(int64_t n) { return n * padded<M>(n) + n * B; }

  // `memory`: values(most) of M; `pivots`: `most` numbers.
  Factors(M* memory, int32_t* pivots, int64_t most)
      : a_(memory), panel_(memory + most * padded<M>(most)), pivot_(pivots) {}

  M* matrix() { return a_; }
  // The sign of the determinant; 0 where a pivot is zero or not a number: there are no factors then.
  int sign() const { return sign_; }

  void factor(int64_t n) {
    n_ = n;
    stride_ = padded<M>(n);
    sign_ = 1;
    for (int64_t begin = 0; begin < n && sign_ != 0; begin += B) {
      const int width = n - begin < B ? int(n - begin) : B;
      factor_panel(begin, width);
      for (int r = 1; r < width; ++r)
        for (int s = 0; s < r; ++s) subtract(begin + r, a_[(begin + r) * stride_ + begin + s], begin + s, begin + B);
      const int64_t below = begin + width;
      for (int64_t column = begin + B; column < n; column += B) {
        for (int r = 0; r < width; ++r) std::memcpy(panel_ + r * B, at(begin + r, column), sizeof(M) * B);
        M* corner = at(below, column);
        panel_product(at(below, begin), stride_, n - below, width, panel_, [&](int64_t i, int v, Vec<M> sum) {
          M* to = corner + i * stride_ + v * W;
          store(to, load(to) - sum);
        });
      }
    }
  }

  // x <- A^-1 x
  void solve(M* x) const {
    permute(x);
    for (int64_t i = 1; i < n_; ++i) x[i] -= dot(at(i, 0), x, i);
    for (int64_t i = n_ - 1; i >= 0; --i) x[i] = (x[i] - dot(at(i, i + 1), x + i + 1, n_ - i - 1)) / *at(i, i);
  }
  // x <- A^-T x
  void solve_transposed(M* x) const {
    for (int64_t i = 0; i < n_; ++i) {
      x[i] /= *at(i, i);
      add_row(n_ - i - 1, -x[i], at(i, i + 1), x + i + 1);
    }
    for (int64_t i = n_ - 1; i > 0; --i) add_row(i, -x[i], at(i, 0), x);
    for (int64_t i = n_ - 1; i >= 0; --i) swap(x[i], x[pivot_[i]]);
  }

 private:
  M* at(int64_t i, int64_t j) const { return a_ + i * stride_ + j; }
  static void swap(M& a, M& b) {
    const M c = a;
    a = b;
    b = c;
  }
  void permute(M* x) const {
    for (int64_t i = 0; i < n_; ++i) swap(x[i], x[pivot_[i]]);
  }

  // row i -= factor * row k, from column `from` on, which starts a vector.
  void subtract(int64_t i, M factor, int64_t k, int64_t from) {
    for (int64_t j = from; j < stride_; j += W) store(at(i, j), fma(splat(-factor), load(at(k, j)), load(at(i, j))));
  }

  void factor_panel(int64_t begin, int width) {
    for (int c = 0; c < width; ++c) {
      const int64_t column = begin + c;
      int64_t best = column;
      M largest = -1;
      for (int64_t i = column; i < n_; ++i) {
        const M size = std::fabs(*at(i, column));
        if (size > largest) largest = size, best = i;
      }
      if (!(largest > M(0)) || !is_finite(largest)) {
        sign_ = 0;
        return;
      }
      pivot_[column] = int32_t(best);
      if (best != column) {
        sign_ = -sign_;
        for (int64_t j = 0; j < stride_; j += W) {
          const Vec<M> other = load(at(best, j));
          store(at(best, j), load(at(column, j)));
          store(at(column, j), other);
        }
      }
      if (*at(column, column) < M(0)) sign_ = -sign_;
      // What the pivot's row still takes from the others: zeros up to the pivot.
      alignas(64) M rest[B];
      std::memcpy(rest, at(column, begin), sizeof rest);
      for (int j = 0; j <= c; ++j) rest[j] = 0;
      const M inverse = M(1) / *at(column, column);
      for (int64_t i = column + 1; i < n_; ++i) {
        M* row = at(i, begin);
        const M factor = row[c] *= inverse;
        const Vec<M> minus = splat(-factor);
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) store(row + v * W, fma(minus, load(rest + v * W), load(row + v * W)));
      }
    }
  }

  M *const a_, *const panel_;
  int32_t* const pivot_;
  int64_t n_ = 0, stride_ = 0;
  int sign_ = 0;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
