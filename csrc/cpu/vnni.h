// Products of 16-bit integers beside those of gemm.h, for iterates at which no row ends (Digits::kSome).
//
// With AVX-512 VNNI an instruction adds the products of 16 pairs of 16-bit integers to 16 sums, twice the terms of a
// fused multiply-add. Each row of the matrix, and each row of the batch (a lane), is scaled to the norm kNorm and
// rounded. By Cauchy and Schwarz no sum leaves 32 bits, and integers add up alike in any order: a row's product depends
// neither on its neighbours nor on the tile's width. Rounding costs sqrt(d / 12) / kNorm of either norm: at d = 1024 an
// error of 4e-4 of the product's root mean square, which the gain of the map (0.1 at the default init) makes smaller.
// NaN and infinity stay in the norm, by which the product is multiplied.
//
// Two neighbours along the terms of a sum are one int32_t, a `pair`; matrices of pairs lie as gemm.h has them.
#pragma once

#include "gemm.h"
#include "rowmath.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr float kNorm = 32700;  // no integer beyond 16 bits, rounded or not
constexpr float kLeast = 1e-15f;  // below, squares vanish: such a row counts as zero

DEQFUSE_INLINE int64_t pairs_of(int64_t d) { return (d + 1) / 2; }

// By what numbers of this norm are multiplied to become integers, and these to come back.
DEQFUSE_INLINE Vec<float> to_integers(Vec<float> norm) {
  return norm < splat(kLeast) ? Vec<float>{} : splat(kNorm) / norm;
}
DEQFUSE_INLINE Vec<float> from_integers(Vec<float> norm) { return norm * splat(1 / kNorm); }

// x * scale, rounded, in the lower half of each lane: beside a float of this size there is no room for a fraction.
DEQFUSE_INLINE Vec<int32_t> rounded(Vec<float> x, Vec<float> scale) {
  return (Vec<int32_t>)fma(x, scale, splat(12582912.0f));
}
DEQFUSE_INLINE Vec<int32_t> pair(Vec<int32_t> first, Vec<int32_t> second) {
  return (first & (0xffff - Vec<int32_t>{})) | second << 16;
}

// A matrix of gemm.h and the same in pairs, with what each output row's sums are multiplied by; `unit` null: not there.
template <class Exact>
struct PairedMatrix {
  Exact exact;
  RowMajor<int32_t> pairs;
  const float* unit;
};

// Its copy, of A or, kTransposed, of A^T: what `Exact` copies, the units, the pairs.
template <class Exact, bool kTransposed>
struct WithPairs {
  using Matrix = PairedMatrix<typename Exact::Matrix>;
  static constexpr int W = kLanes<float>;
  static constexpr int64_t kStep = kTransposed ? 48 : 1;  // whole blocks of `Exact`, whole vectors
  Exact exact;
  int64_t d;
  bool paired;

  WithPairs(int64_t features, Uses uses) : exact(features, uses), d(features), paired(uses.some > 0) {}
  int64_t size() const { return paired ? units_at() + round_up(d, W) + round_up(d * pairs_of(d), W) : exact.size(); }
  Matrix matrix(const float* a, const float* copy) const {
    if (!paired) return {exact.matrix(a, copy), {nullptr, d}, nullptr};
    return {exact.matrix(a, copy), {pairs(copy), d}, copy + units_at()};
  }

  // Output rows [begin, end) of the copy; begin is a multiple of kStep.
  void pack(const float* a, float* copy, int64_t begin, int64_t end) const {
    exact.pack(a, copy, begin, end);
    if (!paired) return;
    constexpr int64_t columns = kMost * W;
    for (int64_t j = begin; j < end; j += kTransposed ? columns : 1)
      if (kTransposed) pack_columns(a, j, end - j < columns ? end : j + columns, copy);
      else pack_row(a, j, copy);
  }

 private:
  static constexpr int kMost = 6;  // vectors of columns at once

  int64_t units_at() const { return round_up(exact.size(), W); }
  const int32_t* pairs(const float* copy) const {
    return reinterpret_cast<const int32_t*>(copy + units_at() + round_up(d, W));
  }
  int32_t* pairs(float* copy) const { return reinterpret_cast<int32_t*>(copy + units_at() + round_up(d, W)); }

