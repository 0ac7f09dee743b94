// The residual cell and the purify-then-combine step on tiles, in the form that RowSolver wants.
#pragma once

#include <cstring>

#include "row_lanes.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T, class Matrix>
struct CellWeights {
  Matrix w1, w2;
  const T *b1, *b2, *g1, *c1, *g2, *c2, *g3, *c3;
  const T* at_zero;  // W2 relu(GN1(b1)) + b2: what every row's second product is at z = 0
  bool skip;
};

// CellWeights::at_zero, by the code of every other row: one, in the first lane. `memory`: 2 + work_tiles<1>(d) tiles.
template <class T, class Lanes>
void cell_at_zero(const CellWeights<T, typename Lanes::Matrix>& w, const Lanes& lanes, int64_t groups, T* memory,
                  T* out) {
  const int64_t n = lanes.size();
  T *hidden = memory, *second = memory + n, *work = memory + 2 * n;
  lanes.each([&](int64_t o, auto of, auto) { store(hidden + o, of(w.b1)); });
  lanes.normalise(hidden, groups, Norm<T>{w.g1, w.c1, nullptr, {false, true}});
  lanes.multiply(w.w2, hidden, work, w.b2, nullptr, second);
  lanes.give(second, nullptr, lane_rows<Lanes::R>(0, 1), out);
}

// z <- GN3(relu(GN2(W2 relu(GN1(W1 z + b1)) + b2 + x) [+ z]))
template <class T, int NV, class Lanes = RowsAsLanes<T, NV>>
class CellMap {
 public:
  using Weights = CellWeights<T, typename Lanes::Matrix>;
  static constexpr int R = Lanes::R;
  static constexpr bool kAnswerIsImage = true;
  static int64_t tiles(int64_t d) { return 3 + work_tiles<NV>(d); }

  CellMap(const Weights& w, const T* x, const T* z0, const Lanes& lanes, int64_t groups, T* memory)
      : w_(w), x_rows_(x), z0_(z0), lanes_(lanes), groups_(groups), x_(memory), hidden_(memory + lanes.size()),
        next_x_(memory + 2 * lanes.size()), work_(memory + 3 * lanes.size()) {
    std::memset(memory, 0, sizeof(T) * 3 * lanes.size());
  }

  bool first_is_free() const { return z0_ == nullptr; }
  Vec<T> scale(int, Vec<T> norm) const { return residual_scale<VecLane<T>>(norm); }

  void stage(const LaneRows<R>& rows, T* start, bool in_place) {
    T* x = in_place ? x_ : next_x_;
    lanes_.take(x_rows_, rows, x);
    if (z0_ != nullptr) return lanes_.take(z0_, rows, start);
    // f(0): the first product is the bias, the second the same for all rows.
    lanes_.each([&](int64_t o, auto of, auto) { store(start + o, load(x + o) + of(w_.at_zero)); });
    finish(start, nullptr);
  }

  void admit(const LaneMoves<T, NV>& moves) { lanes_.move(moves, next_x_, x_); }

  template <Digits kDigits>
  void evaluate(const T* z, T* f, bool waiting) {
    lanes_.template multiply<kDigits>(w_.w1, z, work_, w_.b1, nullptr, hidden_);
    lanes_.normalise(hidden_, groups_, Norm<T>{w_.g1, w_.c1, nullptr, {false, true}});
    lanes_.template multiply<kDigits>(w_.w2, hidden_, work_, w_.b2, waiting ? next_x_ : x_, f);
    finish(f, w_.skip ? z : nullptr);
  }

 private:
  void finish(T* y, const T* skip) {
    lanes_.normalise(y, groups_, Norm<T>{w_.g2, w_.c2, skip, {}}, Norm<T>{w_.g3, w_.c3, nullptr, {true, false}});
  }

  const Weights w_;
  const T *x_rows_, *z0_;
  const Lanes lanes_;
  const int64_t groups_;
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
  const bool* present = nullptr;  // (modalities, rows), or null: the others' rows are not read

  // Modalities of a row.
  int64_t count(int64_t r) const {
    if (present == nullptr) return modalities;
    int64_t sum = 0;
    for (int64_t i = 0; i < modalities; ++i) sum += present[i * rows + r];
    return sum;
  }

  // Into a tile; `memory` holds another.
  template <class Lanes>
  void take_x(const Lanes& lanes, const LaneRows<Lanes::R>& rows, T* tile, T* memory) const {
    if (x != nullptr) return lanes.take(x, rows, tile);
    lanes.make(rows, tile, memory, [&](int64_t r, T* to) { make_x(r, lanes.d, to); });
  }
  template <class Lanes>
  void take_cell_sum(const Lanes& lanes, const LaneRows<Lanes::R>& rows, T* tile, T* memory) const {
    if (cell_sum != nullptr) return lanes.take(cell_sum, rows, tile);
    lanes.make(rows, tile, memory, [&](int64_t r, T* to) { make_cell_sum(r, lanes.d, to); });
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
      if (present && !present[i * rows + r]) continue;
      const T *from = x_cells[i] + r * d, w = weights[i];
      for (int64_t k = 0; k < d; ++k) to[k] += w * from[k];
    }
    const T offset = bias ? *bias : T(0);
    for (int64_t k = 0; k < d; ++k) to[k] += offset;
  }
  void make_cell_sum(int64_t r, int64_t d, T* __restrict to) const {
    for (int64_t k = 0; k < d; ++k) to[k] = T(0);
    for (int64_t i = 0; i < modalities; ++i) {
      if (present && !present[i * rows + r]) continue;
      const T* from = z_cells + (i * rows + r) * d;
      for (int64_t k = 0; k < d; ++k) to[k] += from[k];
    }
  }
};

