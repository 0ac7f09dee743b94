// The residual cell and the purify-then-combine step on tiles, in the form that RowSolver wants.
#pragma once

#include <cstring>

#include "products.h"
#include "rowmath.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T, class Matrix>
struct CellWeights {
  Matrix w1, w2;
  const T *b1, *b2, *g1, *c1, *g2, *c2, *g3, *c3;
  const T* at_zero;  // W2 relu(GN1(b1)) + b2: what every row's second product is at z = 0
  bool skip;
};

// CellWeights::at_zero, by the code of every other row: a tile of one vector, all its lanes alike. `memory`:
// 2 + work_tiles<1>(d) such tiles.
template <class T, class Matrix>
void cell_at_zero(const CellWeights<T, Matrix>& w, int64_t d, int64_t groups, T* memory, T* out) {
  constexpr int W = kLanes<T>;
  T *hidden = memory, *second = memory + d * W, *work = memory + 2 * d * W;
  for (int64_t i = 0; i < d; ++i) store(hidden + i * W, splat(w.b1[i]));
  group_norm<T, 1>(hidden, w.g1, w.c1, d, groups, {false, true});
  product<T, 1>(w.w2, hidden, work, w.b2, nullptr, second, d);
  for (int64_t i = 0; i < d; ++i) out[i] = second[i * W];
}

// z <- GN3(relu(GN2(W2 relu(GN1(W1 z + b1)) + b2 + x) [+ z]))
template <class T, int NV>
class CellMap {
 public:
  using Weights = CellWeights<T, typename StraightForm<T, NV>::Matrix>;
  static constexpr int W = kLanes<T>, R = NV * W;
  static constexpr bool kAnswerIsImage = true;
  static int64_t tiles(int64_t d) { return 3 + work_tiles<NV>(d); }

  CellMap(const Weights& w, const T* x, const T* z0, int64_t d, int64_t groups, T* memory)
      : w_(w), x_rows_(x), z0_(z0), d_(d), groups_(groups), x_(memory), hidden_(memory + d * R), next_x_(memory + 2 * d * R),
        work_(memory + 3 * d * R) {
    std::memset(memory, 0, sizeof(T) * 3 * d * R);
  }

  bool first_is_free() const { return z0_ == nullptr; }
  Vec<T> scale(int, Vec<T> norm) const { return residual_scale<VecLane<T>>(norm); }

  void stage(const LaneRows<R>& rows, T* start, bool in_place) {
    T* x = in_place ? x_ : next_x_;
    rows_to_lanes<T, NV>(x_rows_, rows, x, d_);
    if (z0_ != nullptr) return rows_to_lanes<T, NV>(z0_, rows, start, d_);
    // f(0): the first product is the bias, the second the same for all rows.
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        store(start + o, load(x + o) + splat(w_.at_zero[i]));
      }
    finish(start, nullptr);
  }

  void admit(const LaneMoves<T, NV>& moves) { move_lanes(moves, d_, next_x_, x_); }

  template <Digits kDigits>
  void evaluate(const T* z, T* f, bool waiting) {
    product<T, NV, kDigits>(w_.w1, z, work_, w_.b1, nullptr, hidden_, d_);
    group_norm<T, NV>(hidden_, w_.g1, w_.c1, d_, groups_, {false, true});
    product<T, NV, kDigits>(w_.w2, hidden_, work_, w_.b2, waiting ? next_x_ : x_, f, d_);
    finish(f, w_.skip ? z : nullptr);
  }

 private:
  // Both norms of a group while it is in the cache.
  void finish(T* y, const T* skip) {
    const int64_t width = d_ / groups_;
    for (int64_t at = 0; at < d_; at += width) {
      T* group = y + at * R;
      norm_group<T, NV>(group, w_.g2 + at, w_.c2 + at, skip ? skip + at * R : nullptr, width, {});
      norm_group<T, NV>(group, w_.g3 + at, w_.c3 + at, nullptr, width, {true, false});
    }
  }

  const Weights w_;
  const T *x_rows_, *z0_;
  const int64_t d_, groups_;
  T *x_, *hidden_, *next_x_, *work_;
};

