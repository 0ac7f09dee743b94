// The products of gemm.h on AMX, Intel's matrix unit: float32 in, float32 out.
//
// The unit multiplies bfloat16. A float32 is the exact sum of three of them, its significand cut into 8 bits each, and
// of the nine products of two such sums the six largest are as many digits as float32 keeps. They are added in float32
// by the unit itself. Six products at its rate are faster than one on AVX-512, and closer to the exact result.
// An infinity becomes NaN on the way. Where some digits are enough, three products are 16 bits.
//
// A register of the unit holds 16 rows of 64 bytes: 16 output rows by 32 terms of the one factor, 16 pairs of terms by
// 16 columns of the other, 16 x 16 sums. Everything here is laid out in such blocks of 1 KB, padded with zeros: all
// blocks of the largest pieces, then those of the others, each kind a `plane`. A sum's terms come in the same order
// whatever the tile's width.
#pragma once

#include "gemm.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

typedef uint32_t Bits __attribute__((vector_size(64)));

constexpr int64_t kBlock = 512;  // bfloat16 numbers of a block
constexpr int64_t kTerms = 32;   // of a sum, in a block

DEQFUSE_INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The unit's registers, for one thread: shaped when it begins, given back when it ends.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.bytes_per_row[t] = 64;
      shape.rows[t] = 16;
    }
    __asm__ volatile("" ::"r"(&shape) : "memory");  // compilers have believed that 8 of these bytes are read
    _tile_loadconfig(&shape);
  }
  ~MatrixUnit() { _tile_release(); }
};

// The pieces of 16 numbers, each in the upper half of its 32 bits; below the smallest nothing is left.
struct Pieces {
  Bits of[3];
};
DEQFUSE_INLINE Pieces split(Vec<float> x) {
  const Bits top = 0xffff0000u - Bits{};
  const Bits high = (Bits)x & top;
  const Vec<float> rest = x - (Vec<float>)high;
  const Bits middle = (Bits)rest & top;
  return {{high, middle, (Bits)(rest - (Vec<float>)middle)}};
}

// Pairs (a_i, b_i): two terms of 16 columns.
template <Digits kDigits = Digits::kAll>
DEQFUSE_INLINE void store_pairs(const Pieces& a, const Pieces& b, uint16_t* to, int64_t plane) {
  for (int p = 0; p < (kDigits == Digits::kAll ? 3 : 2); ++p) {
    const Bits both = a.of[p] >> 16 | (b.of[p] & (0xffff0000u - Bits{}));
    __builtin_memcpy(to + p * plane, &both, sizeof both);
  }
}
// Numbers a_0 ... a_15, b_0 ... b_15: 32 terms of one output row.
DEQFUSE_INLINE void store_terms(const Pieces& a, const Pieces& b, uint16_t* to, int64_t plane) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  for (int p = 0; p < 3; ++p) {
    const Halves x = (Halves)a.of[p], y = (Halves)b.of[p];
#if defined(__clang__)
    const Halves line = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35,
                                                37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
#else
    const Halves odd = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const Halves line = __builtin_shuffle(x, y, odd);
#endif
    __builtin_memcpy(to + p * plane, &line, sizeof line);
  }
}

// Output rows [begin, end) of A or, kTransposed, of A^T into blocks (j / 16, k / 32) of rows and terms; begin is a
// multiple of 16, and its block comes first.
template <bool kTransposed>
void split_rows(const float* a, int64_t d, int64_t begin, int64_t end, uint16_t* to, int64_t plane) {
  for (int64_t j0 = begin; j0 < end; j0 += 16)
    for (int64_t k0 = 0; k0 < d; k0 += kTerms, to += kBlock) {
      Vec<float> m[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int q = 0; q < 16; ++q) {
          const int64_t at = (kTransposed ? k0 + 16 * half : j0) + q, along = kTransposed ? j0 : k0 + 16 * half;
          m[half][q] = at < d ? load_some(a + at * d + along, d - along) : Vec<float>{};
        }
        if (kTransposed) transpose<float>(m[half]);
      }
      for (int q = 0; q < 16; ++q) store_terms(split(m[0][q]), split(m[1][q]), to + q * kTerms, plane);
    }
}

// A (d, d) matrix as first factor: its pieces, or null where they are made for each product.
template <bool kTransposed>
struct SplitMatrix {
  const float* a;
  const uint16_t* pieces;
};

