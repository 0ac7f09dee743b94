// The parameters' gradients: what tiles of rows contribute to them, and the sums and products over all tiles.
#pragma once

#include <cstring>

#include "present_rows.h"
#include "products.h"
#include "rowmath.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// What the parameters' gradients are made of: for each of the block's two matrices the rows of the cotangent of its
// product and of the vector that it multiplied; for all its vectors their gradients from this tile, (kSums, d), in the
// order of the parameters.
template <class T, int NV>
struct GradientParts {
  Cotangents<T, NV> cotangent[2];
  Inputs<T, NV> input[2];
  T* sums;
};

// Those of `blocks` blocks (cells, or the fuse step) of two matrices and at most `sums` vectors each. `rows`: of the
// factors of the products, `tiles`: of the sums; here the most that any block has, in what follows those of one.
template <class T, int NV>
class GradientMemory {
 public:
  GradientMemory(int64_t blocks, int64_t rows, int64_t tiles, int sums, int64_t d)
      : most_rows_(rows),
        most_tiles_(tiles),
        d_(d),
        most_sums_(sums),
        factors_(blocks * bytes(rows, d) / int64_t(sizeof(T))),
        sums_(blocks * tiles * sums * d) {}

  // Of one block's factors.
  static int64_t bytes(int64_t rows, int64_t d) { return 2 * int64_t(sizeof(T)) * (a_size(rows, d) + b_size(rows, d)); }

  GradientParts<T, NV> parts(int64_t block, int64_t rows, int64_t tile) const {
    GradientParts<T, NV> out;
    const int64_t a = a_size(most_rows_, d_), b = b_size(most_rows_, d_);
    for (int which = 0; which < 2; ++which) {
      T* p = factors_.get() + (2 * block + which) * (a + b);
      out.cotangent[which] = {p, rows, d_};
      out.input[which] = {p + a, rows, d_};
    }
    out.sums = sums_.get() + (block * most_tiles_ + tile) * most_sums_ * d_;
    return out;
  }

  // One of jobs() pieces of a block's gradients: dW = cotangent^T input over all rows, some columns of it; or the sums
  // of its first `sums` vectors over the tiles, in order. Added to `out` unless these rows come first.
  int64_t jobs() const { return 2 * columns() + 1; }
  void run(int64_t block, int64_t rows, int64_t tiles, int64_t job, int sums, T* const* out, bool first) const {
    const GradientParts<T, NV> part = parts(block, rows, 0);
    if (job < 2 * columns()) {
      const int which = int(job / columns());
      outer_product(part.cotangent[which], part.input[which], job % columns() * kWidth, out[2 * which], first);
      return;
    }
    for (int kind = 0; kind < sums; ++kind) {
      T* sum = out[kind < 2 ? 2 * kind + 1 : kind + 2];
      if (first) std::memset(sum, 0, sizeof(T) * d_);
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t i = 0; i < d_; ++i) sum[i] += part.sums[(tile * most_sums_ + kind) * d_ + i];
    }
  }

 private:
  static constexpr int64_t kWidth = kGradientColumns<T, NV>;
  static int64_t a_size(int64_t rows, int64_t d) { return Cotangents<T, NV>::size(rows, d); }
  static int64_t b_size(int64_t rows, int64_t d) { return Inputs<T, NV>::size(rows, d); }
  int64_t columns() const { return (d_ + kWidth - 1) / kWidth; }

  const int64_t most_rows_, most_tiles_, d_;
  const int most_sums_;
  Scratch<T> factors_, sums_;
};

// How many of `blocks` blocks run at once: as many as need 16 MB for their weights and the factors of their gradients,
// or one.
inline int64_t blocks_at_once(int64_t blocks, int64_t bytes_of_one) {
  const int64_t limit = int64_t(16) << 20;
  if (bytes_of_one <= 0 || limit / bytes_of_one >= blocks) return blocks;
  return limit > bytes_of_one ? limit / bytes_of_one : 1;
}

// The gradients of x_fuse = sum_i weights_i x_i + bias: what they add to dx_i, and those of the weights and the bias,
// as sums over the rows in order.
template <class T>
class InjectionGradients {
 public:
  InjectionGradients(int64_t modalities, const PresentRows& rows, int64_t d, const T* weights, T* dweights, T* dbias)
      : n_(modalities),
        rows_(rows),
        d_(d),
        weights_(weights),
        dweights_(dweights),
        dbias_(dbias),
        terms_(dweights ? rows.total() * (modalities + 1) : 0) {}

  // Row r of modality i, which it has.
  void add(int64_t i, int64_t r, const T* dx_fuse, const T* x, T* dx) const {
    const T weight = weights_[i];
    const T* __restrict from = dx_fuse + r * d_;
    T* __restrict to = dx + r * d_;
    for (int64_t k = 0; k < d_; ++k) to[k] += weight * from[k];
    if (dweights_) terms_.get()[r * (n_ + 1) + i] = dot(x + r * d_, from, d_);
    if (dbias_ == nullptr || i > rows_.first(r)) return;
    T& sum = terms_.get()[r * (n_ + 1) + n_] = T(0);
    for (int64_t k = 0; k < d_; ++k) sum += from[k];
  }
  // After all of them.
  void finish() const {
    for (int64_t i = 0; i <= n_; ++i) {
      T* out = i < n_ && dweights_ ? dweights_ + i : i == n_ ? dbias_ : nullptr;
      if (out == nullptr) continue;
      *out = T(0);
      for (int64_t k = 0; k < rows_.size(i); ++k) *out += terms_.get()[rows_.row(i, k) * (n_ + 1) + i];
    }
  }

 private:
  const int64_t n_;
  const PresentRows& rows_;
  const int64_t d_;
  const T* weights_;
  T *dweights_, *dbias_;
  Scratch<T> terms_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
