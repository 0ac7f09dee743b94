// The residual cell's adjoint on a tile, in stages between its products. Matrix 0 is W1, matrix 1 is W2.
//
//   z <- GN3(relu(GN2(W2 relu(GN1(W1 z + b1)) + b2 + x) [+ z]))
#pragma once

#include "tile.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T, int kRows>
class CellTile : public Tile<T, kRows> {
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
  static constexpr int kParams = 10, kSums = 8;
  static constexpr int kPulledSlot = kWork;    // what the second product of J^T multiplies
  static constexpr bool kOwesProduct = false;  // whether `finish` needs it, too

  using Base::Base;

  DEQFUSE_BODY Dressing<T> forward(int which) const { return {T(1), T(1), q[2 * which + 1], nullptr}; }
  DEQFUSE_BODY Dressing<T> pulled() const { return {T(1), T(1), nullptr, p.variant ? m.slot(kExtra) : nullptr}; }

  // W1 z + b1 comes next.
  template <class P>
  DEQFUSE_BODY void linearise_1(P& policy) {
    this->clear_idle(policy);
    policy.for_rows(count, [&](const auto& lanes, int r) {
      const T* z = this->row_of(p.z, r);
      T* work = m.slot(kWork, r);
      lanes.each(d, [&](int i) { work[i] = z[i]; });
    });
  }

