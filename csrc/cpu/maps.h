// The residual cell and the purify-then-combine step on tiles, in the form that RowSolver wants.
#pragma once

#include <cmath>
#include <cstring>

#include "gemm.h"
#include "rowmath.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Move rows of a row-major (rows, d) matrix into the lanes of a tile, and back. Lanes beyond `count`
// are filled with zeros: they are computed along and never read.
template <class T, int NV>
void rows_to_tile(const T* rows, T* tile, int count, int64_t d) {
  constexpr int R = NV * kLanes<T>;
  for (int64_t i0 = 0; i0 < d; i0 += 16) {
    const int64_t end = i0 + 16 < d ? i0 + 16 : d;
    for (int l = 0; l < R; ++l)
      for (int64_t i = i0; i < end; ++i) tile[i * R + l] = l < count ? rows[l * d + i] : T(0);
  }
}
template <class T, int NV>
void tile_to_rows(const T* tile, T* rows, int count, int64_t d) {
  constexpr int R = NV * kLanes<T>;
  for (int64_t i0 = 0; i0 < d; i0 += 16) {
    const int64_t end = i0 + 16 < d ? i0 + 16 : d;
    for (int l = 0; l < count; ++l)
      for (int64_t i = i0; i < end; ++i) rows[l * d + i] = tile[i * R + l];
  }
}

template <class T, int NV>
DEQFUSE_INLINE void copy_lane(const T* from, int from_lane, T* to, int lane, int64_t d) {
  constexpr int R = NV * kLanes<T>;
  for (int64_t i = 0; i < d; ++i) to[i * R + lane] = from[i * R + from_lane];
}

template <class T>
struct CellWeights {
  const T *w1, *w2;  // packed
  const T *b1, *b2, *g1, *c1, *g2, *c2, *g3, *c3;
  const T* at_zero;  // W2 relu(GN1(b1)) + b2: what every row's second product is at z = 0
  bool skip;
};

// A v + bias for one vector, from the packed matrix, rounded like `product`.
template <class T>
void product_vector(const T* packed, int jr, const T* v, const T* bias, T* out, int64_t d) {
  for (int64_t j0 = 0; j0 < d; j0 += jr) {
    T acc[32] = {};
    for (int64_t k = 0; k < d; ++k)
      for (int j = 0; j < jr; ++j) acc[j] = std::fma(packed[j0 * d + k * jr + j], v[k], acc[j]);
    for (int64_t j = j0; j < d && j < j0 + jr; ++j) out[j] = acc[j - j0] + bias[j];
  }
}

// CellWeights::at_zero. `hidden` is scratch of d values.
template <class T>
void cell_at_zero(const CellWeights<T>& w, int jr, int64_t d, int64_t groups, T* hidden, T* out) {
  const int64_t width = d / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const T* y = w.b1 + g * width;
    T mean = 0, square = 0;
    for (int64_t k = 0; k < width; ++k) mean += y[k];
    mean /= T(width);
    for (int64_t k = 0; k < width; ++k) square += (y[k] - mean) * (y[k] - mean);
    const T rstd = T(1) / std::sqrt(square / T(width) + kGroupNormEps<T>);
    for (int64_t k = g * width; k < (g + 1) * width; ++k) {
      const T a = (w.b1[k] - mean) * rstd * w.g1[k] + w.c1[k];
      hidden[k] = a < 0 ? T(0) : a;
    }
  }
  product_vector(w.w2, jr, hidden, w.b2, out, d);
}

// z <- GN3(relu(GN2(W2 relu(GN1(W1 z + b1)) + b2 + x) [+ z]))
template <class T, int NV>
class CellMap {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;
  static constexpr bool kAnswerIsImage = true;
  static int64_t tiles() { return 4; }

  CellMap(const CellWeights<T>& w, const T* x, const T* z0, int64_t d, int64_t groups, T* memory)
      : w_(w), x_rows_(x), z0_(z0), d_(d), groups_(groups) {
    x_ = memory;
    hidden_ = x_ + d * R;
    deck_x_ = hidden_ + d * R;
    start_ = deck_x_ + d * R;
  }

  bool first_is_free() const { return z0_ == nullptr; }
  const T* deck_start() const { return start_; }
  T scale(int, T norm) const { return norm + T(1e-5); }

