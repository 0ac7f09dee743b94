// Products of a matrix with a few rows, output features being lanes: with the bits of a tile's (gemm.h, vnni.h).
//
// A tile with few rows in it does all the work of a full one. Here each lane is an output feature, and a row takes part
// with what it has: every output is the same chain of multiply-adds over k, in the same order, so it has the same bits.
// For that the columns of A must be neighbours. Panels (RowPanels) hold them so; without panels, blocks of A are
// transposed in registers at each product, which takes less than a copy does for the few products of a call.
// In 16-bit integers sums are exact in any order: there A stays as it lies and lanes run along k.
//
// Rows are `stride` values apart, a whole number of vectors, and aligned.
#pragma once

#include "products.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Up to how many rows lie feature by feature. None where float32 products run on a matrix unit, whose sums have an
// order of their own.
#ifdef DEQFUSE_AMX
template <class T>
constexpr int kFewRows = sizeof(T) == 4 ? 0 : kLanes<T> / 2;
#else
template <class T>
constexpr int kFewRows = kLanes<T> / 2;
#endif
// From how many on a tile is as fast depends on whether panels are there, and on the width: the narrower a row, the
// more of its time goes into norms and sums.
template <class T>
constexpr int64_t few_rows(int64_t d, bool panels) {
  const int64_t sixteenths = !panels ? 5 : d < 128 ? 6 : 8;
  return kFewRows<T> > 0 ? kLanes<T> * sixteenths / 16 : 0;
}

// A in panels of kLanes output features, those of a column side by side, padded with zeros.
template <class T>
struct RowPanels {
  static constexpr int W = kLanes<T>;
  static int64_t size(int64_t d) { return round_up(d, W) * d; }

  static void pack(const T* a, T* panels, int64_t d) {
    for (int64_t j = 0; j < d; j += W) {
      T* to = panels + j * d;
      for (int64_t k = 0; k < d; k += W) {
        Vec<T> m[W] = {};
        for (int q = 0; q < W && j + q < d; ++q) m[q] = load_some(a + (j + q) * d + k, d - k);
        transpose<T>(m);
        for (int q = 0; q < W && k + q < d; ++q) store(to + (k + q) * W, m[q]);
      }
    }
  }
};

template <class T>
DEQFUSE_INLINE const RowMajor<T>& exact_part(const RowMajor<T>& m) {
  return m;
}
#ifdef DEQFUSE_VNNI
template <class Exact, class Pairs>
DEQFUSE_INLINE const Exact& exact_part(const PairedMatrix<Exact, Pairs>& m) {
  return m.exact;
}
#endif

template <class T>
struct RowsMatrix {
  typename StraightForm<T, 1>::Matrix straight;
  const T* panels;  // or null
};

// Some rows of `rows`, and where their products go.
template <class T>
struct RowBatch {
  const T* z;
  T* out;
  const T *bias, *add;  // (d,) and rows as z, or null
  int64_t rows, stride, d;
  T scale;

  // out = scale * sums + bias [+ add]: W features of a row, from j on.
  DEQFUSE_INLINE void write(int64_t row, int64_t j, Vec<T> sums, Vec<T> by) const {
    Vec<T> r = fma(sums, by, bias ? load_some(bias + j, d - j) : Vec<T>{});
    if (add) r += load(add + row * stride + j);
    store(out + row * stride + j, r);
  }
};

// f(std::integral_constant<int, L>, first) for all rows, L at a time and up to kMost, 4 or 8; of the last L some may
// not exist.
template <int kMost, class F>
DEQFUSE_INLINE void by_rows(int64_t rows, F f) {
  for (int64_t first = 0; first < rows;) {
    const int64_t left = rows - first;
    const auto next = [&](auto count) {
      f(count, first);
      first += count();
    };
    if (kMost >= 8 && left > 4) next(std::integral_constant<int, 8>{});
    else if (left > 2) next(std::integral_constant<int, 4>{});
    else if (left > 1) next(std::integral_constant<int, 2>{});
    else next(std::integral_constant<int, 1>{});
  }
}

