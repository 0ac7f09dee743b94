// Fixed points of all rows of a range, R at a time: Anderson mixing or damped iteration in SIMD lanes.
//
// Each lane runs its own problem with its own count of steps. When it stops, its answer is written and
// the lane takes the next row, so no row waits for another. History slots are shared in memory but
// are always read newest first and only as far back as the lane's own count, hence a row's answer does
// not depend on its neighbours, on its lane, or on when it was loaded: bit for bit.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../common/outcome.h"
#include "vec.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kMaxHistory = 8;

template <class T>
struct SolveOptions {
  T tol;
  int max_iter;
  int history;  // 0: damped iteration
  T beta, lam;
};

// Where the answers of row r go. `trace` (steps, rows_total) may be null.
template <class T>
struct RowResults {
  T* z;
  T* residual;
  int32_t* nfe;
  int8_t* outcome;
  T* trace;
  int64_t trace_stride;
};

// Weights with sum 1 that minimise |sum_a alpha_a g_a|, per lane, from the Gram matrix ordered by age.
// Entries beyond a lane's count carry no weight. Cholesky with a relative ridge and a pivot floor.
template <class T>
void mixing_weights(const Vec<T> (&gram)[kMaxHistory][kMaxHistory], Vec<T> count, int m, T lam,
                    Vec<T> (&alpha)[kMaxHistory]) {
  const Vec<T> zero{}, one = splat(T(1));
  Vec<T> largest{}, valid[kMaxHistory], lower[kMaxHistory][kMaxHistory], y[kMaxHistory];
  for (int i = 0; i < m; ++i) {
    valid[i] = splat(T(i)) < count ? one : zero;
    largest = maximum(largest, splat(T(i)) < count ? gram[i][i] : zero);
  }
  const Vec<T> ridge = largest * splat(lam);
  const Vec<T> floor = fma(largest, splat(T(2.4e-7)), splat(T(1e-30)));
  for (int i = 0; i < m; ++i)
    for (int j = 0; j <= i; ++j) {
      Vec<T> a = splat(T(i)) < count ? gram[i][j] : zero;
      if (i == j) a += ridge;
      for (int k = 0; k < j; ++k) a -= lower[i][k] * lower[j][k];
      lower[i][j] = i == j ? one / square_root<T>(maximum(floor, a)) : a * lower[j][j];
    }
  for (int i = 0; i < m; ++i) {
    Vec<T> a = valid[i];
    for (int k = 0; k < i; ++k) a -= lower[i][k] * y[k];
    y[i] = splat(T(i)) < count ? a * lower[i][i] : zero;
  }
  Vec<T> sum{};
  for (int i = m - 1; i >= 0; --i) {
    Vec<T> a = y[i];
    for (int k = i + 1; k < m; ++k) a -= lower[k][i] * alpha[k];
    alpha[i] = splat(T(i)) < count ? a * lower[i][i] : zero;
    sum += alpha[i];
  }
  for (int i = 0; i < m; ++i) alpha[i] /= sum;
}

// Map: the problem. It owns a tile of injections and a "deck", the next R rows ready to be taken.
//   stage(row, count)      fill the deck with rows row .. row + count - 1
//   take(lane, deck_lane)  move one row's injections from the deck into the tile
//   deck_start()           tile with the start of every row on deck: f(0) if first_is_free(), else z0
//   operator()(z, f)       evaluate, whole tile
//   kAnswerIsImage         whether f(z) or z itself is the answer of the best iterate z
template <class T, int NV, class Map>
class RowSolver {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;

  // Tiles of d * R values that `memory` must hold.
  static int64_t tiles(int history) { return 2 + 2 * (history > 0 ? history : 1); }

  RowSolver(Map& map, int64_t d, const SolveOptions<T>& options, const RowResults<T>& results, T* memory)
      : map_(map), d_(d), n_(d * R), opt_(options), out_(results), m_(options.history > 0 ? options.history : 1) {
    z_ = memory;
    saved_ = z_ + n_;
    images_ = saved_ + n_;
    residuals_ = images_ + n_ * m_;
    std::memset(memory, 0, sizeof(T) * n_ * tiles(options.history));
  }

