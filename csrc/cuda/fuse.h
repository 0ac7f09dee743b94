// The purify-then-combine step's adjoint on a tile, in stages between its products. Matrix 0 is W_a, matrix 1 is W_f.
//
//   z <- GN(relu(mask * (W_f (z * gate) + b_f) + x)),   gate = W_a (n z + S) + n b_a;   or relu(GN(.))
//
// n is the number of modalities, or a row's own. As products have one scale for all rows, a row's own n is applied to
// what goes into a product, or to what comes out of it.
#pragma once

#include "tile.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T, int kRows>
class FuseTile : public Tile<T, kRows> {
  using Base = Tile<T, kRows>;
  using Base::d;
  using Base::groups;
  using Base::m;
  using Base::p;
  using Base::product_slot_;
  using Base::q;
  using Base::width;
  using L = ScalarLane<T>;

 public:
  using Base::count;
  static constexpr int kParams = 6, kSums = 4;
  static constexpr int kPulledSlot = kExtra;
  static constexpr bool kOwesProduct = true;
  static constexpr int kZ = kXHat1, kGate = kXHat2, kXHat = kXHat3;

  using Base::Base;

  DEQFUSE_BODY Dressing<T> forward(int which) const {
    const bool later = which == 0 && p.counts != nullptr;  // n b_a is added in linearise_2
    return {T(1), which == 0 ? p.modalities : T(1), later ? nullptr : q[2 * which + 1], nullptr};
  }
  DEQFUSE_BODY Dressing<T> pulled() const { return {p.modalities, T(1), nullptr, m.slot(kWork)}; }

  // The gate, W_a (n z + S) + n b_a, comes next.
  template <class P>
  DEQFUSE_BODY void linearise_1(P& policy) {
    this->clear_idle(policy);
    policy.for_rows(count, [&](const auto& lanes, int r) {
      const T *from = this->row_of(p.z, r), *sum = this->row_of(p.cell_sum, r);
      T *work = m.slot(kWork, r), *z = m.slot(kZ, r);
      T* panel = p.input[0] ? this->row_of(p.input[0], r) : nullptr;
      const T n = p.counts ? own(r) : p.modalities;
      lanes.each(d, [&](int i) {
        z[i] = from[i];
        const T a = L::fma(n, from[i], sum[i]);
        work[i] = a;
        if (panel) panel[i] = a;
      });
    });
  }