// Its copy, of A or, kTransposed, of A^T, in units of float. None for few products: each then reads the matrix itself,
// of which the pieces are half as much again to read.
template <bool kTransposed>
struct SplitCopy {
  using Matrix = SplitMatrix<kTransposed>;
  static constexpr int64_t kStep = 16;
  int64_t d;
  bool copied;
  SplitCopy(int64_t features, Uses uses) : d(features), copied(uses.exact + uses.some > (features < 512 ? 1 : 5)) {}
  static int64_t plane(int64_t d) { return blocks_of(d, 16) * blocks_of(d, kTerms) * kBlock; }
  int64_t size() const { return copied ? plane(d) * 3 / 2 : 0; }
  Matrix matrix(const float* a, const float* copy) const { return {a, reinterpret_cast<const uint16_t*>(copy)}; }

  // Output rows [begin, end) of the copy; begin is a multiple of kStep.
  void pack(const float* a, float* copy, int64_t begin, int64_t end) const {
    uint16_t* to = reinterpret_cast<uint16_t*>(copy) + begin / 16 * blocks_of(d, kTerms) * kBlock;
    split_rows<kTransposed>(a, d, begin, end, to, plane(d));
  }
};

// The pieces of a tile as second factor: block (k / 32, vector) of terms and lanes.
template <int NV>
DEQFUSE_INLINE int64_t tile_plane(int64_t d) {
  return blocks_of(d, kTerms) * NV * kBlock;
}
template <int NV, Digits kDigits>
void split_tile(const float* z, uint16_t* to, int64_t d) {
  constexpr int R = NV * 16;
  for (int64_t k = 0; k < blocks_of(d, kTerms) * kTerms; k += 2)
    for (int v = 0; v < NV; ++v) {
      const Vec<float> zero{}, a = k < d ? load(z + k * R + v * 16) : zero,
                               b = k + 1 < d ? load(z + (k + 1) * R + v * 16) : zero;
      store_pairs<kDigits>(split(a), split(b), to + (k / kTerms * NV + v) * kBlock + k % kTerms / 2 * kTerms,
                           tile_plane<NV>(d));
    }
}

// sums[16 * kDown][16 * NV] = sum over `depth` blocks of terms. Blocks of the first factor lie one after the other
// along the terms, those of 16 further output rows `down` away; blocks of the second for one range of terms lie side by
// side, those for the next `next` away. The smallest products come first.
template <int kDown, int NV, Digits kDigits = Digits::kAll>
DEQFUSE_INLINE void block_sums(const uint16_t* a, int64_t a_plane, int64_t down, const uint16_t* b, int64_t b_plane,
                               int64_t next, int64_t depth, float* sums) {
  static_assert(kDown <= 2 && NV <= 2, "eight registers");
  // What the vectors' stores wrote is in memory: the compiler does not see that these instructions read it.
  __asm__ volatile("" ::: "memory");
#define DEQFUSE_LOAD_A(piece)              \
  _tile_loadd(4, a + piece * a_plane, 64); \
  if constexpr (kDown == 2) _tile_loadd(5, a + down + piece * a_plane, 64)
#define DEQFUSE_LOAD_B(piece)              \
  _tile_loadd(6, b + piece * b_plane, 64); \
  if constexpr (NV == 2) _tile_loadd(7, b + kBlock + piece * b_plane, 64)
#define DEQFUSE_ADD_PRODUCTS                         \
  _tile_dpbf16ps(0, 4, 6);                           \
  if constexpr (NV == 2) _tile_dpbf16ps(1, 4, 7);    \
  if constexpr (kDown == 2) _tile_dpbf16ps(2, 5, 6); \
  if constexpr (kDown == 2 && NV == 2) _tile_dpbf16ps(3, 5, 7)
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k, a += kBlock, b += next) {
    DEQFUSE_LOAD_B(0);
    if constexpr (kDigits == Digits::kAll) {
      DEQFUSE_LOAD_A(2);
      DEQFUSE_ADD_PRODUCTS;
    }
    DEQFUSE_LOAD_A(1);
    DEQFUSE_ADD_PRODUCTS;
    if constexpr (kDigits == Digits::kAll) {
      DEQFUSE_LOAD_B(1);
      DEQFUSE_ADD_PRODUCTS;
      DEQFUSE_LOAD_A(0);
      DEQFUSE_ADD_PRODUCTS;
      DEQFUSE_LOAD_B(2);
      DEQFUSE_ADD_PRODUCTS;
      DEQFUSE_LOAD_B(0);
      DEQFUSE_ADD_PRODUCTS;
    } else {
      DEQFUSE_LOAD_A(0);
      DEQFUSE_ADD_PRODUCTS;
      DEQFUSE_LOAD_B(1);
      DEQFUSE_ADD_PRODUCTS;
    }
  }
  constexpr int64_t row = 64 * NV;
  _tile_stored(0, sums, row);
  if constexpr (NV == 2) _tile_stored(1, sums + 16, row);
  if constexpr (kDown == 2) _tile_stored(2, sums + 256 * NV, row);
  if constexpr (kDown == 2 && NV == 2) _tile_stored(3, sums + 256 * NV + 16, row);
