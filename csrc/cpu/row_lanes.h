// How the rows of a block lie in memory while they are solved: as lanes, or, a few of them, feature by feature.
//
// Both have the same members, and give each row the same bits. What a tile is to RowsAsLanes, `size()` values, is to
// FeaturesAsLanes the rows one after the other, each padded to whole vectors. `memory` for tiles of either has kSlack
// values behind its end.
#pragma once

#include "mixing.h"
#include "row_products.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int64_t kSlack = 16;  // a vector may be read, and written as it was, from the last value on

// A GroupNorm over all groups. `skip`: what is added to its output, or null.
template <class T>
struct Norm {
  const T *gamma, *beta, *skip;
  NormForm form;
};

// Tiles, as gemm.h has them.
template <class T, int NV>
struct RowsAsLanes {
  static constexpr int W = kLanes<T>, R = NV * W;
  using Matrix = typename StraightForm<T, NV>::Matrix;

  const int64_t d;
  RowsAsLanes(int64_t features) : d(features) {}
  int64_t size() const { return d * R; }

  void take(const T* matrix, const LaneRows<R>& rows, T* tile) const { rows_to_lanes<T, NV>(matrix, rows, tile, d); }
  void give(const T* tile, const T* minus, const LaneRows<R>& rows, T* matrix) const {
    lanes_to_rows<T, NV>(tile, minus, rows, matrix, d);
  }
  // Rows that make(row, to) makes; `memory` holds a tile.
  template <class Make>
  void make(const LaneRows<R>& rows, T* tile, T* memory, Make make) const {
    LaneRows<R> own;
    for (int l = 0; l < R; ++l) {
      own.row[l] = rows.row[l] >= 0 ? l : -1;
      if (own.row[l] >= 0) make(rows.row[l], memory + l * d);
    }
    take(memory, own, tile);
  }
  template <class... Tile>
  void move(const LaneMoves<T, NV>& moves, const T* from, Tile*... to) const {
    move_lanes(moves, d, from, to...);
  }
  // to = from [- minus], of one row.
  void copy_row(int l, const T* from, const T* minus, T* to) const {
    for (int64_t o = l; o < size(); o += R) to[o] = minus ? from[o] - minus[o] : from[o];
  }

  // body(o, of, lane) for all vectors: of(p) are its features of a vector (d,), lane(v) is its part of numbers per row.
  template <class Body>
  DEQFUSE_INLINE void each(Body body) const {
    for (int64_t i = 0; i < d; ++i)
      for (int v = 0; v < NV; ++v)
        body(i * R + v * W, [=](const T* p) { return splat(p[i]); }, [=](const Vec<T>(&rows)[NV]) { return rows[v]; });
  }

  template <Digits kDigits = Digits::kAll>
  void multiply(const Matrix& a, const T* z, T* work, const T* bias, const T* add, T* out, T scale = T(1)) const {
    product<T, NV, kDigits>(a, z, work, bias, add, out, d, scale);
  }
  // All norms of a group while it is in the cache.
  template <class... Norms>
  void normalise(T* y, int64_t groups, Norms... norms) const {
    const int64_t width = d / groups;
    for (int64_t at = 0; at < d; at += width)
      (norm_group<T, NV>(y + at * R, norms.gamma + at, norms.beta + at, norms.skip ? norms.skip + at * R : nullptr,
                         width, norms.form),
       ...);
  }
  // The sum over the features of zero times each: zero, or NaN where one is not finite.
  void poison(const T* tile, Vec<T> (&sum)[NV]) const {
    for (int v = 0; v < NV; ++v) {
      sum[v] = Vec<T>{};
      for (int64_t o = v * W; o < size(); o += R) sum[v] += load(tile + o) * splat(T(0));
    }
  }
  void squares(const T* tile, Vec<T> (&sum)[NV]) const {
    for (Vec<T>& s : sum) s = Vec<T>{};
    for (int64_t o = 0; o < size(); o += R)
      for (int v = 0; v < NV; ++v) {
        const Vec<T> s = load(tile + o + v * W);
        sum[v] = fma(s, s, sum[v]);
      }
  }
  // |f - z|^2 and |f|^2; rows that are `ready` get z for f.
  void plain_step(const T* z, T* f, const T* ready, Vec<T> (&gg)[NV], Vec<T> (&ff)[NV]) const {
    for (int v = 0; v < NV; ++v) {
      gg[v] = ff[v] = Vec<T>{};
      const Vec<T> keep = load(ready + v * W), zero{};
      for (int64_t o = v * W; o < size(); o += R) {
        const Vec<T> zo = load(z + o), fo = load(f + o), g = fo - zo;
        gg[v] = fma(g, g, gg[v]);
        ff[v] = fma(fo, fo, ff[v]);
        store(f + o, keep > zero ? zo : fo);
      }
    }
  }
  template <int A>
  void measured(const T* z, const T* f, T* residuals, int slot, int m, Vec<T> (&ff)[NV], Gram<T, NV>& gram) const {
    measure<T, NV, A>(d, z, f, residuals, slot, m, ff, gram);
  }
  template <int A>
  void mixed(T* z, const T* images, const T* residuals, int slot, int m, const Gram<T, NV>& gram,
             const Vec<T> (&count)[NV], const Vec<T> (&keep)[NV], T beta, T lam) const {
    mix<T, NV, A>(d, z, images, residuals, slot, m, gram, count, keep, beta, lam);
  }
};