  void run(int64_t begin, int64_t end) {
    next_ = begin;
    end_ = end;
    deck_ = deck_count_ = 0;
    active_ = 0;
    // Lanes first take one row each, in order: an adjoint's tile is its deck, and nothing is moved there.
    for (int l = 0; l < R; ++l) load_row(l, m_ - 1);
    if (map_.first_is_free()) {
      for (int l = 0; l < R; ++l) judge(l, m_ - 1);
      if (active_ > 0) mix(m_ - 1);
    }
    for (int64_t step = 0; active_ > 0; ++step) {
      const int slot = int(step % m_);
      T* f = images_ + n_ * slot;
      map_(z_, f);
      measure(slot);
      for (int l = 0; l < R; ++l) judge(l, slot);
      if (active_ > 0) mix(slot);
    }
  }

 private:
  // Residual of the newest slot and its products with the older ones, per lane.
  void measure(int slot) {
    T *f = images_ + n_ * slot, *g = residuals_ + n_ * slot;
    for (int v = 0; v < NV; ++v) {
      Vec<T> dots[kMaxHistory] = {}, ff{};
      for (int64_t i = 0; i < d_; ++i) {
        const int64_t o = i * R + v * W;
        const Vec<T> fi = load(f + o), gi = fi - load(z_ + o);
        store(g + o, gi);
        ff = fma(fi, fi, ff);
        for (int j = 0; j < m_; ++j) dots[j] = fma(gi, load(residuals_ + n_ * j + o), dots[j]);
      }
      for (int j = 0; j < m_; ++j) gram_[slot][j][v] = gram_[j][slot][v] = dots[j];
      store(ff_ + v * W, ff);
    }
  }

  // Judge the newest image of lane l; rows that end make way for the next until one stays.
  void judge(int l, int slot) {
    while (row_[l] >= 0 && ended(l, slot)) {
      load_row(l, slot);
      if (!map_.first_is_free()) break;
    }
  }

  bool ended(int l, int slot) {
    const T residual = std::sqrt(gram_[slot][slot][l / W][l % W]) / map_.scale(l, std::sqrt(ff_[l]));
    const int k = ++count_[l];
    if (out_.trace) out_.trace[(k - 1) * out_.trace_stride + row_[l]] = residual;
    if (residual < best_[l]) {
      best_[l] = residual;
      best_at_[l] = k;
      best_saved_[l] = false;
    }
    const int age = best_at_[l] > 0 ? k - best_at_[l] : 0;
    if (residual <= opt_.tol) return finish(l, slot, age, Outcome::kConverged);
    if (!std::isfinite(residual)) return finish(l, slot, age, Outcome::kNonFinite);
    if (k >= opt_.max_iter) return finish(l, slot, age, Outcome::kMaxIter);
    if (k - best_at_[l] >= kStallSteps) return finish(l, slot, age, Outcome::kStalled);
    if (!best_saved_[l] && age == m_ - 1) save_best(l, slot, age);  // the next step overwrites it
    return false;
  }

  void save_best(int l, int slot, int age) {
    for (int64_t i = 0; i < d_; ++i) saved_[i * R + l] = answer(i * R + l, slot, age);
    best_saved_[l] = true;
  }

  // The image f(z) of an iterate, or the iterate itself where the residual vouches for that.
  T answer(int64_t at, int slot, int age) const {
    const int64_t o = n_ * ((slot - age + m_) % m_) + at;
    return Map::kAnswerIsImage ? images_[o] : images_[o] - residuals_[o];
  }