#undef DEQFUSE_LOAD_A
#undef DEQFUSE_LOAD_B
#undef DEQFUSE_ADD_PRODUCTS
}

// Floats that product() works in: a tile's pieces, and those of 32 rows of the matrix.
template <int NV>
DEQFUSE_INLINE int64_t work_size(int64_t d) {
  return (tile_plane<NV>(d) + tile_plane<2>(d)) * 3 / 2;
}

// out = scale * A z + bias + add, for a whole tile. `bias` (d) and `add` (tile) may be null; `work`: work_size<NV>(d).
template <class T, int NV, Digits kDigits = Digits::kAll, bool kTransposed>
void product(const SplitMatrix<kTransposed>& m, const float* z, float* work, const float* bias, const float* add,
             float* out, int64_t d, float scale = 1) {
  constexpr int R = NV * 16, kAcross = NV > 1 ? 2 : 1;
  const int64_t depth = blocks_of(d, kTerms), down = depth * kBlock, next = NV * kBlock, b_plane = tile_plane<NV>(d);
  const int64_t a_plane = m.pieces ? SplitCopy<kTransposed>::plane(d) : 2 * down;
  uint16_t *pieces = reinterpret_cast<uint16_t*>(work), *made = pieces + 3 * b_plane;
  split_tile<NV, kDigits>(z, pieces, d);
  alignas(64) float sums[32 * 32];
  for (int64_t j0 = 0; j0 < d; j0 += 32) {
    const int64_t rows = d - j0 < 32 ? d - j0 : 32;
    if (m.pieces == nullptr) split_rows<kTransposed>(m.a, d, j0, j0 + rows, made, a_plane);
    const uint16_t* first = m.pieces ? m.pieces + j0 / 16 * down : made;
    for (int v0 = 0; v0 < NV; v0 += kAcross) {
      const uint16_t* second = pieces + v0 * kBlock;
      if (rows > 16)
        block_sums<2, kAcross, kDigits>(first, a_plane, down, second, b_plane, next, depth, sums);
      else
        block_sums<1, kAcross, kDigits>(first, a_plane, down, second, b_plane, next, depth, sums);
      for (int64_t j = 0; j < rows; ++j) {
        const Vec<float> s = splat(scale), b = splat(bias ? bias[j0 + j] : 0.0f);
        for (int v = 0; v < kAcross; ++v) {
          const int64_t at = (j0 + j) * R + (v0 + v) * 16;
          Vec<float> r = fma(load(sums + (j * kAcross + v) * 16), s, b);
          if (add) r += load(add + at);
          store(out + at, r);
        }
      }
    }
  }
}

// The rows of a batch as terms of a sum over them: of each what a tile holds of it, lanes without a row as zeros. The
// tiles are stored in any order; a tile of 16 rows fills half of a block.
template <int NV>
DEQFUSE_INLINE Vec<float> lanes_with_rows(const float* line, int v, const Vec<float> (&flag)[NV]) {
  return flag[v] > Vec<float>{} ? load(line + v * 16) : Vec<float>{};
}

// As first factor: block (i / 16, row / 32), one output row for each feature i.
template <int NV>
struct SplitCotangents {
  float* p;
  int64_t rows, d;

  static int64_t plane(int64_t rows, int64_t d) { return blocks_of(d, 16) * blocks_of(rows, kTerms) * kBlock; }
  static int64_t size(int64_t rows, int64_t d) { return plane(rows, d) * 3 / 2; }
  uint16_t* at(int64_t j0, int64_t r0) const {
    return reinterpret_cast<uint16_t*>(p) + (j0 / 16 * blocks_of(rows, kTerms) + r0 / kTerms) * kBlock;
  }

