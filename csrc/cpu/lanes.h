// Rows of row-major matrices into the lanes of a tile, and back: square blocks are transposed in registers.
#pragma once

#include <cstring>
#include <utility>

#include "vec.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Swaps the off-diagonal blocks of size H of two vectors: one step of a transposition.
template <class T, int H, int... L>
DEQFUSE_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int W = kLanes<T>;
  const Vec<T> x = a, y = b;
#if defined(__clang__)
  a = __builtin_shufflevector(x, y, (L & H ? W + L - H : L)...);
  b = __builtin_shufflevector(x, y, (L & H ? W + L : L + H)...);
#else
  a = __builtin_shuffle(x, y, Mask<T>{(L & H ? W + L - H : L)...});
  b = __builtin_shuffle(x, y, Mask<T>{(L & H ? W + L : L + H)...});
#endif
}

// Of kCount vectors, as rows, the square blocks of 2 H columns, each in its place.
template <class T, int H, int kCount = 2 * H>
DEQFUSE_INLINE void transpose_parts(Vec<T>* m) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i)
    if ((i & H) == 0) swap_blocks<T, H>(m[i], m[i + H], std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (H > 1) transpose_parts<T, H / 2, kCount>(m);
}
template <class T>
DEQFUSE_INLINE void transpose(Vec<T> (&m)[kLanes<T>]) {
  transpose_parts<T, kLanes<T> / 2>(m);
}

// W columns of W rows, from k on. With AVX-512 a vector is put together of 16 bytes from each of four rows as it is
// loaded, which leaves half of the shuffles of a transposition.
template <class T>
DEQFUSE_INLINE void load_columns(const T* const (&row)[kLanes<T>], int64_t k, Vec<T> (&m)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#if DEQFUSE_VECTOR_BYTES == 64
  constexpr int Q = W / 4;
#pragma GCC unroll 4
  for (int c = 0; c < W; c += Q) {
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i)
      m[c + i] = load_quarters(row[i] + k + c, row[i + Q] + k + c, row[i + 2 * Q] + k + c, row[i + 3 * Q] + k + c);
    transpose_parts<T, Q / 2>(&m[c]);
  }
#else
  for (int q = 0; q < W; ++q) m[q] = load_unaligned(row[q] + k);
  transpose<T>(m);
#endif
}

// Which row belongs to each of R lanes; -1: none.
template <int R>
struct LaneRows {
  int64_t row[R];

  int count() const {
    int n = 0;
    for (int64_t r : row) n += r >= 0;
    return n;
  }
};

// Rows first, first + 1, ... in the first `count` lanes.
template <int R>
LaneRows<R> lane_rows(int64_t first, int count) {
  LaneRows<R> rows;
  for (int l = 0; l < R; ++l) rows.row[l] = l < count ? first + l : -1;
  return rows;
}

// One where a lane has a row, else zero.
template <class T, int NV>
DEQFUSE_INLINE void taking(const LaneRows<NV * kLanes<T>>& rows, Vec<T> (&flag)[NV]) {
  alignas(64) T lane[NV * kLanes<T>];
  for (int l = 0; l < NV * kLanes<T>; ++l) lane[l] = rows.row[l] >= 0 ? T(1) : T(0);
  for (int v = 0; v < NV; ++v) flag[v] = load(lane + v * kLanes<T>);
}

// Which lanes of one tile go into which lanes of another.
template <class T, int NV>
struct LaneMoves {
  static constexpr int W = kLanes<T>;
  int count = 0, from[NV * W], to[NV * W];
  bool whole_tile = false;  // every lane into its namesake, and the others hold nothing
  Mask<T> source[NV] = {};
  Vec<T> flag[NV] = {};  // of lanes that receive

  void add(int a, int b) {
    from[count] = a;
    to[count++] = b;
    source[b / W][b % W] = a;
    flag[b / W][b % W] = T(1);
  }
};