// The first `count` of kLanes rows, of which only these have memory. All are taken at once and stay where they are.
template <class T>
struct FeaturesAsLanes {
  static constexpr int W = kLanes<T>, R = W;
  using Matrix = RowsMatrix<T>;

  const int64_t d, stride;
  const int count;
  FeaturesAsLanes(int64_t features, int rows) : d(features), stride(round_up(features, W)), count(rows) {}
  int64_t size() const { return count * stride; }

  void take(const T* matrix, const LaneRows<R>& rows, T* tile) const {
    for (int l = 0; l < count; ++l) {
      std::memcpy(tile + l * stride, matrix + rows.row[l] * d, sizeof(T) * d);
      pad(tile + l * stride);
    }
  }
  void give(const T* tile, const T* minus, const LaneRows<R>& rows, T* matrix) const {
    for (int l = 0; l < count; ++l) {
      if (rows.row[l] < 0) continue;
      T* to = matrix + rows.row[l] * d;
      if (minus == nullptr) std::memcpy(to, tile + l * stride, sizeof(T) * d);
      else
        for (int64_t k = 0; k < d; ++k) to[k] = tile[l * stride + k] - minus[l * stride + k];
    }
  }
  template <class Make>
  void make(const LaneRows<R>& rows, T* tile, T*, Make make) const {
    for (int l = 0; l < count; ++l) {
      make(rows.row[l], tile + l * stride);
      pad(tile + l * stride);
    }
  }
  template <class... Tile>
  void move(const LaneMoves<T, 1>&, const T* from, Tile*... to) const {
    (std::memcpy(to, from, sizeof(T) * size()), ...);
  }
  void copy_row(int l, const T* from, const T* minus, T* to) const {
    for (int64_t o = l * stride; o < (l + 1) * stride; ++o) to[o] = minus ? from[o] - minus[o] : from[o];
  }

  template <class Body>
  DEQFUSE_INLINE void each(Body body) const {
    for (int l = 0; l < count; ++l)
      for (int64_t k = 0; k < d; k += W)
        body(l * stride + k, [=](const T* p) { return load_some(p + k, d - k); },
             [=](const Vec<T>(&rows)[1]) { return splat(rows[0][l]); });
  }

  template <Digits kDigits = Digits::kAll>
  void multiply(const Matrix& a, const T* z, T* work, const T* bias, const T* add, T* out, T scale = T(1)) const {
    row_products<T, kDigits>(a, {z, out, bias, add, count, stride, d, scale}, work);
  }
  template <class... Norms>
  void normalise(T* y, int64_t groups, Norms... norms) const {
    for (int l = 0; l < count; ++l) (norm_row(y, l * stride, groups, norms), ...);
  }
  void poison(const T* tile, Vec<T> (&sum)[1]) const {
    for (int l = 0; l < count; ++l) {
      sum[0][l] = 0;
      for (int64_t k = 0; k < d; ++k) sum[0][l] += tile[l * stride + k] * T(0);
    }
  }
  void squares(const T* tile, Vec<T> (&sum)[1]) const {
    chains<1>([&](int64_t o, T(&s)[1]) { s[0] = fma(tile[o], tile[o], s[0]); },
              [&](int l, const T(&s)[1]) { sum[0][l] = s[0]; });
  }
  void plain_step(const T* z, T* f, const T* ready, Vec<T> (&gg)[1], Vec<T> (&ff)[1]) const {
    chains<2>(
        [&](int64_t o, T(&s)[2]) {
          const T g = f[o] - z[o];
          s[0] = fma(g, g, s[0]);
          s[1] = fma(f[o], f[o], s[1]);
        },
        [&](int l, const T(&s)[2]) {
          gg[0][l] = s[0];
          ff[0][l] = s[1];
        });
    for (int l = 0; l < count; ++l)
      if (ready[l] > T(0)) copy_row(l, z, nullptr, f);
  }
  template <int A>
  void measured(const T* z, const T* f, T* residuals, int slot, int m, Vec<T> (&ff)[1], Gram<T, 1>& gram) const {
    const T* before[A];
    for (int a = 0; a < A; ++a) before[a] = residuals + size() * ((slot - a + m) % m);
    T* g = residuals + size() * slot;
    for (int64_t o = 0; o < size(); o += W) store(g + o, load(f + o) - load(z + o));
    chains<A + 1>(
        [&](int64_t o, T(&s)[A + 1]) {
          const T gi = g[o];
          s[A] = fma(f[o], f[o], s[A]);
#pragma GCC unroll 8
          for (int a = 1; a < A; ++a) s[a] = fma(gi, before[a][o], s[a]);
          s[0] = fma(gi, gi, s[0]);
        },
        [&](int l, const T(&s)[A + 1]) {
          for (int a = 0; a < A; ++a) {
            const int other = (slot - a + m) % m;
            gram[slot][other][0][l] = gram[other][slot][0][l] = s[a];
          }
          ff[0][l] = s[A];
        });
  }
  template <int A>
  void mixed(T* z, const T* images, const T* residuals, int slot, int m, const Gram<T, 1>& gram,
             const Vec<T> (&counts)[1], const Vec<T> (&keep)[1], T beta, T lam) const {
    const Vec<T> damp = splat(T(1) - beta);
    int slots[A];  // by age
    for (int a = 0; a < A; ++a) slots[a] = (slot - a + m) % m;
    Vec<T> alpha[A];
    weights_by_age<T, 1, A>(gram, slots, 0, counts[0], lam, alpha);
    for (int l = 0; l < count; ++l) {
      if (keep[0][l] > T(0)) continue;
      for (int64_t o = l * stride; o < (l + 1) * stride; o += W) {
        Vec<T> sum{};
#pragma GCC unroll 8
        for (int a = 0; a < A; ++a) {
          const T weight = alpha[a][l];
          if (weight == T(0)) continue;  // a dead slot may hold the NaN of an earlier row
          const int64_t at = size() * slots[a] + o;
          Vec<T> step = load(images + at);
          if (beta != T(1)) step = fma(-damp, load(residuals + at), step);
          sum = fma(splat(weight), step, sum);
        }
        store(z + o, sum);
      }
    }
  }

