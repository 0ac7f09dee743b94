// The Jacobian penalty of a tile of rows: the sum over probes v of |J^T v|^2 with J the Jacobian of a block's map at
// its state z, which is held constant, and its gradients with respect to everything else.
//
// J^T v is one pull through the linearised map; the penalty's gradient goes back along the same way, through S of every
// norm (norm_group_slope), and then through the evaluation that the norms were taken from, once for all probes.
#pragma once

#include <cstring>

#include "gradients.h"
#include "linearisation.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Probes of a block's rows: (count, rows, d), those of one row `stride` apart.
template <class T>
struct Probes {
  const T* first;
  int64_t count, stride;
};

// A product of the pull, of the way back or through the evaluation. Random probes estimate the penalty, so that some
// digits are enough. Not for the linearisation: another sign of a relu would be another Jacobian.
template <class T, int NV, class Matrix>
void rough_product(const Matrix& a, const T* z, T* work, const T* add, T* out, int64_t d) {
  product<T, NV, Digits::kSome>(a, z, work, nullptr, add, out, d);
}

template <class T, int NV>
class PenaltyBase {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;

 protected:
  // For every probe in turn what `one(k)` leaves in `out`: its squares are summed up, and it becomes their gradient.
  template <class One, class Two>
  void for_probes(const Probes<T>& probes, const LaneRows<R>& rows, int64_t d, T* v_tile, T* out, T* value, One one,
                  Two two) {
    Vec<T> total[NV] = {};
    for (int64_t k = 0; k < probes.count; ++k) {
      rows_to_lanes<T, NV>(probes.first + k * probes.stride, rows, v_tile, d);
      one();
      Vec<T> sum[NV];
      sum_features<T, NV>(d, sum, [&](int64_t i, int v, Vec<T> s) {
        T* at = out + i * R + v * W;
        const Vec<T> a = load(at);
        store(at, a + a);
        return fma(a, a, s);
      });
      for (int v = 0; v < NV; ++v) total[v] += sum[v];
      two(k);
    }
    alignas(64) T lane[R];
    for (int v = 0; v < NV; ++v) store(lane + v * W, total[v]);
    for (int l = 0; l < R; ++l)
      if (rows.row[l] >= 0) value[rows.row[l]] = lane[l];
  }

  // Sums over probes begin with the first.
  static DEQFUSE_INLINE void add(T* at, Vec<T> a, bool first) { store(at, first ? a : load(at) + a); }

  // Tile `number` of the factors of the weights' gradients, all its lanes: those without a row hold zeros.
  static LaneRows<R> place(int64_t number) { return lane_rows<R>(number * R, R); }
};

template <class T, int NV>
class CellPenalty : public PenaltyBase<T, NV> {
  using Base = PenaltyBase<T, NV>;
  using Base::add;
  using Base::place;
  using Base::R;
  using Base::W;
  using Linear = LinearCell<T, NV>;

 public:
  static constexpr int kSums = 8;
  static int64_t tiles(int64_t d, int64_t groups) {
    return 14 + Linear::tiles(d, groups) + (3 * groups + d - 1) / d + work_tiles<NV>(d);
  }

  CellPenalty(const CellLinearWeights<T, NV>& w, int64_t d, int64_t groups, T* memory)
      : at_(w, d, groups, memory), d_(d), groups_(groups), memory_(memory) {
    T** slots[] = {&v_, &q_, &t2_, &pulled_, &t1_, &w_, &r_, &c_, &dy1_, &dy2_, &dg1_, &dg2_, &dg3_, &dc2_};
    projected_ = place_tiles<T, R>(slots, d, memory + Linear::tiles(d, groups) * d * R);
    work_ = projected_ + (3 * groups + d - 1) / d * d * R;
  }