// Into one tile or several.
template <class T, int NV, class... Tile>
void move_lanes(const LaneMoves<T, NV>& moves, int64_t d, const T* from, Tile*... to) {
  constexpr int W = kLanes<T>, R = NV * W;
  if (moves.whole_tile) {
    (std::memcpy(to, from, sizeof(T) * d * R), ...);
    return;
  }
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (kBytes >= 32 && NV <= 2) {  // shuffles by variable are instructions
    const Vec<T> zero{};
    for (int64_t o = 0; o < d * R; o += R) {
      const Vec<T> a = load(from + o), b = load(from + o + R - W);
      for (int v = 0; v < NV; ++v) {
        const Vec<T> moved = __builtin_shuffle(a, b, moves.source[v]);
        (store(to + o + v * W, moves.flag[v] > zero ? moved : load(to + o + v * W)), ...);
      }
    }
    return;
  }
#endif
  for (int64_t o = 0; o < d * R; o += R)
    for (int k = 0; k < moves.count; ++k) ((to[o + moves.to[k]] = from[o + moves.from[k]]), ...);
}

// Lanes that have a row get its values, the others keep what they hold.
template <class T, int NV>
void rows_to_lanes(const T* matrix, const LaneRows<NV * kLanes<T>>& rows, T* tile, int64_t d) {
  constexpr int W = kLanes<T>, R = NV * W;
  const int64_t blocks = d / W * W;
  Vec<T> flag[NV];
  taking<T, NV>(rows, flag);
  for (int v = 0; v < NV; ++v) {
    const int64_t* row = rows.row + v * W;
    int64_t any = -1;
    for (int q = 0; q < W; ++q) any = row[q] >= 0 ? row[q] : any;
    if (any < 0) continue;
    const T* from[W];
    for (int q = 0; q < W; ++q) from[q] = matrix + (row[q] >= 0 ? row[q] : any) * d;
    for (int64_t i = 0; i < blocks; i += W) {
      Vec<T> m[W];
      for (int q = 0; q < W; ++q) m[q] = load_unaligned(from[q] + i);
      transpose<T>(m);
      for (int q = 0; q < W; ++q) {
        T* to = tile + (i + q) * R + v * W;
        store(to, flag[v] > Vec<T>{} ? m[q] : load(to));
      }
    }
    for (int q = 0; q < W; ++q)
      if (row[q] >= 0)
        for (int64_t i = blocks; i < d; ++i) tile[i * R + v * W + q] = from[q][i];
  }
}

// write(lane, i, values, count): `count` features from i on of every lane that has a row; tile - minus where that is
// given.
template <class T, int NV, class Write>
DEQFUSE_INLINE void for_rows_of_lanes(const T* tile, const T* minus, const LaneRows<NV * kLanes<T>>& rows, int64_t d,
                                      Write write) {
  constexpr int W = kLanes<T>, R = NV * W;
  for (int v = 0; v < NV; ++v) {
    const int64_t* row = rows.row + v * W;
    bool any = false;
    for (int q = 0; q < W; ++q) any |= row[q] >= 0;
    if (!any) continue;
    for (int64_t i = 0; i < d; i += W) {
      const int count = d - i < W ? int(d - i) : W;
      Vec<T> m[W] = {};
      for (int q = 0; q < count; ++q) {
        const int64_t o = (i + q) * R + v * W;
        m[q] = minus ? load(tile + o) - load(minus + o) : load(tile + o);
      }
      transpose<T>(m);
      for (int q = 0; q < W; ++q)
        if (row[q] >= 0) write(v * W + q, i, reinterpret_cast<const T*>(&m[q]), count);
    }
  }
}

// The values of lanes that have a row into that row.
template <class T, int NV>
void lanes_to_rows(const T* tile, const T* minus, const LaneRows<NV * kLanes<T>>& rows, T* matrix, int64_t d) {
  for_rows_of_lanes<T, NV>(tile, minus, rows, d, [&](int l, int64_t i, const T* values, int count) {
    T* to = matrix + rows.row[l] * d + i;
    if (count == kLanes<T>) std::memcpy(to, values, sizeof(Vec<T>));
    else std::memcpy(to, values, sizeof(T) * count);
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