// The fuse step's injection and what its gate sees of the cells, row by row: given, or made of the modalities' rows as
// they are needed, so that they never go through memory.
template <class T>
struct FuseRows {
  const T *x, *cell_sum;  // (rows, d), or null:
  int64_t modalities = 0, rows = 0;
  // x = sum_i weights_i x_i + bias, cell_sum = sum_i z_i
  const T* const* x_cells = nullptr;
  const T *z_cells = nullptr, *weights = nullptr, *bias = nullptr;

  // Into the lanes of a tile; `memory` holds a tile.
  template <int NV>
  void x_to_lanes(const LaneRows<NV * kLanes<T>>& lanes, int64_t d, T* tile, T* memory) const {
    if (x != nullptr) return rows_to_lanes<T, NV>(x, lanes, tile, d);
    made<NV>(lanes, d, tile, memory, [&](int64_t r, T* to) { make_x(r, d, to); });
  }
  template <int NV>
  void cell_sum_to_lanes(const LaneRows<NV * kLanes<T>>& lanes, int64_t d, T* tile, T* memory) const {
    if (cell_sum != nullptr) return rows_to_lanes<T, NV>(cell_sum, lanes, tile, d);
    made<NV>(lanes, d, tile, memory, [&](int64_t r, T* to) { make_cell_sum(r, d, to); });
  }

  // One row (d,): where it lies, or made in `memory`.
  const T* x_row(int64_t r, int64_t d, T* memory) const {
    if (x != nullptr) return x + r * d;
    make_x(r, d, memory);
    return memory;
  }
  const T* cell_sum_row(int64_t r, int64_t d, T* memory) const {
    if (cell_sum != nullptr) return cell_sum + r * d;
    make_cell_sum(r, d, memory);
    return memory;
  }

 private:
  void make_x(int64_t r, int64_t d, T* __restrict to) const {
    for (int64_t k = 0; k < d; ++k) to[k] = T(0);
    for (int64_t i = 0; i < modalities; ++i) {
      const T *from = x_cells[i] + r * d, w = weights[i];
      for (int64_t k = 0; k < d; ++k) to[k] += w * from[k];
    }
    const T offset = bias ? *bias : T(0);
    for (int64_t k = 0; k < d; ++k) to[k] += offset;
  }
  void make_cell_sum(int64_t r, int64_t d, T* __restrict to) const {
    for (int64_t k = 0; k < d; ++k) to[k] = T(0);
    for (int64_t i = 0; i < modalities; ++i) {
      const T* from = z_cells + (i * rows + r) * d;
      for (int64_t k = 0; k < d; ++k) to[k] += from[k];
    }
  }

  // make(row, to)
  template <int NV, class Make>
  static void made(const LaneRows<NV * kLanes<T>>& lanes, int64_t d, T* tile, T* memory, Make make) {
    LaneRows<NV * kLanes<T>> own;
    for (int l = 0; l < NV * kLanes<T>; ++l) {
      own.row[l] = lanes.row[l] >= 0 ? l : -1;
      if (own.row[l] >= 0) make(lanes.row[l], memory + l * d);
    }
    rows_to_lanes<T, NV>(memory, own, tile, d);
  }
};

template <class T, class Matrix>
struct FuseWeights {
  Matrix gate, fuse;
  const T *gate_bias, *fuse_bias, *gamma, *beta;
  T modalities;
  bool relu_last;
};

// z <- GN(relu(mask * (W_f (z * (N W_a z + c)) + b_f) + x)),   c = W_a S + N b_a;   or relu(GN(.))
template <class T, int NV>
class FuseMap {
 public:
  using Weights = FuseWeights<T, typename StraightForm<T, NV>::Matrix>;
  static constexpr int W = kLanes<T>, R = NV * W;
  static constexpr bool kAnswerIsImage = true;
  static int64_t tiles(int64_t d) { return 8 + work_tiles<NV>(d); }