// The last row again where there is none.
template <class T, int L>
DEQFUSE_INLINE void row_pointers(const RowBatch<T>& b, int64_t first, const T* (&z)[L]) {
  for (int l = 0; l < L; ++l) z[l] = b.z + (first + l < b.rows ? first + l : b.rows - 1) * b.stride;
}

template <class T>
void panel_products(const T* panels, const RowBatch<T>& b) {
  constexpr int W = kLanes<T>;
  const int64_t count = (b.d + W - 1) / W;
  for (int64_t p0 = 0; p0 < count; p0 += 4)
    by_rows<4>(b.rows, [&](auto rows, int64_t first) {
      constexpr int L = rows(), V = kBytes == 64 || L < 4 ? 4 : 2;
      const T* z[L];
      row_pointers<T, L>(b, first, z);
      for (int64_t p = p0; p < p0 + 4 && p < count; p += V) {
        const T* panel[V];
        for (int v = 0; v < V; ++v) panel[v] = panels + (p + v < count ? p + v : count - 1) * b.d * W;
        Vec<T> acc[V][L] = {};
        for (int64_t k = 0; k < b.d; ++k) {
          Vec<T> w[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) w[v] = load(panel[v] + k * W);
#pragma GCC unroll 4
          for (int l = 0; l < L; ++l) {
            const Vec<T> zk = splat(z[l][k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[v][l] = fma(w[v], zk, acc[v][l]);
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          if (p + v >= count) break;
#pragma GCC unroll 4
          for (int l = 0; l < L; ++l)
            if (first + l < b.rows) b.write(first + l, (p + v) * W, acc[v][l], splat(b.scale));
        }
      }
    });
}

// W columns of W rows of A, from k on, added to the sums of L rows; the first `skip` columns only where they are new.
template <class T, int L>
DEQFUSE_INLINE void add_block(const T* const (&row)[kLanes<T>], int64_t k, int64_t skip, const T* const (&z)[L],
                              Vec<T> (&acc)[L]) {
  constexpr int W = kLanes<T>;
  Vec<T> m[W];
  load_columns<T>(row, k, m);
#pragma GCC unroll 16
  for (int q = 0; q < W; ++q)
    if (q >= skip) {
#pragma GCC unroll 8
      for (int l = 0; l < L; ++l) acc[l] = fma(m[q], splat(z[l][k + q]), acc[l]);
    }
}

template <class T>
void direct_products(const RowMajor<T>& a, const RowBatch<T>& b) {
  constexpr int W = kLanes<T>;
  const int64_t d = b.d, whole = d / W * W;
  by_rows<8>(b.rows, [&](auto rows, int64_t first) {
    constexpr int L = rows(), J = L < 8 ? 2 : 1;  // blocks of output rows at a time, which hide each other's latency
    const T* z[L];
    row_pointers<T, L>(b, first, z);
    for (int64_t j0 = 0; j0 < d; j0 += J * W) {
      const T* row[J][W];
      for (int j = 0; j < J * W; ++j) row[j / W][j % W] = a.a + (j0 + j < d ? j0 + j : d - 1) * a.stride;
      Vec<T> acc[J][L] = {};
      for (int64_t k = 0; k < whole; k += W) {
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) add_block<T, L>(row[j], k, 0, z, acc[j]);
      }
      if (whole < d && whole > 0)  // the last W columns, of which some have been added
        for (int j = 0; j < J; ++j) add_block<T, L>(row[j], d - W, W - (d - whole), z, acc[j]);
      for (int j = 0; j < J && j0 + j * W < d; ++j) {
        for (int64_t k = 0; whole == 0 && k < d; ++k) {  // less than a vector of columns
          Vec<T> m{};
          for (int q = 0; q < W; ++q) m[q] = row[j][q][k];
          for (int l = 0; l < L; ++l) acc[j][l] = fma(m, splat(z[l][k]), acc[j][l]);
        }
        for (int l = 0; l < L; ++l)
          if (first + l < b.rows) b.write(first + l, j0 + j * W, acc[j][l], splat(b.scale));
      }
    }
  });
}

#ifdef DEQFUSE_VNNI
// The sums of the lanes of each of m. Integers add up alike in any order: half of a transposition's shuffles do.
template <int H = kLanes<int32_t> / 2>
DEQFUSE_INLINE Vec<int32_t> lane_sums(Vec<int32_t> (&m)[kLanes<int32_t>]) {
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) {
    swap_blocks<int32_t, H>(m[i], m[i + H], std::make_integer_sequence<int, kLanes<int32_t>>{});
    m[i] += m[i + H];
  }
  if constexpr (H > 1) return lane_sums<H / 2>(m);
  else return m[0];
}

// Rows in pairs, each padded with zeros to whole vectors, and what each row's sums are multiplied by.
inline void pair_rows(const RowBatch<float>& b, int32_t* pairs, int64_t stride, float (&units)[kLanes<float>]) {
  typedef int16_t Halves __attribute__((vector_size(kBytes / 2)));
  constexpr int W = kLanes<float>;
  alignas(64) float to_integers[W];
  const Scale scale = scale_of(b.d, [&](int64_t from, int64_t to) {
    Vec<float> squares{};
    for (int64_t r = 0; r < b.rows; ++r)
      squares[r] = sum_row(b.z + r * b.stride + from, to - from, [](auto s, auto a) { return add_product(s, a, a); });
    return squares;
  });
  store(units, scale.unit);
  store(to_integers, scale.to_integers);
  for (int64_t r = 0; r < b.rows; ++r) {
    int16_t* to = reinterpret_cast<int16_t*>(pairs + r * stride);
    for (int64_t k = 0; k < 2 * stride; k += W) {
      const Vec<int32_t> wide = rounded(load_some(b.z + r * b.stride + k, b.d - k), splat(to_integers[r]));
      const Halves half = k < b.d ? __builtin_convertvector(wide, Halves) : Halves{};
      std::memcpy(to + k, &half, sizeof half);
    }
  }
}

template <class Exact, class Pairs>
void pair_products(const PairedMatrix<Exact, Pairs>& m, const RowBatch<float>& b, float* work) {
  constexpr int W = kLanes<float>;
  const int64_t pairs = pairs_of(b.d), stride = round_up(pairs, W);
  int32_t* z = reinterpret_cast<int32_t*>(work);
  alignas(64) float units[W];
  pair_rows(b, z, stride, units);
  for (int64_t j0 = 0; j0 < b.d; j0 += W) {
    const int32_t* row[W];
    for (int q = 0; q < W; ++q) row[q] = m.pairs.a + (j0 + q < b.d ? j0 + q : b.d - 1) * m.pairs.stride;
    const Vec<float> unit = load_some(m.unit + j0, b.d - j0) * splat(b.scale);
    for (int64_t r = 0; r < b.rows; ++r) {
      Vec<float> sums{};
      for (int64_t k0 = 0; k0 < pairs; k0 += kSegment / 2) {
        Vec<int32_t> acc[W] = {};
        for (int64_t k = k0; k < k0 + kSegment / 2 && k < pairs; k += W) {
          const Vec<int32_t> zk = load(z + r * stride + k);
#pragma GCC unroll 16
          for (int q = 0; q < W; ++q) acc[q] = fma(load(row[q] + k), zk, acc[q]);  // zk is zero behind the end
        }
        sums += __builtin_convertvector(lane_sums(acc), Vec<float>);
      }
      b.write(r, j0, sums, unit * splat(units[r]));
    }
  }
}
#endif

// out = scale * A z + bias + add for a few rows; `work`: as many values as z has.
template <class T, Digits kDigits>
void row_products(const RowsMatrix<T>& m, const RowBatch<T>& b, [[maybe_unused]] T* work) {
#ifdef DEQFUSE_VNNI
  if constexpr (sizeof(T) == 4 && kDigits == Digits::kSome)
    if (m.straight.unit != nullptr) return pair_products(m.straight, b, work);
#endif
  if (m.panels) panel_products(m.panels, b);
  else direct_products(exact_part(m.straight), b);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