 private:
  void pad(T* row) const {
    for (int64_t k = d; k < stride; ++k) row[k] = T(0);
  }

  // kSums chains of sums over the features of every row: term(o, sums) adds the value at o, done(row, sums). Those of
  // two rows go side by side, or each would wait for its own latency.
  template <int kSums, class Term, class Done>
  DEQFUSE_INLINE void chains(Term term, Done done) const {
    int l = 0;
    for (; l + 2 <= count; l += 2) {
      T a[kSums] = {}, b[kSums] = {};
      for (int64_t k = l * stride; k < l * stride + d; ++k) {
        term(k, a);
        term(k + stride, b);
      }
      done(l, a);
      done(l + 1, b);
    }
    if (l == count) return;
    T a[kSums] = {};
    for (int64_t k = l * stride; k < l * stride + d; ++k) term(k, a);
    done(l, a);
  }

  // Groups whose deviations are computed together.
  void norm_row(T* tile, int64_t at, int64_t groups, const Norm<T>& norm) const {
    const bool rectify = norm.form.rectify_input;
    const int64_t width = d / groups;
    const T inv = T(1) / T(width);
    for (int64_t g0 = 0; g0 < groups; g0 += W) {
      const int64_t n = groups - g0 < W ? groups - g0 : W;
      alignas(64) T mean[W], squares[W] = {}, rstd[W];
      for (int64_t g = 0; g < n; ++g) {
        const T* y = tile + at + (g0 + g) * width;
        if (rectify) moments(y, width, inv, [](auto a) { return relu(a); }, mean[g], squares[g]);
        else moments(y, width, inv, [](auto a) { return a; }, mean[g], squares[g]);
      }
      store(rstd, inverse_deviation<VecLane<T>>(load(squares), inv));
      for (int64_t g = 0; g < n; ++g)
        apply(tile + at, norm.skip ? norm.skip + at : nullptr, (g0 + g) * width, width, mean[g], rstd[g], norm);
    }
  }
  template <class Value>
  static DEQFUSE_INLINE void moments(const T* y, int64_t width, T inv, Value value, T& mean, T& squares) {
    const T m = sum_row(y, width, [&](auto s, auto a) { return s + value(a); }) * inv;
    squares = sum_row(y, width, [&](auto s, auto a) {
      const auto centred = value(a) - m;
      return add_product(s, centred, centred);
    });
    mean = m;
  }
  // One group of a row. What follows behind its end is written as it was.
  DEQFUSE_INLINE void apply(T* row, const T* skip, int64_t at, int64_t width, T mean, T rstd,
                            const Norm<T>& norm) const {
    Vec<T> lane;
    for (int q = 0; q < W; ++q) lane[q] = T(q);
    for (int64_t k = at; k < at + width; k += W) {
      const Vec<T> before = load_unaligned(row + k);
      Vec<T> a = standardised<VecLane<T>>(norm.form.rectify_input ? relu(before) : before, splat(mean), splat(rstd));
      a = fma(a, load_some(norm.gamma + k, d - k), load_some(norm.beta + k, d - k));
      if (skip) a += load_unaligned(skip + k);
      if (norm.form.rectify_output) a = relu(a);
      const int64_t left = at + width - k;
      if (left < W) a = lane < splat(T(left)) ? a : before;
      store_some(row + k, a, W);
    }
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