  void pack_row(const float* a, int64_t j, float* copy) const {
    typedef int16_t Halves __attribute__((vector_size(kBytes / 2)));
    a += j * d;
    int16_t* to = reinterpret_cast<int16_t*>(pairs(copy) + j * pairs_of(d));
    const Vec<float> norm = square_root<float>(splat(dot(a, a, d))), scale = to_integers(norm);
    copy[units_at() + j] = from_integers(norm)[0];
    const auto line = [&](int64_t k, int64_t count) {
      return __builtin_convertvector(rounded(load_some(a + k, count), scale), Halves);
    };
    int64_t k = 0;
    for (; k + W <= d; k += W) {
      const Halves full = line(k, W);
      std::memcpy(to + k, &full, sizeof full);
    }
    const Halves rest = line(k, d - k);
    if (k < d) std::memcpy(to + k, &rest, sizeof(int16_t) * (2 * pairs_of(d) - k));
  }

  // The rows of A are walked once for the norms and once, 2 W at a time, for the pairs: of large matrices they are
  // pages apart.
  void pack_columns(const float* a, int64_t begin, int64_t end, float* copy) const {
    Vec<float> scale[kMost] = {};
    const int vectors = int((end - begin + W - 1) / W);
    for (int64_t k = 0; k < d; ++k)
      for (int g = 0; g < vectors; ++g) {
        const int64_t j = begin + g * W;
        const Vec<float> line = load_some(a + k * d + j, d - j);
        scale[g] = fma(line, line, scale[g]);
      }
    for (int g = 0; g < vectors; ++g) {
      const Vec<float> norm = square_root<float>(scale[g]), unit = from_integers(norm);
      store(copy + units_at() + begin + g * W, unit);
      scale[g] = to_integers(norm);
    }
    for (int64_t k0 = 0; k0 < d; k0 += 2 * W)
      for (int g = 0; g < vectors; ++g) {
        const int64_t j0 = begin + g * W, pairs_left = pairs_of(d) - k0 / 2;
        const auto line = [&](int64_t k) {
          return k < d ? rounded(load_some(a + k * d + j0, d - j0), scale[g]) : Vec<int32_t>{};
        };
        Vec<float> block[W];  // of pairs, whose bits transpose() moves
        for (int q = 0; q < W; ++q) block[q] = (Vec<float>)pair(line(k0 + 2 * q), line(k0 + 2 * q + 1));
        transpose<float>(block);
        int32_t* to = pairs(copy) + j0 * pairs_of(d) + k0 / 2;
        for (int q = 0; q < W && j0 + q < d; ++q, to += pairs_of(d))
          if (pairs_left >= W) std::memcpy(to, &block[q], sizeof block[q]);
          else std::memcpy(to, &block[q], sizeof(int32_t) * pairs_left);
      }
  }
};

// A tile in pairs, (pairs_of(d), R), and what each lane's sums are multiplied by.
template <int NV>
void pair_tile(const float* z, int32_t* pairs, Vec<float> (&unit)[NV], int64_t d) {
  constexpr int W = kLanes<float>, R = NV * W;
  Vec<float> scale[NV], square[NV];
  sum_features<float, NV>(d, square, [&](int64_t k, int v, Vec<float> s) {
    const Vec<float> a = load(z + k * R + v * W);
    return fma(a, a, s);
  });
  for (int v = 0; v < NV; ++v) {
    const Vec<float> norm = square_root<float>(square[v]);
    scale[v] = to_integers(norm);
    unit[v] = from_integers(norm);
  }
  for (int64_t k = 0; k < d; k += 2)
    for (int v = 0; v < NV; ++v) {
      const float* at = z + k * R + v * W;
      const Vec<int32_t> second = k + 1 < d ? rounded(load(at + R), scale[v]) : Vec<int32_t>{};
      store(pairs + k / 2 * R + v * W, pair(rounded(load(at), scale[v]), second));
    }
}

// out = scale * A z + bias + add, for a whole tile. `bias` (d) and `add` (tile) may be null; `work`: a tile.
template <class T, int NV, Digits kDigits = Digits::kAll, class Exact>
void product(const PairedMatrix<Exact>& m, const float* z, float* work, const float* bias, const float* add,
             float* out, int64_t d, float scale = 1) {
  if (kDigits == Digits::kAll || m.unit == nullptr) return product<T, NV>(m.exact, z, work, bias, add, out, d, scale);
  constexpr int JR = block_rows(NV);
  int32_t* pairs = reinterpret_cast<int32_t*>(work);
  Vec<float> unit[NV];
  pair_tile<NV>(z, pairs, unit, d);
  for (int64_t j0 = 0; j0 < d; j0 += JR) {
    Vec<int32_t> acc[JR][NV] = {};
    block_product<int32_t, NV, JR>(m.pairs, pairs, j0, pairs_of(d), acc);
    store_block<float, NV, JR>(j0, d, bias, add, out, [&](int j, int v, Vec<float> b) {
      return fma(__builtin_convertvector(acc[j][v], Vec<float>), splat(scale * m.unit[j0 + j]) * unit[v], b);
    });
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