  // W_f q + b_f comes next.
  template <class P>
  DEQFUSE_BODY void linearise_2(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      const T *image = m.slot(product_slot_, r), *z = m.slot(kZ, r);
      T *work = m.slot(kWork, r), *gate = m.slot(kGate, r);
      T* panel = p.input[1] ? this->row_of(p.input[1], r) : nullptr;
      lanes.each(d, [&](int i) {
        const T a = p.counts ? L::fma(own(r), q[1][i], image[i]) : image[i], b = a * z[i];
        gate[i] = a;
        work[i] = b;
        if (panel) panel[i] = b;
      });
    });
  }

  template <class P>
  DEQFUSE_BODY void linearise_3(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      lanes.groups(groups, width, [&](const auto& part, int g) {
        const int at = g * width;
        const T *x = this->row_of(p.x, r) + at, *gamma = q[4] + at, *beta = q[5] + at;
        const T* mask = p.mask ? this->row_of(p.mask, r) + at : nullptr;
        T *y = m.slot(product_slot_, r) + at, *x_hat = m.slot(kXHat, r) + at;
        int8_t* signs = m.signs(r) + at;
        part.each(width, [&](int i) {
          T e = y[i];
          if (mask) e *= mask[i];
          e += x[i];
          y[i] = p.variant ? e : L::relu(e);
          signs[i] = e > T(0) ? 2 : 0;
        });
        const Two<T> norm = Base::moments(part, width, [&](int i) { return y[i]; });
        part.each(width, [&](int i) {
          const T a = standardised<L>(y[i], norm.a, norm.b);
          x_hat[i] = a;
          if (p.variant) signs[i] = L::fma(a, gamma[i], beta[i]) > T(0) ? 2 : 0;
        });
        part.once([&] { m.rstd(2, r)[g] = norm.b; });
      });
      this->begin_row(lanes, r);
    });
  }

  // From the operand to W_f's output. The product with W_f^T comes next.
  template <class P>
  DEQFUSE_BODY void pull(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      if (this->active(r)) pull_row(lanes, r, this->operand(r), nullptr);
    });
  }

  // From q to n times the gate's output (kExtra), and past the gate (kWork). The product with W_a^T comes next, with N
  // as its scale where the rows have no n of their own.
  template <class P>
  DEQFUSE_BODY void pull_on(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      const T *dq = m.slot(product_slot_, r), *z = m.slot(kZ, r), *gate = m.slot(kGate, r);
      T *work = m.slot(kWork, r), *extra = m.slot(kExtra, r);
      lanes.each(d, [&](int i) {
        const T a = dq[i];
        extra[i] = share(r, a * z[i]);
        work[i] = a * gate[i];
      });
    });
  }

  template <class P>
  DEQFUSE_BODY void advance(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      if (this->active(r)) this->advance_row(lanes, r);
    });
  }

  // One VJP with the answers. The product with W_f^T comes next.
  template <class P>
  DEQFUSE_BODY void finish_1(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      this->load_answer(lanes, r);
      T* u = m.slot(kX, r);
      const int8_t* signs = m.signs(r);
      if (p.variant) lanes.each(d, [&](int i) { u[i] = signs[i] & 2 ? u[i] : T(0); });
      pull_row(lanes, r, u, this->row_of(p.dx, r));
      const T* masked = m.slot(kWork, r);
      T* panel = p.cotangent[1] ? this->row_of(p.cotangent[1], r) : nullptr;
      if (panel) lanes.each(d, [&](int i) { panel[i] = masked[i]; });
    });
    if (p.sums == nullptr) return;
    policy.sync();
    this->sum_rows(policy, 1, kSums, [&](int r, int i) { return m.slot(kWork, r)[i]; });
    this->sum_rows(policy, 2, kSums, [&](int r, int i) { return m.slot(kX, r)[i] * m.slot(kXHat, r)[i]; });
    this->sum_rows(policy, 3, kSums, [&](int r, int i) { return m.slot(kX, r)[i]; });
  }

  // The product of dgate with W_a^T comes next.
  template <class P>
  DEQFUSE_BODY void finish_2(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      const T *dq = m.slot(product_slot_, r), *z = m.slot(kZ, r);
      T* work = m.slot(kWork, r);
      T* panel = p.cotangent[0] ? this->row_of(p.cotangent[0], r) : nullptr;
      lanes.each(d, [&](int i) {
        const T a = dq[i] * z[i];
        work[i] = a;
        if (panel) panel[i] = a;
      });
    });
    if (p.sums == nullptr) return;
    policy.sync();
    this->sum_rows(policy, 0, kSums, [&](int r, int i) { return share(r, m.slot(kWork, r)[i]); });
  }

  template <class P>
  DEQFUSE_BODY void finish_3(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      const T* image = m.slot(product_slot_, r);
      T* out = this->row_of(p.dcell_sum, r);
      lanes.each(d, [&](int i) { out[i] = image[i]; });
    });
  }

 private:
  DEQFUSE_BODY T own(int r) const { return p.counts[this->first + r]; }
  // What a row adds to something that is multiplied by `modalities` afterwards.
  DEQFUSE_BODY T share(int r, T value) const { return p.counts ? own(r) * value : value; }

  // Leaves the cotangent of W_f's output in kWork, and that of x where `dx` is given.
  template <class Lanes>
  DEQFUSE_BODY void pull_row(const Lanes& lanes, int r, const T* operand, T* dx) {
    lanes.groups(groups, width, [&](const auto& part, int g) {
      const int at = g * width;
      const T inv = T(1) / T(width), rstd = m.rstd(2, r)[g];
      const T *in = operand + at, *gamma = q[4] + at, *x_hat = m.slot(kXHat, r) + at;
      const T* mask = p.mask ? this->row_of(p.mask, r) + at : nullptr;
      T* work = m.slot(kWork, r) + at;
      const int8_t* signs = m.signs(r) + at;
      const Two<T> sums = part.sum2(width, [&](int i) {
        const T a = p.variant && !(signs[i] & 2) ? T(0) : in[i] * gamma[i];
        work[i] = a;
        return Two<T>{a, a * x_hat[i]};
      });
      part.each(width, [&](int i) {
        T de = norm_symmetric<L>(work[i], sums.a * inv, x_hat[i], sums.b * inv, rstd);
        if (!p.variant && !(signs[i] & 2)) de = T(0);
        if (dx) dx[at + i] = de;
        work[i] = mask ? de * mask[i] : de;
      });
    });
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
