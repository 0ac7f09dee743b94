// The two maps linearised at their equilibria, in the form that RowSolver wants: u <- J^T u + g.
//
// A tile of rows is linearised once and stays in place until all its rows are solved; its starts are
// free, since J^T 0 + g = g.
#pragma once

#include "maps.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// What both adjoint maps share: the right-hand sides, their norms, and RowSolver's deck, which here is the
// tile itself (a run never has more rows than lanes).
template <class T, int NV>
class AdjointBase {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;
  static constexpr bool kAnswerIsImage = false;

  bool first_is_free() const { return true; }
  const T* deck_start() const { return g_; }
  void take(int, int) {}
  T scale(int lane, T) const { return scale_[lane]; }

 protected:
  // Solved for g / max|g|, row by row, so that squares neither vanish nor overflow.
  void load_rhs(const T* g, int count, int64_t d) {
    rows_to_tile<T, NV>(g, g_, count, d);
    const Vec<T> zero{}, one = splat(T(1));
    for (int v = 0; v < NV; ++v) {
      Vec<T> largest{}, sum{};
      for (int64_t i = 0; i < d; ++i) {
        const Vec<T> a = load(g_ + i * R + v * W);
        largest = maximum(largest, a < zero ? -a : a);
      }
      largest = largest == zero ? one : largest;  // u = 0 solves such a row
      store(magnitude_ + v * W, largest);
      for (int64_t i = 0; i < d; ++i) {
        const int64_t o = i * R + v * W;
        const Vec<T> a = load(g_ + o) / largest;
        store(g_ + o, a);
        sum = fma(a, a, sum);
      }
      sum = square_root<T>(sum);
      store(scale_ + v * W, sum == zero ? one : sum);
    }
  }
  // The solutions of this tile's rows, for the cotangents as they came.
  void load_solution(const T* u_rows, int count, int64_t d, T* u) const {
    rows_to_tile<T, NV>(u_rows, u, count, d);
    for (int64_t o = 0; o < d * R; o += W) store(u + o, load(u + o) * load(magnitude_ + o % R));
  }
  void add_rhs(T* f, int64_t d) const {
    for (int64_t o = 0; o < d * R; o += W) store(f + o, load(f + o) + load(g_ + o));
  }

  T* g_ = nullptr;
  alignas(64) T scale_[R], magnitude_[R];
};

// Sums over the rows of a tile, feature by feature, in the fixed order of the lanes.
template <class T, int NV>
void sum_lanes(const T* tile, const T* times, T* out, int64_t d) {
  constexpr int R = NV * kLanes<T>;
  for (int64_t i = 0; i < d; ++i) {
    T sum = 0;
    for (int l = 0; l < R; ++l) sum += times ? tile[i * R + l] * times[i * R + l] : tile[i * R + l];
    out[i] = sum;
  }
}

// Rows of a tile into a row-major matrix with leading dimension ld, padded with zeros.
template <class T, int NV>
void tile_to_padded(const T* tile, T* rows, int count, int64_t d, int64_t ld) {
  constexpr int R = NV * kLanes<T>;
  for (int l = 0; l < count; ++l) {
    for (int64_t i = 0; i < d; ++i) rows[l * ld + i] = tile[i * R + l];
    for (int64_t i = d; i < ld; ++i) rows[l * ld + i] = 0;
  }
}

template <class T>
struct CellAdjointWeights {
  CellWeights<T> forward;
  const T *w1_transposed, *w2_transposed;  // packed
};

template <class T, int NV>
class CellAdjoint : public AdjointBase<T, NV> {
  using Base = AdjointBase<T, NV>;
  using Base::R;
  using Base::W;

 public:
  static constexpr int kSums = 6;  // norm1..3, weight and bias
  static int64_t tiles(int64_t d, int64_t groups) { return 10 + (3 * groups + d - 1) / d; }

