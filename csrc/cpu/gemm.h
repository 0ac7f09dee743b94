// Products of a (d x d) matrix with a tile, and of two panel matrices over their rows.
//
// A tile holds R = NV vectors of samples side by side: element i of sample l lies at tile[i * R + l].
// Samples are SIMD lanes, so everything that couples the features of one sample (GroupNorm, dots, the
// small solves) is vertical arithmetic and no sample can touch another.
#pragma once

#include "lanes.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Output rows per block: enough accumulators to hide the latency of a multiply-add (8), few enough for the register
// file (32 registers, 16 on AVX2). With AVX-512 eight rows of one vector are faster than sixteen: fewer streams.
constexpr int block_rows(int nv) { return kBytes == 64 ? (nv > 2 ? 6 : 8) : (kBytes == 16 ? 16 : 8) / nv; }

// How exact a product must be: as float32 is, or enough for an iterate at which no row ends and for an estimate by
// random probes. Only amx.h and vnni.h make a difference.
enum class Digits { kAll, kSome };

// About how many products with a tile a matrix takes part in: exact ones, and those where some digits are enough.
struct Uses {
  int64_t exact, some;
};

DEQFUSE_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Two ways in which a matrix A can lie in memory.
// As torch holds it: block_rows streams at once, as fast as a packed copy and nothing to prepare.
template <class T>
struct RowMajor {
  const T* a;
  int64_t rows, stride;
  RowMajor from(int64_t k) const { return {a + k, rows, stride}; }  // its terms from k on
};
// In blocks of block_rows output rows: element (j, k) at a[(j / JR) * block + k * step + j % JR].
template <class T>
struct Blocked {
  const T* a;
  int64_t block, step;
  Blocked from(int64_t k) const { return {a + k * step, block, step}; }
};

// acc[j][v] += sum_k a[k][j] * z[k][v]
template <class T, int NV, int JR>
DEQFUSE_INLINE void accumulate(const T* __restrict a, ptrdiff_t a_stride, const T* __restrict z, ptrdiff_t z_stride,
                               int64_t depth, Vec<T> (&acc)[JR][NV]) {
  for (int64_t k = 0; k < depth; ++k, a += a_stride, z += z_stride) {
    Vec<T> zv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) zv[v] = load(z + v * kLanes<T>);
#pragma GCC unroll 16
    for (int j = 0; j < JR; ++j) {
      const Vec<T> w = splat(a[j]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[j][v] = fma(w, zv[v], acc[j][v]);
    }
  }
}

