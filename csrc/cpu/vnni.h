// Products of 16-bit integers beside those of gemm.h, for iterates at which no row ends and for random probes
// (Digits::kSome).
//
// With AVX-512 VNNI an instruction adds the products of 16 pairs of 16-bit integers to 16 sums, twice the terms of a
// fused multiply-add. Each row of the matrix, and each row of the batch (a lane), is rounded after a scaling by which no
// kSegment features of it have a norm above kNorm. By Cauchy and Schwarz no sum over a segment leaves 32 bits, and
// integers add up alike in any order; the segments' sums add up in float32, in order: a row's product depends neither on
// its neighbours nor on the tile's width. Rounding costs sqrt(kSegment / 12) / kNorm of either row where its segments
// are alike: an error of 2e-4 of the product's root mean square, which the gain of the map (0.1 at the default init)
// makes smaller.
// NaN and infinity stay in the unit, by which the product is multiplied.
//
// Two neighbours along the terms of a sum are one int32_t, a `pair`; matrices of pairs lie as gemm.h has them.
#pragma once

#include "gemm.h"
#include "rowmath.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr float kNorm = 32700;  // no integer beyond 16 bits, rounded or not
constexpr float kLeast = 1e-15f;  // below, squares vanish: such a row counts as zero
constexpr int64_t kSegment = 256;

DEQFUSE_INLINE int64_t pairs_of(int64_t d) { return (d + 1) / 2; }

// By what 16 rows are multiplied to become integers, and by what these to come back.
struct Scale {
  Vec<float> to_integers, unit;
};

// From the sums of their squares over [begin, end), a segment each.
template <class Squares>
DEQFUSE_INLINE Scale scale_of(int64_t d, Squares squares) {
  Vec<float> most{}, all{};
  for (int64_t k = 0; k < d; k += kSegment) {
    const Vec<float> sum = squares(k, k + kSegment < d ? k + kSegment : d);
    most = maximum(most, sum);
    all += sum;
  }
  const Vec<float> norm = square_root<float>(most);
  return {norm < splat(kLeast) ? Vec<float>{} : splat(kNorm) / norm, norm * splat(1 / kNorm) + all * splat(0.0f)};
}

// x * scale, rounded, in the lower half of each lane: beside a float of this size there is no room for a fraction.
constexpr float kRoom = 12582912;
DEQFUSE_INLINE Vec<int32_t> rounded(Vec<float> x, Vec<float> scale) {
  return (Vec<int32_t>)fma(x, scale, splat(kRoom));
}
DEQFUSE_INLINE Vec<int32_t> pair(Vec<int32_t> first, Vec<int32_t> second) {
  return (first & (0xffff - Vec<int32_t>{})) | second << 16;
}

// A matrix of gemm.h and the same in pairs, with what each output row's sums are multiplied by; `unit` null: not there.
template <class Exact, class Pairs>
struct PairedMatrix {
  Exact exact;
  Pairs pairs;
  const float* unit;
};

// What copies of A or A^T share: first what `Exact` copies, then the units, then the pairs.
template <class Exact>
class WithPairs {
 public:
  WithPairs(int64_t features, Uses uses) : exact_(features, uses), d_(features), paired_(uses.some > 0) {}
  int64_t size() const { return paired_ ? pairs_at() + rows() * pair_stride() : exact_.size(); }

 protected:
  static constexpr int W = kLanes<float>;
  int64_t rows() const { return round_up(d_, Exact::kStep); }
  int64_t pair_stride() const { return round_up(pairs_of(d_), W); }  // so that every row of pairs is aligned
  int64_t units_at() const { return round_up(exact_.size(), W); }
  int64_t pairs_at() const { return units_at() + round_up(rows(), W); }
  int32_t* pairs(float* copy) const { return reinterpret_cast<int32_t*>(copy + pairs_at()); }
  const int32_t* pairs(const float* copy) const { return reinterpret_cast<const int32_t*>(copy + pairs_at()); }

  const Exact exact_;
  const int64_t d_;
  const bool paired_;
};