  // `number`: of the first of probes.count + 1 tiles of the factors in `parts`, which is null where the parameters'
  // gradients are not wanted.
  void run(const T* z, const T* x, const Probes<T>& probes, const LaneRows<R>& rows, T* value, T* dx,
           const GradientParts<T, NV>* parts, int64_t number) {
    // Zeros in lanes without a row add nothing to a sum.
    if (rows.row[R - 1] < 0) std::memset(memory_, 0, sizeof(T) * tiles(d_, groups_) * d_ * R);
    at_.take(z, x, rows, w_, pulled_, work_);
    this->for_probes(
        probes, rows, d_, v_, w_, value, [&] { pull(); },
        [&](int64_t k) {
          push(k == 0);
          if (parts == nullptr) return;
          parts->cotangent[0].take(t1_, place(number + k));
          parts->input[0].take(w_, place(number + k));
          parts->cotangent[1].take(t2_, place(number + k));
          parts->input[1].take(r_, place(number + k));
        });
    lanes_to_rows<T, NV>(dy2_, nullptr, rows, dx, d_);
    if (parts) finish(*parts, place(number + probes.count));
  }

 private:
  // w = J^T v; on the way q at GN2's output, t2 at W2's output, pulled at its input, t1 at W1's output.
  void pull() {
    const typename CellMap<T, NV>::Weights& f = at_.w.forward;
    at_.pull(v_, q_, t2_, projected_ + groups_ * R);
    rough_product<T, NV>(at_.w.w2_transposed, t2_, work_, nullptr, pulled_, d_);
    group_norm_backward<T, NV>(pulled_, at_.h, f.g1, at_.xh1, at_.rstd, nullptr, t1_, d_, groups_, projected_);
    rough_product<T, NV>(at_.w.w1_transposed, t1_, work_, f.skip ? q_ : nullptr, w_, d_);
  }

  // Back from w, the gradient with respect to J^T v: r at pulled, c at GN2's output; and what the norms pass on to
  // their inputs and weights.
  void push(bool first) {
    const typename CellMap<T, NV>::Weights& f = at_.w.forward;
    const int64_t width = d_ / groups_;
    const Vec<T> zero{};
    rough_product<T, NV>(f.w1, w_, work_, nullptr, r_, d_);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t at = g * width;
      norm_group_slope<T, NV>(r_ + at * R, t1_ + at * R, projected_ + g * R, at_.xh1 + at * R, at_.rstd + g * R, width,
                              [&](int64_t k, int v, Vec<T> s, Vec<T> dy) {
                                const int64_t o = (at + k) * R + v * W;
                                const Vec<T> h = load(at_.h + o);
                                add(dy1_ + o, dy, first);
                                add(dg1_ + o, h > zero ? s * load(pulled_ + o) : zero, first);
                                store(r_ + o, h > zero ? s * splat(f.g1[at + k]) : zero);
                              });
    }
    rough_product<T, NV>(f.w2, r_, work_, nullptr, c_, d_);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t at = g * width;
      const T *xh2 = at_.xh2 + at * R, *xh3 = at_.xh3 + at * R, *rstd2 = at_.rstd + (groups_ + g) * R;
      const T *p2 = projected_ + (groups_ + g) * R, *p3 = projected_ + (2 * groups_ + g) * R;
      T* c = c_ + at * R;
      norm_group_slope<T, NV>(c, t2_ + at * R, p2, xh2, rstd2, width, [&](int64_t k, int v, Vec<T> s, Vec<T> dy) {
        const int64_t o = (at + k) * R + v * W;
        add(dy2_ + o, dy, first);
        add(dg2_ + o, s * load(q_ + o), first);
        s *= splat(f.g2[at + k]);
        if (f.skip) s += load(w_ + o);
        store(c_ + o, load(at_.e + o) > zero ? s : zero);
      });
      const T* rstd3 = at_.rstd + (2 * groups_ + g) * R;
      norm_group_slope<T, NV>(c, q_ + at * R, p3, xh3, rstd3, width, [&](int64_t k, int v, Vec<T> s, Vec<T> dy) {
        const int64_t o = (at + k) * R + v * W;
        dy = load(at_.e + o) > zero ? dy : zero;
        store(c_ + o, dy);
        add(dc2_ + o, dy, first);
        add(dg3_ + o, s * load(v_ + o), first);
        store(dg2_ + o, fma(dy, load(at_.xh2 + o), load(dg2_ + o)));
      });
      norm_group_symmetric<T, NV>(
          xh2, rstd2, static_cast<T*>(nullptr), width,
          [&](int64_t k, int v) { return load(c + k * R + v * W) * splat(f.g2[at + k]); },
          [&](int64_t k, int v, Vec<T> s) {
            T* to = dy2_ + (at + k) * R + v * W;
            store(to, load(to) + s);
          });
    }
  }

  // From dy2, the gradient at W2's output, on to W1's; then what the parameters' gradients need.
  void finish(const GradientParts<T, NV>& parts, const LaneRows<R>& rows) {
    const T* g1 = at_.w.forward.g1;
    const int64_t width = d_ / groups_;
    const Vec<T> zero{};
    rough_product<T, NV>(at_.w.w2_transposed, dy2_, work_, nullptr, pulled_, d_);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t at = g * width;
      const auto rectified = [&](int64_t o) { return load(at_.h + o) > zero ? load(pulled_ + o) : zero; };
      norm_group_symmetric<T, NV>(
          at_.xh1 + at * R, at_.rstd + g * R, static_cast<T*>(nullptr), width,
          [&](int64_t k, int v) { return rectified((at + k) * R + v * W) * splat(g1[at + k]); },
          [&](int64_t k, int v, Vec<T> s) {
            const int64_t o = (at + k) * R + v * W;
            const Vec<T> a = rectified(o);
            store(dy1_ + o, load(dy1_ + o) + s);
            store(dg1_ + o, fma(a, load(at_.xh1 + o), load(dg1_ + o)));
            store(pulled_ + o, a);
          });
    }
    T* const sums[] = {dy1_, dy2_, dg1_, pulled_, dg2_, dc2_, dg3_};
    for (int kind = 0; kind < kSums - 1; ++kind) row_sums<T, NV>(sums[kind], parts.sums + kind * d_, d_);
    std::memset(parts.sums + (kSums - 1) * d_, 0, sizeof(T) * d_);  // J does not depend on the last norm's bias
    parts.cotangent[0].take(dy1_, rows);
    parts.input[0].take(at_.z, rows);
    parts.cotangent[1].take(dy2_, rows);
    parts.input[1].take(at_.h, rows);
  }

  Linear at_;
  const int64_t d_, groups_;
  T *const memory_, *v_, *q_, *t2_, *pulled_, *t1_, *w_, *r_, *c_, *dy1_, *dy2_, *dg1_, *dg2_, *dg3_, *dc2_;
  T *projected_, *work_;
};