  void stage(int64_t row, int count) {
    rows_to_tile<T, NV>(x_rows_ + row * d_, deck_x_, count, d_);
    if (z0_ != nullptr) {
      rows_to_tile<T, NV>(z0_ + row * d_, start_, count, d_);
      return;
    }
    // f(0): the first product is the bias, the second the same for all rows.
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        store(start_ + o, load(deck_x_ + o) + splat(w_.at_zero[i]));
      }
    finish(start_, nullptr);
  }
  void take(int lane, int from) { copy_lane<T, NV>(deck_x_, from, x_, lane, d_); }

  void operator()(const T* z, T* f) {
    product<T, NV>(w_.w1, z, w_.b1, nullptr, hidden_, d_);
    group_norm<T, NV>(hidden_, w_.g1, w_.c1, nullptr, d_, groups_, {false, true});
    product<T, NV>(w_.w2, hidden_, w_.b2, x_, f, d_);
    finish(f, w_.skip ? z : nullptr);
  }

 private:
  void finish(T* y, const T* skip) {
    group_norm<T, NV>(y, w_.g2, w_.c2, skip, d_, groups_, {});
    group_norm<T, NV>(y, w_.g3, w_.c3, nullptr, d_, groups_, {true, false});
  }

  const CellWeights<T> w_;
  const T *x_rows_, *z0_;
  const int64_t d_, groups_;
  T *x_, *hidden_, *deck_x_, *start_;
};

template <class T>
struct FuseWeights {
  const T *gate, *fuse;  // packed
  const T *gate_bias, *fuse_bias, *gamma, *beta;
  T modalities;
  bool relu_last;
};

// z <- GN(relu(mask * (W_f (z * (N W_a z + c)) + b_f) + x)),   c = W_a S + N b_a;   or relu(GN(.))
template <class T, int NV>
class FuseMap {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;
  static constexpr bool kAnswerIsImage = true;
  static int64_t tiles() { return 9; }

  // `x`, `cell_sum`, `mask` (null without dropout), `z0` (null for zero): row-major (rows, d).
  FuseMap(const FuseWeights<T>& w, const T* x, const T* cell_sum, const T* mask, const T* z0, int64_t d,
          int64_t groups, T* memory)
      : w_(w), x_rows_(x), sum_rows_(cell_sum), mask_rows_(mask), z0_(z0), d_(d), groups_(groups) {
    T** slots[] = {&x_, &constant_, &mask_, &gated_, &deck_x_, &deck_constant_, &deck_mask_, &start_, &bias_};
    for (T** slot : slots) {
      *slot = memory;
      memory += d * R;
    }
    for (int64_t i = 0; i < d; ++i) bias_[i] = w.modalities * w.gate_bias[i];
  }

  bool first_is_free() const { return z0_ == nullptr; }
  const T* deck_start() const { return start_; }
  T scale(int, T norm) const { return norm + T(1e-5); }

  void stage(int64_t row, int count) {
    rows_to_tile<T, NV>(x_rows_ + row * d_, deck_x_, count, d_);
    if (mask_rows_) rows_to_tile<T, NV>(mask_rows_ + row * d_, deck_mask_, count, d_);
    rows_to_tile<T, NV>(sum_rows_ + row * d_, start_, count, d_);
    product<T, NV>(w_.gate, start_, bias_, nullptr, deck_constant_, d_);
    if (z0_ != nullptr) {
      rows_to_tile<T, NV>(z0_ + row * d_, start_, count, d_);
      return;
    }
    // f(0): the gated product vanishes, unless the gate is NaN or infinite, which must show.
    for (int v = 0; v < NV; ++v) {
      Vec<T> poison{};
      for (int64_t i = 0; i < d_; ++i) poison += load(deck_constant_ + i * R + v * W) * splat(T(0));
      for (int64_t i = 0; i < d_; ++i) store(start_ + i * R + v * W, splat(w_.fuse_bias[i]) + poison);
    }
    finish(start_, deck_x_, deck_mask_);
  }
  void take(int lane, int from) {
    copy_lane<T, NV>(deck_x_, from, x_, lane, d_);
    copy_lane<T, NV>(deck_constant_, from, constant_, lane, d_);
    if (mask_rows_) copy_lane<T, NV>(deck_mask_, from, mask_, lane, d_);
  }

  void operator()(const T* z, T* f) {
    product<T, NV>(w_.gate, z, nullptr, constant_, gated_, d_, w_.modalities);
    for (int64_t o = 0; o < d_ * R; o += W) store(gated_ + o, load(gated_ + o) * load(z + o));
    product<T, NV>(w_.fuse, gated_, w_.fuse_bias, nullptr, f, d_);
    finish(f, x_, mask_);
  }

 private:
  void finish(T* y, const T* x, const T* mask) {
    for (int64_t o = 0; o < d_ * R; o += W) {
      Vec<T> a = load(y + o);
      if (mask_rows_) a *= load(mask + o);
      store(y + o, a + load(x + o));
    }
    group_norm<T, NV>(y, w_.gamma, w_.beta, nullptr, d_, groups_, {!w_.relu_last, w_.relu_last});
  }

  const FuseWeights<T> w_;
  const T *x_rows_, *sum_rows_, *mask_rows_, *z0_;
  const int64_t d_, groups_;
  T *x_, *constant_, *mask_, *gated_, *deck_x_, *deck_constant_, *deck_mask_, *start_, *bias_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