// A, as it lies.
struct StraightPairs : WithPairs<Straight<float>> {
  using Matrix = PairedMatrix<RowMajor<float>, RowMajor<int32_t>>;
  static constexpr int64_t kStep = 1;
  using WithPairs::WithPairs;
  Matrix matrix(const float* a, const float* copy) const {
    if (!paired_) return {exact_.matrix(a, copy), {}, nullptr};
    return {exact_.matrix(a, copy), {pairs(copy), d_, pair_stride()}, copy + units_at()};
  }

  // Output rows [begin, end) of the copy.
  void pack(const float* a, float* copy, int64_t begin, int64_t end) const {
    for (int64_t j = begin; paired_ && j < end; j += W) {
      const int64_t count = end - j < W ? end - j : W;
      const float* rows = a + j * d_;
      const Scale scale = scale_of(d_, [&](int64_t from, int64_t to) {
        Vec<float> m[W] = {};
        for (int64_t q = 0; q < count; ++q) m[q] = squares(rows + q * d_, from, to);
        return sums_of_lanes<float>(m);
      });
      store_some(copy + units_at() + j, scale.unit, count);
      for (int64_t q = 0; q < count; ++q)
        pack_row(rows + q * d_, splat(scale.to_integers[q]), pairs(copy) + (j + q) * pair_stride());
    }
  }