// acc[j][v] += sum_k row[j][k] * z[k][v]
template <class T, int NV, int JR>
DEQFUSE_INLINE void accumulate(const T* const (&row)[JR], const T* __restrict z, int64_t depth, Vec<T> (&acc)[JR][NV]) {
  for (int64_t k = 0; k < depth; ++k, z += NV * kLanes<T>) {
    Vec<T> zv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) zv[v] = load(z + v * kLanes<T>);
#pragma GCC unroll 16
    for (int j = 0; j < JR; ++j) {
      const Vec<T> w = splat(row[j][k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[j][v] = fma(w, zv[v], acc[j][v]);
    }
  }
}

// One block of A z: output rows j0 .. j0 + JR - 1 of `depth` terms, in the same order of sums for both kinds of matrix.
template <class T, int NV, int JR>
DEQFUSE_INLINE void block_product(const Blocked<T>& m, const T* z, int64_t j0, int64_t depth, Vec<T> (&acc)[JR][NV]) {
  accumulate<T, NV, JR>(m.a + j0 / JR * m.block, m.step, z, NV * kLanes<T>, depth, acc);
}
template <class T, int NV, int JR>
DEQFUSE_INLINE void block_product(const RowMajor<T>& m, const T* z, int64_t j0, int64_t depth,
                                  Vec<T> (&acc)[JR][NV]) {
  const T* row[JR];
  for (int j = 0; j < JR; ++j)
    row[j] = m.a + (j0 + j < m.rows ? j0 + j : m.rows - 1) * m.stride;  // a short block repeats its end
  accumulate<T, NV, JR>(row, z, depth, acc);
}

// out = term(j, v, bias) [+ add] for one block: j counts its rows, v vectors.
template <class T, int NV, int JR, class Term>
DEQFUSE_INLINE void store_block(int64_t j0, int64_t d, const T* __restrict bias, const T* __restrict add,
                                T* __restrict out, Term term) {
  const int rows = d - j0 < JR ? int(d - j0) : JR;
  for (int j = 0; j < JR; ++j) {
    if (j >= rows) break;
    const Vec<T> b = splat(bias ? bias[j0 + j] : T(0));
    for (int v = 0; v < NV; ++v) {
      const int64_t at = ((j0 + j) * NV + v) * kLanes<T>;
      Vec<T> r = term(j, v, b);
      if (add) r += load(add + at);
      store(out + at, r);
    }
  }
}

// out = scale * A z + bias + add, for a whole tile. `bias` (d) and `add` (tile) may be null.
template <class T, int NV, Digits = Digits::kAll, class Matrix>
void product(const Matrix& a, const T* __restrict z, T*, const T* __restrict bias, const T* __restrict add,
             T* __restrict out, int64_t d, T scale = T(1)) {
  constexpr int JR = block_rows(NV);
  for (int64_t j0 = 0; j0 < d; j0 += JR) {
    Vec<T> acc[JR][NV] = {};
    block_product<T, NV, JR>(a, z, j0, d, acc);
    store_block<T, NV, JR>(j0, d, bias, add, out,
                           [&](int j, int v, Vec<T> b) { return fma(acc[j][v], splat(scale), b); });
  }
}

// A as it lies.
template <class T>
struct Straight {
  using Matrix = RowMajor<T>;
  static constexpr int64_t kStep = 1;
  int64_t d;
  explicit Straight(int64_t features, Uses = {}) : d(features) {}
  int64_t size() const { return 0; }
  void pack(const T*, T*, int64_t, int64_t) const {}
  RowMajor<T> matrix(const T* a, const T*) const { return {a, d, d}; }
};

// A transposed. A small matrix is walked where it lies: a block of A^T is JR neighbours in each row of A. In a large
// one these are a page apart, so it is copied into blocks, padded with zeros.
template <class T, int JR>
struct Transposed {
  using Matrix = Blocked<T>;
  static constexpr int64_t kStep = JR;
  int64_t d;
  explicit Transposed(int64_t features, Uses = {}) : d(features) {}
  bool in_place() const { return d <= 128 && d % JR == 0; }
  int64_t size() const { return in_place() ? 0 : round_up(d, JR) * d; }

  // Output rows [begin, end) of the copy; begin is a multiple of JR.
  void pack(const T* __restrict a, T* __restrict copy, int64_t begin, int64_t end) const {
    if (in_place()) return;
    // Some rows of A at a time, or the blocks, which lie whole pages apart where d is a power of two, would push each
    // other out of the cache.
    for (int64_t k0 = 0; k0 < d; k0 += 64)
      for (int64_t j0 = begin; j0 < end; j0 += JR)
        for (int64_t k = k0; k < d && k < k0 + 64; ++k) {
          T block[JR] = {};
          if (d - j0 >= JR) std::memcpy(block, a + k * d + j0, sizeof block);
          else std::memcpy(block, a + k * d + j0, sizeof(T) * (d - j0));
          std::memcpy(copy + j0 * d + k * JR, block, sizeof block);
        }
  }
  Blocked<T> matrix(const T* a, const T* copy) const {
    return in_place() ? Blocked<T>{a, JR, d} : Blocked<T>{copy, JR * d, JR};
  }
};

// Rows and vectors of a block of the product over the rows of a batch: enough sums to hide the latency of a multiply-add.
constexpr int kGradientVectors = 2, kGradientRows = block_rows(kGradientVectors);

// Its first factor: of each tile kGradientRows features at a time, and of those all tiles one after the other.
template <class T, int NV>
struct Strips {
  static constexpr int R = NV * kLanes<T>, JR = kGradientRows;
  T* p;
  int64_t rows, d;

  static int64_t size(int64_t rows, int64_t d) { return round_up(rows, R) * round_up(d, JR); }
  T* at(int64_t i, int64_t row) const { return p + i / JR * JR * round_up(rows, R) + row / R * R * JR; }
  void take(const T* tile, const LaneRows<R>& from) const {
    for (int64_t i = 0; i < d; i += JR)
      std::memcpy(at(i, from.row[0]), tile + i * R, sizeof(T) * R * (d - i < JR ? d - i : JR));
  }
};

// Its second factor: kWidth features per panel, those of a row side by side.
template <class T, int NV, int kWidth>
struct Panels {
  T* p;
  int64_t rows, d;

  static int64_t size(int64_t rows, int64_t d) { return rows * round_up(d, kWidth); }
  T* at(int64_t i, int64_t row) const { return p + i / kWidth * rows * kWidth + row * kWidth + i % kWidth; }

  // The values of lanes that have a row into that row; the last panel is padded with zeros.
  void take(const T* tile, const LaneRows<NV * kLanes<T>>& from) const {
    for_rows_of_lanes<T, NV>(tile, nullptr, from, d, [&](int l, int64_t i, const T* values, int) {
      std::memcpy(at(i, from.row[l]), values, sizeof(Vec<T>));
    });
    for (int64_t i = round_up(d, kLanes<T>); i < round_up(d, kWidth); ++i)
      for (int64_t row : from.row)
        if (row >= 0) *at(i, row) = T(0);
  }
};

// Rows of a batch whose products are summed up before they are added to the result: their panels stay in cache, and
// partial sums keep the rounding small.
constexpr int64_t kSummedRows = 256;

// out = A^T B over all rows, columns [k0, k0 + kWidth) of the (d, d) result; added to it unless `fresh`.
template <class T, int NV, int kWidth>
void outer_product(const Strips<T, NV>& a, const Panels<T, NV, kWidth>& b, int64_t k0, T* out, bool fresh) {
  constexpr int W = kLanes<T>, V = kWidth / W, JR = kGradientRows, R = NV * W;
  const int64_t d = a.d, columns = d - k0 < kWidth ? d - k0 : kWidth;
  for (int64_t r0 = 0; r0 < a.rows || r0 == 0; r0 += kSummedRows) {
    const int64_t end = r0 + kSummedRows < a.rows ? r0 + kSummedRows : a.rows;
    for (int64_t j0 = 0; j0 < d; j0 += JR) {
      Vec<T> acc[JR][V] = {};
      for (int64_t r = r0; r < end; r += R) {
        const T* row[JR];
        for (int j = 0; j < JR; ++j) row[j] = a.at(j0, r) + (j0 + j < d ? j : 0) * R;
        accumulate<T, V, JR>(row, b.at(k0, r), end - r < R ? end - r : R, acc);
      }
#pragma GCC unroll 16
      for (int j = 0; j < JR; ++j) {
        if (j0 + j >= d) break;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          T* o = out + (j0 + j) * d + k0 + v * W;
          const int64_t count = columns - v * W;
          store_some(o, fresh && r0 == 0 ? acc[j][v] : load_some(o, count) + acc[j][v], count);
        }
      }
    }
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