  void take(const float* tile, const LaneRows<NV * 16>& from) const {
    const int64_t first = from.row[0];
    const bool last = first % kTerms == 0 && first + 16 >= rows;  // nobody fills the other half
    Vec<float> flag[NV];
    taking<float, NV>(from, flag);
    for (int64_t i = 0; i < d; ++i) {
      const float* line = tile + i * NV * 16;
      for (int v = 0; v + 1 < NV && first + v * 16 < rows; v += 2)
        store_terms(split(lanes_with_rows<NV>(line, v, flag)), split(lanes_with_rows<NV>(line, v + 1, flag)),
                    at(i, first + v * 16) + i % 16 * kTerms, plane(rows, d));
      if (NV > 1) continue;
      uint16_t *to = at(i, first) + i % 16 * kTerms, halves[3 * kTerms];
      store_terms(split(lanes_with_rows<NV>(line, 0, flag)), split(Vec<float>{}), halves, kTerms);
      for (int q = 0; q < 3; ++q)
        if (last)
          std::memcpy(to + q * plane(rows, d), halves + q * kTerms, 64);
        else
          std::memcpy(to + q * plane(rows, d) + first % kTerms, halves + q * kTerms, 32);
    }
  }
};

// As second factor: block (row / 32, i / 16), one column for each feature i.
template <int NV>
struct SplitInputs {
  float* p;
  int64_t rows, d;

  static int64_t plane(int64_t rows, int64_t d) { return blocks_of(rows, kTerms) * blocks_of(d, 16) * kBlock; }
  static int64_t size(int64_t rows, int64_t d) { return plane(rows, d) * 3 / 2; }
  int64_t next() const { return blocks_of(d, 16) * kBlock; }
  uint16_t* at(int64_t r0, int64_t i0) const {
    return reinterpret_cast<uint16_t*>(p) + r0 / kTerms * next() + i0 / 16 * kBlock;
  }

  void take(const float* tile, const LaneRows<NV * 16>& from) const {
    Vec<float> flag[NV];
    taking<float, NV>(from, flag);
    const bool half = NV == 1 && from.row[0] + 16 >= rows && from.row[0] % kTerms == 0;  // the rest is nobody's
    for (int v = 0; v < (half ? 2 : NV) && (v < 2 || from.row[0] + v / 2 * 32 < rows); ++v) {
      const int64_t first = from.row[0] + 16 * v;
      for (int64_t i0 = 0; i0 < d; i0 += 16) {
        Vec<float> m[16];
        for (int q = 0; q < 16; ++q)
          m[q] = i0 + q < d && v < NV ? lanes_with_rows<NV>(tile + (i0 + q) * NV * 16, v, flag) : Vec<float>{};
        transpose<float>(m);
        uint16_t* to = at(first, i0) + first % kTerms / 2 * kTerms;
        for (int q = 0; q < 16; q += 2) store_pairs(split(m[q]), split(m[q + 1]), to + q / 2 * kTerms, plane(rows, d));
      }
    }
  }
};

// out = A^T B over all rows, columns [k0, k0 + 64) of the (d, d) result; added to it unless `fresh`.
template <int NV>
void outer_product(const SplitCotangents<NV>& a, const SplitInputs<NV>& b, int64_t k0, float* out, bool fresh) {
  const int64_t d = a.d, end = k0 + 64 < d ? k0 + 64 : d, down = blocks_of(a.rows, kTerms) * kBlock;
  const int64_t a_plane = a.plane(a.rows, d), b_plane = b.plane(b.rows, d), next = b.next();
  alignas(64) float sums[32 * 32];
  for (int64_t r0 = 0; r0 < a.rows || r0 == 0; r0 += kSummedRows) {
    const int64_t depth = blocks_of(a.rows - r0 < kSummedRows ? a.rows - r0 : kSummedRows, kTerms);
    for (int64_t j0 = 0; j0 < d; j0 += 32)
      for (int64_t k = k0; k < end; k += 32) {
        const bool tall = d - j0 > 16, broad = end - k > 16;
        const uint16_t *x = a.at(j0, r0), *y = b.at(r0, k);
        if (tall && broad)
          block_sums<2, 2>(x, a_plane, down, y, b_plane, next, depth, sums);
        else if (tall)
          block_sums<2, 1>(x, a_plane, down, y, b_plane, next, depth, sums);
        else if (broad)
          block_sums<1, 2>(x, a_plane, down, y, b_plane, next, depth, sums);
        else
          block_sums<1, 1>(x, a_plane, down, y, b_plane, next, depth, sums);
        const int64_t rows = d - j0 < 32 ? d - j0 : 32, columns = end - k < 32 ? end - k : 32;
        for (int64_t j = 0; j < rows; ++j) {
          const float* __restrict line = sums + j * (broad ? 32 : 16);
          float* __restrict to = out + (j0 + j) * d + k;
          if (fresh && r0 == 0)
            std::memcpy(to, line, sizeof(float) * columns);
          else
            for (int64_t c = 0; c < columns; ++c) to[c] += line[c];
        }
      }
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