template <class T, class Matrix>
struct FuseWeights {
  Matrix gate, fuse;
  const T *gate_bias, *fuse_bias, *gamma, *beta;
  bool relu_last;
};

// z <- GN(relu(mask * (W_f (z * (N W_a z + c)) + b_f) + x)),   c = W_a S + N b_a;   or relu(GN(.))
template <class T, int NV, class Lanes = RowsAsLanes<T, NV>>
class FuseMap {
 public:
  using Weights = FuseWeights<T, typename Lanes::Matrix>;
  static constexpr int W = kLanes<T>, R = Lanes::R;
  static constexpr bool kAnswerIsImage = true;
  static int64_t tiles(int64_t d) { return 8 + work_tiles<NV>(d); }

  // `modalities`: of each of the rows. `mask` (null without dropout), `z0` (null for zero): row-major (rows, d).
  FuseMap(const Weights& w, T modalities, const FuseRows<T>& from, const T* mask, const T* z0, const Lanes& lanes,
          int64_t groups, T* memory)
      : w_(w), modalities_(modalities), from_(from), mask_rows_(mask), z0_(z0), lanes_(lanes), groups_(groups) {
    std::memset(memory, 0, sizeof(T) * 8 * lanes.size());
    T** slots[] = {&x_, &constant_, &mask_, &gated_, &bias_, &next_x_, &next_constant_, &next_mask_, &work_};
    for (T** slot : slots) {
      *slot = memory;
      memory += lanes.size();
    }
    for (int64_t i = 0; i < lanes.d; ++i) bias_[i] = modalities * w.gate_bias[i];
  }

  bool first_is_free() const { return z0_ == nullptr; }
  Vec<T> scale(int, Vec<T> norm) const { return residual_scale<VecLane<T>>(norm); }

  void stage(const LaneRows<R>& rows, T* start, bool in_place) {
    T *x = in_place ? x_ : next_x_, *constant = in_place ? constant_ : next_constant_;
    T* mask = in_place ? mask_ : next_mask_;
    from_.take_x(lanes_, rows, x, gated_);
    if (mask_rows_) lanes_.take(mask_rows_, rows, mask);
    from_.take_cell_sum(lanes_, rows, start, gated_);
    lanes_.multiply(w_.gate, start, work_, bias_, nullptr, constant);
    if (z0_ != nullptr) return lanes_.take(z0_, rows, start);
    // f(0): the gated product vanishes, unless the gate is NaN or infinite, which must show.
    Vec<T> poison[NV] = {};
    lanes_.poison(constant, poison);
    lanes_.each([&](int64_t o, auto of, auto lane) { store(start + o, of(w_.fuse_bias) + lane(poison)); });
    finish(start, x, mask);
  }

  void admit(const LaneMoves<T, NV>& moves) {
    lanes_.move(moves, next_x_, x_);
    lanes_.move(moves, next_constant_, constant_);
    if (mask_rows_) lanes_.move(moves, next_mask_, mask_);
  }

  template <Digits kDigits>
  void evaluate(const T* z, T* f, bool waiting) {
    const T* constant = waiting ? next_constant_ : constant_;
    lanes_.template multiply<kDigits>(w_.gate, z, work_, nullptr, constant, gated_, modalities_);
    for (int64_t o = 0; o < lanes_.size(); o += W) store(gated_ + o, load(gated_ + o) * load(z + o));
    lanes_.template multiply<kDigits>(w_.fuse, gated_, work_, w_.fuse_bias, nullptr, f);
    finish(f, waiting ? next_x_ : x_, waiting ? next_mask_ : mask_);
  }

 private:
  void finish(T* y, const T* x, const T* mask) {
    for (int64_t o = 0; o < lanes_.size(); o += W) {
      Vec<T> a = load(y + o);
      if (mask_rows_) a *= load(mask + o);
      store(y + o, a + load(x + o));
    }
    lanes_.normalise(y, groups_, Norm<T>{w_.gamma, w_.beta, nullptr, {!w_.relu_last, w_.relu_last}});
  }

  const Weights w_;
  const T modalities_;
  const FuseRows<T> from_;
  const T *mask_rows_, *z0_;
  const Lanes lanes_;
  const int64_t groups_;
  T *x_, *constant_, *mask_, *gated_, *bias_, *next_x_, *next_constant_, *next_mask_, *work_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