  CellAdjoint(const CellAdjointWeights<T>& w, const T* z, const T* x, const T* g, int64_t d, int64_t groups, T* memory)
      : w_(w), z_rows_(z), x_rows_(x), g_rows_(g), d_(d), groups_(groups) {
    T** slots[] = {&this->g_, &z_, &h_, &e_, &xh1_, &xh2_, &xh3_, &de_, &dy2_, &dn1_};
    for (T** slot : slots) {
      *slot = memory;
      memory += d * R;
    }
    rstd_ = memory;
  }

  void stage(int64_t row, int count) {
    const CellWeights<T>& f = w_.forward;
    this->load_rhs(g_rows_ + row * d_, count, d_);
    rows_to_tile<T, NV>(z_rows_ + row * d_, z_, count, d_);
    rows_to_tile<T, NV>(x_rows_ + row * d_, de_, count, d_);
    product<T, NV>(f.w1, z_, f.b1, nullptr, dn1_, d_);
    normalise<T, NV>(dn1_, xh1_, rstd_, d_, groups_, false);
    affine(xh1_, f.g1, f.c1, nullptr, h_, true);
    product<T, NV>(f.w2, h_, f.b2, de_, dn1_, d_);
    normalise<T, NV>(dn1_, xh2_, rstd_ + groups_ * R, d_, groups_, false);
    affine(xh2_, f.g2, f.c2, f.skip ? z_ : nullptr, e_, false);
    normalise<T, NV>(e_, xh3_, rstd_ + 2 * groups_ * R, d_, groups_, true);
  }

  void operator()(const T* u, T* f) {
    pull(u);
    product<T, NV>(w_.w1_transposed, dn1_, nullptr, w_.forward.skip ? de_ : nullptr, f, d_);
    this->add_rhs(f, d_);
  }

  // After the solve: cotangents of this tile's rows, in row-major matrices with leading dimension ld, and
  // the norms' parameter sums (kSums x d).
  void finish(const T* u_rows, int64_t row, int count, T* dx, T* dy1, T* dy2, T* h, T* z, int64_t ld, T* sums) {
    T* u = this->g_;  // the right-hand side is no longer needed
    this->load_solution(u_rows + row * d_, count, d_, u);
    const CellWeights<T>& f = w_.forward;
    group_norm_backward<T, NV>(u, nullptr, f.g3, xh3_, rstd_ + 2 * groups_ * R, e_, de_, d_, groups_);
    group_norm_backward<T, NV>(de_, nullptr, f.g2, xh2_, rstd_ + groups_ * R, nullptr, dy2_, d_, groups_);
    tile_to_rows<T, NV>(dy2_, dx + row * d_, count, d_);
    if (sums == nullptr) return;
    product<T, NV>(w_.w2_transposed, dy2_, nullptr, nullptr, dn1_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(dn1_ + o, load(h_ + o) > Vec<T>{} ? load(dn1_ + o) : Vec<T>{});
    sum_lanes<T, NV>(dn1_, xh1_, sums, d_);
    sum_lanes<T, NV>(dn1_, nullptr, sums + d_, d_);
    sum_lanes<T, NV>(de_, xh2_, sums + 2 * d_, d_);
    sum_lanes<T, NV>(de_, nullptr, sums + 3 * d_, d_);
    sum_lanes<T, NV>(u, xh3_, sums + 4 * d_, d_);
    sum_lanes<T, NV>(u, nullptr, sums + 5 * d_, d_);
    group_norm_backward<T, NV>(dn1_, nullptr, f.g1, xh1_, rstd_, nullptr, dn1_, d_, groups_);
    tile_to_padded<T, NV>(dn1_, dy1 + row * ld, count, d_, ld);
    tile_to_padded<T, NV>(dy2_, dy2 + row * ld, count, d_, ld);
    tile_to_padded<T, NV>(h_, h + row * ld, count, d_, ld);
    tile_to_padded<T, NV>(z_, z + row * ld, count, d_, ld);
  }

 private:
  // Cotangents at GN2's output (de), W2's output (dy2) and W1's output (left in dn1_).
  void pull(const T* u) {
    const CellWeights<T>& f = w_.forward;
    group_norm_backward<T, NV>(u, nullptr, f.g3, xh3_, rstd_ + 2 * groups_ * R, e_, de_, d_, groups_);
    group_norm_backward<T, NV>(de_, nullptr, f.g2, xh2_, rstd_ + groups_ * R, nullptr, dy2_, d_, groups_);
    product<T, NV>(w_.w2_transposed, dy2_, nullptr, nullptr, dn1_, d_);
    group_norm_backward<T, NV>(dn1_, h_, f.g1, xh1_, rstd_, nullptr, dn1_, d_, groups_);
  }

  void affine(const T* x_hat, const T* gamma, const T* beta, const T* skip, T* out, bool rectify) {
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        Vec<T> a = fma(load(x_hat + o), splat(gamma[i]), splat(beta[i]));
        if (skip) a += load(skip + o);
        store(out + o, rectify ? relu(a) : a);
      }
  }