template <class T, int NV>
class FusePenalty : public PenaltyBase<T, NV> {
  using Base = PenaltyBase<T, NV>;
  using Base::add;
  using Base::place;
  using Base::R;
  using Base::W;
  using Linear = LinearFuse<T, NV>;

 public:
  static constexpr int kSums = 4;
  static int64_t tiles(int64_t d, int64_t groups) {
    return 10 + Linear::tiles(d, groups) + (groups + d - 1) / d + work_tiles<NV>(d);
  }

  FusePenalty(const FuseLinearWeights<T, NV>& w, bool masked, int64_t d, int64_t groups, T* memory)
      : at_(w, masked, d, groups, memory), d_(d), groups_(groups), memory_(memory) {
    T** slots[] = {&v_, &t_, &k_, &y_, &zy_, &w_, &dy_, &de_, &dgate_, &dg_};
    projected_ = place_tiles<T, R>(slots, d, memory + Linear::tiles(d, groups) * d * R);
    work_ = projected_ + (groups + d - 1) / d * d * R;
  }

  // As CellPenalty::run; dx is the injection's of this step, matrix 0 the gate's.
  void run(const T* z, const FuseRows<T>& from, const T* mask, const Probes<T>& probes, const LaneRows<R>& rows,
           T* value, T* dx, const GradientParts<T, NV>* parts, int64_t number) {
    if (rows.row[R - 1] < 0) std::memset(memory_, 0, sizeof(T) * tiles(d_, groups_) * d_ * R);
    at_.take(z, from, mask, rows, y_, work_);
    this->for_probes(
        probes, rows, d_, v_, w_, value, [&] { pull(); },
        [&](int64_t k) {
          push(k == 0);
          if (parts == nullptr) return;
          parts->cotangent[0].take(zy_, place(number + k));
          parts->input[0].take(w_, place(number + k));
          parts->cotangent[1].take(at_.has_mask ? k_ : t_, place(number + k));
          parts->input[1].take(dy_, place(number + k));
        });
    lanes_to_rows<T, NV>(de_, nullptr, rows, dx, d_);
    if (parts) finish(*parts, place(number + probes.count));
  }