  // `mask` (null without dropout), `z0` (null for zero): row-major (rows, d).
  FuseMap(const Weights& w, const FuseRows<T>& from, const T* mask, const T* z0, int64_t d, int64_t groups,
          T* memory)
      : w_(w), from_(from), mask_rows_(mask), z0_(z0), d_(d), groups_(groups) {
    std::memset(memory, 0, sizeof(T) * 8 * d * R);
    T** slots[] = {&x_, &constant_, &mask_, &gated_, &bias_, &next_x_, &next_constant_, &next_mask_, &work_};
    for (T** slot : slots) {
      *slot = memory;
      memory += d * R;
    }
    for (int64_t i = 0; i < d; ++i) bias_[i] = w.modalities * w.gate_bias[i];
  }

  bool first_is_free() const { return z0_ == nullptr; }
  Vec<T> scale(int, Vec<T> norm) const { return residual_scale<VecLane<T>>(norm); }

  void stage(const LaneRows<R>& rows, T* start, bool in_place) {
    T *x = in_place ? x_ : next_x_, *constant = in_place ? constant_ : next_constant_;
    T* mask = in_place ? mask_ : next_mask_;
    from_.template x_to_lanes<NV>(rows, d_, x, gated_);
    if (mask_rows_) rows_to_lanes<T, NV>(mask_rows_, rows, mask, d_);
    from_.template cell_sum_to_lanes<NV>(rows, d_, start, gated_);
    product<T, NV>(w_.gate, start, work_, bias_, nullptr, constant, d_);
    if (z0_ != nullptr) return rows_to_lanes<T, NV>(z0_, rows, start, d_);
    // f(0): the gated product vanishes, unless the gate is NaN or infinite, which must show.
    for (int v = 0; v < NV; ++v) {
      Vec<T> poison{};
      for (int64_t i = 0; i < d_; ++i) poison += load(constant + i * R + v * W) * splat(T(0));
      for (int64_t i = 0; i < d_; ++i) store(start + i * R + v * W, splat(w_.fuse_bias[i]) + poison);
    }
    finish(start, x, mask);
  }

  void admit(const LaneMoves<T, NV>& moves) {
    move_lanes(moves, d_, next_x_, x_);
    move_lanes(moves, d_, next_constant_, constant_);
    if (mask_rows_) move_lanes(moves, d_, next_mask_, mask_);
  }

  template <Digits kDigits>
  void evaluate(const T* z, T* f, bool waiting) {
    const T* constant = waiting ? next_constant_ : constant_;
    product<T, NV, kDigits>(w_.gate, z, work_, nullptr, constant, gated_, d_, w_.modalities);
    for (int64_t o = 0; o < d_ * R; o += W) store(gated_ + o, load(gated_ + o) * load(z + o));
    product<T, NV, kDigits>(w_.fuse, gated_, work_, w_.fuse_bias, nullptr, f, d_);
    finish(f, waiting ? next_x_ : x_, waiting ? next_mask_ : mask_);
  }

 private:
  void finish(T* y, const T* x, const T* mask) {
    for (int64_t o = 0; o < d_ * R; o += W) {
      Vec<T> a = load(y + o);
      if (mask_rows_) a *= load(mask + o);
      store(y + o, a + load(x + o));
    }
    group_norm<T, NV>(y, w_.gamma, w_.beta, d_, groups_, {!w_.relu_last, w_.relu_last});
  }

  const Weights w_;
  const FuseRows<T> from_;
  const T *mask_rows_, *z0_;
  const int64_t d_, groups_;
  T *x_, *constant_, *mask_, *gated_, *bias_, *next_x_, *next_constant_, *next_mask_, *work_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