  // W2 h + b2 comes next.
  template <class P>
  DEQFUSE_BODY void linearise_2(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      lanes.groups(groups, width, [&](const auto& part, int g) {
        const int at = g * width;
        const T *y = m.slot(product_slot_, r) + at, *gamma = q[4] + at, *beta = q[5] + at;
        T *x_hat = m.slot(kXHat1, r) + at, *work = m.slot(kWork, r) + at;
        T* panel = p.input[1] ? this->row_of(p.input[1], r) + at : nullptr;
        int8_t* signs = m.signs(r) + at;
        const Two<T> norm = Base::moments(part, width, [&](int i) { return y[i]; });
        part.each(width, [&](int i) {
          const T a = standardised<L>(y[i], norm.a, norm.b), h = L::relu(L::fma(a, gamma[i], beta[i]));
          x_hat[i] = a;
          work[i] = h;
          signs[i] = h > T(0);
          if (panel) panel[i] = h;
        });
        part.once([&] { m.rstd(0, r)[g] = norm.b; });
      });
    });
  }

  template <class P>
  DEQFUSE_BODY void linearise_3(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      lanes.groups(groups, width, [&](const auto& part, int g) {
        const int at = g * width;
        const T *x = this->row_of(p.x, r) + at, *z = this->row_of(p.z, r) + at, *gamma = q[6] + at, *beta = q[7] + at;
        T *y = m.slot(product_slot_, r) + at, *x_hat2 = m.slot(kXHat2, r) + at, *x_hat3 = m.slot(kXHat3, r) + at;
        int8_t* signs = m.signs(r) + at;
        part.each(width, [&](int i) { y[i] += x[i]; });
        const Two<T> second = Base::moments(part, width, [&](int i) { return y[i]; });
        part.each(width, [&](int i) {
          const T a = standardised<L>(y[i], second.a, second.b);
          T e = L::fma(a, gamma[i], beta[i]);
          if (p.variant) e += z[i];
          x_hat2[i] = a;
          if (e > T(0)) signs[i] |= 2;
          y[i] = L::relu(e);
        });
        const Two<T> third = Base::moments(part, width, [&](int i) { return y[i]; });
        part.each(width, [&](int i) { x_hat3[i] = standardised<L>(y[i], third.a, third.b); });
        part.once([&] {
          m.rstd(1, r)[g] = second.b;
          m.rstd(2, r)[g] = third.b;
        });
      });
      this->begin_row(lanes, r);
    });
  }

  // The first part of J^T: from the operand to W2's output. The product with W2^T comes next.
  template <class P>
  DEQFUSE_BODY void pull(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      if (this->active(r)) pull_row(lanes, r, this->operand(r), p.variant);
    });
  }

  // From h to W1's output. The product with W1^T comes next.
  template <class P>
  DEQFUSE_BODY void pull_on(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) { through_first_norm(lanes, r); });
  }

  template <class P>
  DEQFUSE_BODY void advance(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      if (this->active(r)) this->advance_row(lanes, r);
    });
  }

  // One VJP with the answers. The product with W2^T comes next, if the parameters' gradients are wanted.
  template <class P>
  DEQFUSE_BODY void finish_1(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      this->load_answer(lanes, r);
      pull_row(lanes, r, m.slot(kX, r), true);
      const T* dy2 = m.slot(kWork, r);
      T* dx = this->row_of(p.dx, r);
      lanes.each(d, [&](int i) { dx[i] = dy2[i]; });
    });
    if (p.sums == nullptr) return;
    policy.sync();
    this->sum_rows(policy, 1, kSums, [&](int r, int i) { return m.slot(kWork, r)[i]; });
    this->sum_rows(policy, 4, kSums, [&](int r, int i) { return m.slot(kExtra, r)[i] * m.slot(kXHat2, r)[i]; });
    this->sum_rows(policy, 5, kSums, [&](int r, int i) { return m.slot(kExtra, r)[i]; });
    this->sum_rows(policy, 6, kSums, [&](int r, int i) { return m.slot(kX, r)[i] * m.slot(kXHat3, r)[i]; });
    this->sum_rows(policy, 7, kSums, [&](int r, int i) { return m.slot(kX, r)[i]; });
  }

  template <class P>
  DEQFUSE_BODY void finish_2(P& policy) {
    policy.for_rows(count, [&](const auto& lanes, int r) {
      T* image = m.slot(product_slot_, r);
      const int8_t* signs = m.signs(r);
      lanes.each(d, [&](int i) { image[i] = signs[i] & 1 ? image[i] : T(0); });
    });
    policy.sync();
    this->sum_rows(policy, 2, kSums, [&](int r, int i) { return m.slot(product_slot_, r)[i] * m.slot(kXHat1, r)[i]; });
    this->sum_rows(policy, 3, kSums, [&](int r, int i) { return m.slot(product_slot_, r)[i]; });
    policy.sync();
    policy.for_rows(count, [&](const auto& lanes, int r) {
      through_first_norm(lanes, r);
      const T* dy1 = m.slot(kWork, r);
      T* panel = this->row_of(p.cotangent[0], r);
      lanes.each(d, [&](int i) { panel[i] = dy1[i]; });
    });
    policy.sync();
    this->sum_rows(policy, 0, kSums, [&](int r, int i) { return m.slot(kWork, r)[i]; });
  }

  template <class P>
  DEQFUSE_BODY void finish_3(P&) {}

 private:
  // Leaves the cotangent of W2's output in kWork and, if `keep`, that of GN2's output in kExtra.
  template <class Lanes>
  DEQFUSE_BODY void pull_row(const Lanes& lanes, int r, const T* operand, bool keep) {
    lanes.groups(groups, width, [&](const auto& part, int g) {
      const int at = g * width;
      const T inv = T(1) / T(width), rstd2 = m.rstd(1, r)[g], rstd3 = m.rstd(2, r)[g];
      const T *in = operand + at, *gamma2 = q[6] + at, *gamma3 = q[8] + at;
      const T *x_hat2 = m.slot(kXHat2, r) + at, *x_hat3 = m.slot(kXHat3, r) + at;
      T *work = m.slot(kWork, r) + at, *extra = m.slot(kExtra, r) + at;
      const int8_t* signs = m.signs(r) + at;
      const Two<T> third = part.sum2(width, [&](int i) {
        const T a = in[i] * gamma3[i];
        return Two<T>{a, a * x_hat3[i]};
      });
      const Two<T> second = part.sum2(width, [&](int i) {
        const T a = norm_symmetric<L>(in[i] * gamma3[i], third.a * inv, x_hat3[i], third.b * inv, rstd3);
        const T de = signs[i] & 2 ? a : T(0), b = de * gamma2[i];
        if (keep) extra[i] = de;
        work[i] = b;
        return Two<T>{b, b * x_hat2[i]};
      });
      part.each(width,
                [&](int i) { work[i] = norm_symmetric<L>(work[i], second.a * inv, x_hat2[i], second.b * inv, rstd2); });
    });
  }

  template <class Lanes>
  DEQFUSE_BODY void through_first_norm(const Lanes& lanes, int r) {
    lanes.groups(groups, width, [&](const auto& part, int g) {
      const int at = g * width;
      const T inv = T(1) / T(width), rstd = m.rstd(0, r)[g];
      const T *in = m.slot(product_slot_, r) + at, *gamma = q[4] + at, *x_hat = m.slot(kXHat1, r) + at;
      T* work = m.slot(kWork, r) + at;
      const int8_t* signs = m.signs(r) + at;
      const Two<T> sums = part.sum2(width, [&](int i) {
        const T a = signs[i] & 1 ? in[i] * gamma[i] : T(0);
        work[i] = a;
        return Two<T>{a, a * x_hat[i]};
      });
      part.each(width,
                [&](int i) { work[i] = norm_symmetric<L>(work[i], sums.a * inv, x_hat[i], sums.b * inv, rstd); });
    });
  }
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