 private:
  static Vec<float> squares(const float* row, int64_t from, int64_t to) {
    Vec<float> sums[4] = {};
    int64_t k = from;
    for (; k + 4 * W <= to; k += 4 * W)
      for (int q = 0; q < 4; ++q) {
        const Vec<float> a = load_unaligned(row + k + q * W);
        sums[q] = fma(a, a, sums[q]);
      }
    for (; k < to; k += W) {
      const Vec<float> a = load_some(row + k, to - k);
      sums[0] = fma(a, a, sums[0]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  void pack_row(const float* a, Vec<float> scale, int32_t* out) const {
    typedef int16_t Halves __attribute__((vector_size(kBytes / 2)));
    const int64_t d = d_;  // the compiler would read it again after every store
    int16_t* to = reinterpret_cast<int16_t*>(out);
    const auto line = [&](int64_t k, int64_t count) {
      return __builtin_convertvector(rounded(load_some(a + k, count), scale), Halves);
    };
    int64_t k = 0;
    for (; k + W <= d; k += W) {
      const Halves full = line(k, W);
      std::memcpy(to + k, &full, sizeof full);
    }
    if (k == d) return;
    const Halves rest = line(k, d - k);  // a row of pairs has room for whole vectors
    std::memcpy(to + k, &rest, sizeof rest);
  }
};

// A^T, in blocks of JR output rows, the pairs made of the exact blocks.
template <int JR>
struct TransposedPairs : WithPairs<Transposed<float, JR>> {
  using Matrix = PairedMatrix<Blocked<float>, Blocked<int32_t>>;
  static constexpr int64_t kStep = JR;
  using Base = WithPairs<Transposed<float, JR>>;
  using Base::Base;
  Matrix matrix(const float* a, const float* copy) const {
    const Blocked<float> exact = this->exact_.matrix(a, copy);
    if (!this->paired_) return {exact, {}, nullptr};
    return {exact, {this->pairs(copy), JR * pairs_of(this->d_), JR}, copy + this->units_at()};
  }

  // Output rows [begin, end) of the copy; begin is a multiple of kStep.
  void pack(const float* a, float* copy, int64_t begin, int64_t end) const {
    this->exact_.pack(a, copy, begin, end);
    const Blocked<float> exact = this->exact_.matrix(a, copy);
    for (int64_t j = begin; this->paired_ && j < end; j += JR)
      pack_block(exact.a + j / JR * exact.block, exact.step, copy + this->units_at() + j,
                 this->pairs(copy) + j * pairs_of(this->d_));
  }

 private:
  // Eight floats, of which JR are a line of the block; of six, two more are read where the next line follows.
  typedef float Line __attribute__((vector_size(32)));
  typedef int32_t Integers __attribute__((vector_size(32)));
  static_assert(JR == 8 || JR == 6);

  void pack_block(const float* a, int64_t step, float* unit, int32_t* to) const {
    const int64_t d = this->d_;
    const auto line = [&](int64_t k) {
      Line v{};
      if (JR == 8 || k + 1 < d) std::memcpy(&v, a + k * step, sizeof v);
      else std::memcpy(&v, a + k * step, sizeof(float) * JR);
      return v;
    };
    const Scale by = scale_of(d, [&](int64_t from, int64_t end) {
      Line sums[4] = {};
      int64_t k = from;
      for (; k + 4 <= end; k += 4)
        for (int q = 0; q < 4; ++q) sums[q] += line(k + q) * line(k + q);
      for (; k < end; ++k) sums[0] += line(k) * line(k);
      const Line sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      Vec<float> squares{};
      std::memcpy(&squares, &sum, sizeof(float) * JR);
      return squares;
    });
    std::memcpy(unit, &by.unit, sizeof(float) * JR);
    Line scale;
    std::memcpy(&scale, &by.to_integers, sizeof scale);
    const auto integers = [&](int64_t k) { return (Integers)(line(k) * scale + (kRoom - Line{})); };
    for (int64_t k = 0; k < d; k += 2, to += JR) {
      Integers both = integers(k) & (0xffff - Integers{});
      if (k + 1 < d) both |= integers(k + 1) << 16;
      std::memcpy(to, &both, sizeof(int32_t) * JR);
    }
  }
};

// A tile in pairs, (pairs_of(d), R), and what each lane's sums are multiplied by.
template <int NV>
void pair_tile(const float* z, int32_t* pairs, Vec<float> (&unit)[NV], int64_t d) {
  constexpr int W = kLanes<float>, R = NV * W;
  Vec<float> scale[NV];
  for (int v = 0; v < NV; ++v) {
    const Scale by = scale_of(d, [&](int64_t from, int64_t to) {
      Vec<float> square[1];
      sum_features<float, 1>(to - from, square, [&](int64_t k, int, Vec<float> s) {
        const Vec<float> a = load(z + (from + k) * R + v * W);
        return fma(a, a, s);
      });
      return square[0];
    });
    scale[v] = by.to_integers;
    unit[v] = by.unit;
  }
  for (int64_t k = 0; k < d; k += 2)
    for (int v = 0; v < NV; ++v) {
      const float* at = z + k * R + v * W;
      const Vec<int32_t> second = k + 1 < d ? rounded(load(at + R), scale[v]) : Vec<int32_t>{};
      store(pairs + k / 2 * R + v * W, pair(rounded(load(at), scale[v]), second));
    }
}

// out = scale * A z + bias + add, for a whole tile. `bias` (d) and `add` (tile) may be null; `work`: a tile.
template <class T, int NV, Digits kDigits = Digits::kAll, class Exact, class Pairs>
void product(const PairedMatrix<Exact, Pairs>& m, const float* z, float* work, const float* bias, const float* add,
             float* out, int64_t d, float scale = 1) {
  if (kDigits == Digits::kAll || m.unit == nullptr) return product<T, NV>(m.exact, z, work, bias, add, out, d, scale);
  constexpr int JR = block_rows(NV);
  int32_t* pairs = reinterpret_cast<int32_t*>(work);
  Vec<float> unit[NV];
  pair_tile<NV>(z, pairs, unit, d);
  for (int64_t j0 = 0; j0 < d; j0 += JR) {
    Vec<float> sums[JR][NV] = {};
    int64_t k = 0;
    do {
      Vec<int32_t> acc[JR][NV] = {};
      const int64_t depth = pairs_of(d) - k < kSegment / 2 ? pairs_of(d) - k : kSegment / 2;
      block_product<int32_t, NV, JR>(m.pairs.from(k), pairs + k * NV * kLanes<float>, j0, depth, acc);
#pragma GCC unroll 16
      for (int j = 0; j < JR; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sums[j][v] += __builtin_convertvector(acc[j][v], Vec<float>);
      k += kSegment / 2;
    } while (k < pairs_of(d));
    store_block<float, NV, JR>(j0, d, bias, add, out, [&](int j, int v, Vec<float> b) {
      return fma(sums[j][v], splat(scale * m.unit[j0 + j]) * unit[v], b);
    });
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