  const CellAdjointWeights<T> w_;
  const T *z_rows_, *x_rows_, *g_rows_;
  const int64_t d_, groups_;
  T *z_, *h_, *e_, *xh1_, *xh2_, *xh3_, *de_, *dy2_, *dn1_, *rstd_;
};

template <class T>
struct FuseAdjointWeights {
  FuseWeights<T> forward;
  const T *gate_transposed, *fuse_transposed;  // packed
};

template <class T, int NV>
class FuseAdjoint : public AdjointBase<T, NV> {
  using Base = AdjointBase<T, NV>;
  using Base::R;
  using Base::W;

 public:
  static constexpr int kSums = 2;  // norm weight and bias
  static int64_t tiles(int64_t d, int64_t groups) { return 11 + (groups + d - 1) / d; }

  FuseAdjoint(const FuseAdjointWeights<T>& w, const T* z, const T* x, const T* cell_sum, const T* mask, const T* g,
              int64_t d, int64_t groups, T* memory)
      : w_(w), z_rows_(z), x_rows_(x), sum_rows_(cell_sum), mask_rows_(mask), g_rows_(g), d_(d), groups_(groups) {
    T** slots[] = {&this->g_, &z_, &input_, &gate_, &q_, &sign_, &xh_, &mask_, &de_, &dq_, &work_};
    for (T** slot : slots) {
      *slot = memory;
      memory += d * R;
    }
    rstd_ = memory;
  }

  void stage(int64_t row, int count) {
    const FuseWeights<T>& f = w_.forward;
    this->load_rhs(g_rows_ + row * d_, count, d_);
    rows_to_tile<T, NV>(z_rows_ + row * d_, z_, count, d_);
    rows_to_tile<T, NV>(sum_rows_ + row * d_, input_, count, d_);
    rows_to_tile<T, NV>(x_rows_ + row * d_, work_, count, d_);
    if (mask_rows_) rows_to_tile<T, NV>(mask_rows_ + row * d_, mask_, count, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(input_ + o, fma(splat(f.modalities), load(z_ + o), load(input_ + o)));
    product<T, NV>(f.gate, input_, nullptr, nullptr, gate_, d_);
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        const Vec<T> a = load(gate_ + o) + splat(f.modalities * f.gate_bias[i]);
        store(gate_ + o, a);
        store(q_ + o, a * load(z_ + o));
      }
    product<T, NV>(f.fuse, q_, f.fuse_bias, nullptr, sign_, d_);
    masked(sign_);
    for (int64_t o = 0; o < d_ * R; o += W) store(sign_ + o, load(sign_ + o) + load(work_ + o));
    normalise<T, NV>(sign_, xh_, rstd_, d_, groups_, !f.relu_last);
    if (!f.relu_last) return;
    for (int64_t i = 0; i < d_; ++i)
      for (int v = 0; v < NV; ++v) {
        const int64_t o = i * R + v * W;
        store(sign_ + o, fma(load(xh_ + o), splat(f.gamma[i]), splat(f.beta[i])));
      }
  }

  void operator()(const T* u, T* f) {
    pull(u);
    for (int64_t o = 0; o < d_ * R; o += W) {
      const Vec<T> w = load(dq_ + o);
      store(work_ + o, w * load(z_ + o));
      store(dq_ + o, w * load(gate_ + o));
    }
    product<T, NV>(w_.gate_transposed, work_, nullptr, dq_, f, d_, w_.forward.modalities);
    this->add_rhs(f, d_);
  }