  bool finish(int l, int slot, int age, Outcome outcome) {
    const int64_t row = row_[l];
    // Without any finite residual the current image is the answer: NaN, not the start.
    T* to = out_.z + row * d_;
    const bool poisoned = outcome == Outcome::kNonFinite;
    // A free start has not seen the weights: if the next image is NaN, the best is no answer either.
    const bool hollow = poisoned && map_.first_is_free() && count_[l] == 2;
    if (hollow) best_[l] = std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < d_; ++i) {
      if (poisoned && !Map::kAnswerIsImage) to[i] = std::numeric_limits<T>::quiet_NaN();  // not solved at all
      else if (hollow) to[i] = answer(i * R + l, slot, 0);
      else to[i] = best_saved_[l] ? saved_[i * R + l] : answer(i * R + l, slot, age);
    }
    out_.residual[row] = best_[l];
    out_.nfe[row] = count_[l];
    out_.outcome[row] = int8_t(outcome);
    row_[l] = -1;
    --active_;
    return true;
  }

  // Give lane l the next row, as if `slot` held its free first evaluation.
  void load_row(int l, int slot) {
    row_[l] = -1;
    count_[l] = 0;
    if (next_ >= end_) return;
    if (deck_ == deck_count_) {
      deck_ = 0;
      deck_count_ = int(end_ - next_ < R ? end_ - next_ : R);
      map_.stage(next_, deck_count_);
    }
    const int from = deck_++;
    row_[l] = next_++;
    best_[l] = std::numeric_limits<T>::infinity();
    best_at_[l] = 0;
    best_saved_[l] = false;
    ++active_;
    map_.take(l, from);
    const T* start = map_.deck_start();
    if (!map_.first_is_free()) {
      for (int64_t i = 0; i < d_; ++i) z_[i * R + l] = start[i * R + from];
      return;
    }
    T *f = images_ + n_ * slot, *g = residuals_ + n_ * slot, norm = 0;
    for (int64_t i = 0; i < d_; ++i) {
      const T s = start[i * R + from];
      f[i * R + l] = g[i * R + l] = s;
      norm = std::fma(s, s, norm);
    }
    gram_[slot][slot][l / W][l % W] = norm;
    ff_[l] = norm;
  }

  // z <- sum_a alpha_a (f_a - (1 - beta) g_a), newest first; idle lanes and fresh starts keep z.
  void mix(int slot) {
    const Vec<T> damp = splat(T(1) - opt_.beta), zero{};
    for (int v = 0; v < NV; ++v) {
      Vec<T> by_age[kMaxHistory][kMaxHistory], alpha[kMaxHistory], count, keep;
      for (int q = 0; q < W; ++q) {
        count[q] = T(count_[v * W + q]);
        keep[q] = row_[v * W + q] < 0 || count_[v * W + q] == 0 ? T(1) : T(0);
      }
      count = maximum(count, splat(T(1)));
      for (int a = 0; a < m_; ++a)
        for (int b = 0; b <= a; ++b) by_age[a][b] = gram_[(slot - a + m_) % m_][(slot - b + m_) % m_][v];
      if (m_ == 1) alpha[0] = splat(T(1));
      else mixing_weights<T>(by_age, count, m_, opt_.lam, alpha);
      for (int64_t i = 0; i < d_; ++i) {
        const int64_t o = i * R + v * W;
        Vec<T> mixed{};
        for (int a = 0; a < m_; ++a) {
          const int64_t at = n_ * ((slot - a + m_) % m_) + o;
          Vec<T> step = load(images_ + at);
          if (opt_.beta != T(1)) step = fma(-damp, load(residuals_ + at), step);
          // Select, never multiply by zero: a dead slot may hold the NaN of an earlier row.
          mixed = alpha[a] == zero ? mixed : fma(alpha[a], step, mixed);
        }
        store(z_ + o, keep > zero ? load(z_ + o) : mixed);
      }
    }
  }

  Map& map_;
  const int64_t d_, n_;
  const SolveOptions<T> opt_;
  const RowResults<T> out_;
  const int m_;
  T *z_, *saved_, *images_, *residuals_;
  Vec<T> gram_[kMaxHistory][kMaxHistory][NV] = {};
  alignas(64) T ff_[R] = {};
  T best_[R];
  int64_t row_[R], next_ = 0, end_ = 0;
  int count_[R], best_at_[R], deck_ = 0, deck_count_ = 0, active_ = 0;
  bool best_saved_[R];
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
