// Rows of row-major matrices into the lanes of a tile, and back.
#pragma once

#include "vec.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Which row each of R lanes takes next; -1: the lane keeps what it holds.
template <int R>
struct LaneRows {
  int64_t row[R];
};

// The first `count` lanes take rows first, first + 1, ...
template <int R>
LaneRows<R> lane_rows(int64_t first, int count) {
  LaneRows<R> rows;
  for (int l = 0; l < R; ++l) rows.row[l] = l < count ? first + l : -1;
  return rows;
}

// Lanes that take a row get its values, in steps that keep both sides in the first-level cache.
template <class T, int NV>
void rows_to_lanes(const T* matrix, const LaneRows<NV * kLanes<T>>& rows, T* tile, int64_t d) {
  constexpr int R = NV * kLanes<T>;
  for (int64_t i0 = 0; i0 < d; i0 += 16) {
    const int64_t end = i0 + 16 < d ? i0 + 16 : d;
    for (int l = 0; l < R; ++l) {
      if (rows.row[l] < 0) continue;
      const T* from = matrix + rows.row[l] * d;
      for (int64_t i = i0; i < end; ++i) tile[i * R + l] = from[i];
    }
  }
}

// The lanes of a whole tile into rows first .. first + count - 1.
template <class T, int NV>
void lanes_to_rows(const T* tile, T* matrix, int64_t first, int count, int64_t d) {
  constexpr int R = NV * kLanes<T>;
  for (int64_t i0 = 0; i0 < d; i0 += 16) {
    const int64_t end = i0 + 16 < d ? i0 + 16 : d;
    for (int l = 0; l < count; ++l)
      for (int64_t i = i0; i < end; ++i) matrix[(first + l) * d + i] = tile[i * R + l];
  }
}

// One where a lane takes a row, else zero.
template <class T, int NV>
DEQFUSE_INLINE void taking(const LaneRows<NV * kLanes<T>>& rows, Vec<T> (&flag)[NV]) {
  alignas(64) T lane[NV * kLanes<T>];
  for (int l = 0; l < NV * kLanes<T>; ++l) lane[l] = rows.row[l] >= 0 ? T(1) : T(0);
  for (int v = 0; v < NV; ++v) flag[v] = load(lane + v * kLanes<T>);
}

// Lanes that take a row get `from`.
template <class T, int NV>
void blend(const LaneRows<NV * kLanes<T>>& rows, const T* from, T* tile, int64_t d) {
  constexpr int W = kLanes<T>, R = NV * W;
  Vec<T> flag[NV];
  taking<T, NV>(rows, flag);
  for (int64_t i = 0; i < d; ++i)
    for (int v = 0; v < NV; ++v) {
      const int64_t o = i * R + v * W;
      store(tile + o, flag[v] > Vec<T>{} ? load(from + o) : load(tile + o));
    }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