  // As CellAdjoint::finish: cotangents of the gate's output, of W_f's output, and their partners.
  void finish(const T* u_rows, int64_t row, int count, T* dx, T* dcell_sum, T* dgate, T* dcombined, T* input, T* q,
              int64_t ld, T* sums) {
    T* u = this->g_;
    this->load_solution(u_rows + row * d_, count, d_, u);
    pull(u, dx + row * d_, count);
    for (int64_t o = 0; o < d_ * R; o += W) store(dq_ + o, load(dq_ + o) * load(z_ + o));
    product<T, NV>(w_.gate_transposed, dq_, nullptr, nullptr, work_, d_);
    tile_to_rows<T, NV>(work_, dcell_sum + row * d_, count, d_);
    if (sums == nullptr) return;
    if (w_.forward.relu_last)
      for (int64_t o = 0; o < d_ * R; o += W) store(u + o, load(sign_ + o) > Vec<T>{} ? load(u + o) : Vec<T>{});
    sum_lanes<T, NV>(u, xh_, sums, d_);
    sum_lanes<T, NV>(u, nullptr, sums + d_, d_);
    tile_to_padded<T, NV>(dq_, dgate + row * ld, count, d_, ld);
    tile_to_padded<T, NV>(de_, dcombined + row * ld, count, d_, ld);
    tile_to_padded<T, NV>(input_, input + row * ld, count, d_, ld);
    tile_to_padded<T, NV>(q_, q + row * ld, count, d_, ld);
  }

 private:
  // Cotangents at W_f's output (de_) and at its input (dq_); x's, which lies before the mask, into dx.
  void pull(const T* u, T* dx = nullptr, int count = 0) {
    const FuseWeights<T>& f = w_.forward;
    group_norm_backward<T, NV>(u, f.relu_last ? sign_ : nullptr, f.gamma, xh_, rstd_, f.relu_last ? nullptr : sign_,
                               de_, d_, groups_);
    if (dx) tile_to_rows<T, NV>(de_, dx, count, d_);
    masked(de_);
    product<T, NV>(w_.fuse_transposed, de_, nullptr, nullptr, dq_, d_);
  }
  void masked(T* t) {
    if (mask_rows_)
      for (int64_t o = 0; o < d_ * R; o += W) store(t + o, load(t + o) * load(mask_ + o));
  }

  const FuseAdjointWeights<T> w_;
  const T *z_rows_, *x_rows_, *sum_rows_, *mask_rows_, *g_rows_;
  const int64_t d_, groups_;
  T *z_, *input_, *gate_, *q_, *sign_, *xh_, *mask_, *de_, *dq_, *work_, *rstd_;
};

// out = A^T B for row-major (rows, ld) matrices, columns [k0, k0 + R) of the (d, d) result. Rows are taken
// 256 at a time: their panels stay in cache, and partial sums keep the rounding small.
template <class T, int NV>
void outer_product(const T* a, const T* b, int64_t rows, int64_t d, int64_t ld, int64_t k0, T* out) {
  constexpr int JR = block_rows(NV), W = kLanes<T>, R = NV * W;
  const int64_t columns = d - k0 < R ? d - k0 : R;
  for (int64_t r0 = 0; r0 < rows || r0 == 0; r0 += 256) {
    const int64_t depth = rows - r0 < 256 ? rows - r0 : 256;
    for (int64_t j0 = 0; j0 < d; j0 += JR) {
      Vec<T> acc[JR][NV] = {};
      accumulate<T, NV, JR>(a + r0 * ld + j0, ld, b + r0 * ld + k0, ld, depth, acc);
      for (int j = 0; j < JR && j0 + j < d; ++j) {
        alignas(64) T line[R];
        for (int v = 0; v < NV; ++v) store(line + v * W, acc[j][v]);
        T* o = out + (j0 + j) * d + k0;
        for (int64_t k = 0; k < columns; ++k) o[k] = r0 == 0 ? line[k] : o[k] + line[k];
      }
    }
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