 private:
  // w = J^T v; on the way t in front of the norm, k the same behind the mask, y at q and zy = N z * y at the gate.
  void pull() {
    at_.pull(v_, t_, projected_);
    if (at_.has_mask)
      for (int64_t o = 0; o < d_ * R; o += W) store(k_ + o, load(t_ + o) * load(at_.mask + o));
    rough_product<T, NV>(at_.w.fuse_transposed, at_.has_mask ? k_ : t_, work_, nullptr, y_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) {
      const Vec<T> y = load(y_ + o);
      store(zy_ + o, at_.count(o) * load(at_.z + o) * y);
      store(dy_ + o, load(at_.gate + o) * y);
    }
    rough_product<T, NV>(at_.w.gate_transposed, zy_, work_, dy_, w_, d_);
  }

  // Back from w: dy at y, de in front of the norm, dgate at the gate.
  void push(bool first) {
    const typename FuseMap<T, NV>::Weights& f = at_.w.forward;
    const int64_t width = d_ / groups_;
    const Vec<T> zero{};
    rough_product<T, NV>(f.gate, w_, work_, nullptr, dy_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) {
      const Vec<T> w = load(w_ + o);
      add(dgate_ + o, w * load(y_ + o), first);
      store(dy_ + o, fma(load(at_.gate + o), w, at_.count(o) * load(at_.z + o) * load(dy_ + o)));
    }
    T* const de = y_;
    rough_product<T, NV>(f.fuse, dy_, work_, nullptr, de, d_);
    for (int64_t o = 0; o < d_ * R; o += W) {
      Vec<T> a = load(de + o);
      if (at_.has_mask) a *= load(at_.mask + o);
      if (!f.relu_last) a = load(at_.sign + o) > zero ? a : zero;
      store(de + o, a);
    }
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t at = g * width * R;
      norm_group_slope<T, NV>(de + at, t_ + at, projected_ + g * R, at_.xh + at, at_.rstd + g * R, width,
                              [&](int64_t k, int v, Vec<T> s, Vec<T> dy) {
                                const int64_t o = at + k * R + v * W;
                                const Vec<T> sign = load(at_.sign + o);
                                s *= load(v_ + o);
                                add(dg_ + o, !f.relu_last || sign > zero ? s : zero, first);
                                add(de_ + o, f.relu_last || sign > zero ? dy : zero, first);
                              });
    }
  }

  void finish(const GradientParts<T, NV>& parts, const LaneRows<R>& rows) {
    at_.masked(de_);
    rough_product<T, NV>(at_.w.fuse_transposed, de_, work_, nullptr, y_, d_);
    for (int64_t o = 0; o < d_ * R; o += W) store(dgate_ + o, fma(load(at_.z + o), load(y_ + o), load(dgate_ + o)));
    at_.gate_bias_sums(dgate_, parts.sums);
    row_sums<T, NV>(de_, parts.sums + d_, d_);
    row_sums<T, NV>(dg_, parts.sums + 2 * d_, d_);
    std::memset(parts.sums + (kSums - 1) * d_, 0, sizeof(T) * d_);
    parts.cotangent[0].take(dgate_, rows);
    parts.input[0].take(at_.input, rows);
    parts.cotangent[1].take(de_, rows);
    parts.input[1].take(at_.q, rows);
  }

  Linear at_;
  const int64_t d_, groups_;
  T *const memory_, *v_, *t_, *k_, *y_, *zy_, *w_, *dy_, *de_, *dgate_, *dg_;
  T *projected_, *work_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
