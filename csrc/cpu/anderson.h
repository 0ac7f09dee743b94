// Fixed points of all rows of a range, R at a time: Anderson mixing or damped iteration in SIMD lanes.
//
// Each lane runs its own problem with its own count of steps. When it stops, its answer is written and it takes the
// next row, together with as many others as make that worth while. History slots are shared in memory but
// are always read newest first and only as far back as the lane's own count, hence a row's answer does
// not depend on its neighbours, on its lane, or on when it was taken: bit for bit.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../common/outcome.h"
#include "lanes.h"
#include "mixing.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
struct SolveOptions {
  T tol;
  int max_iter;
  int history;  // 0: damped iteration
  T beta, lam;
};

// Tiles that the state of a solve takes: z, starts, saved answers; images and residuals.
constexpr int64_t solver_tiles(int history) { return 3 + 2 * (history > 0 ? history : 1); }

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

// Map: the problem.
//   tiles()                of d * R values that it needs
//   first_is_free()        whether rows start with their first evaluation
//   take(rows, start)      rows' injections into their lanes, and where they start: f(0) if first_is_free(), else z0
//   operator()(z, f)       evaluate, whole tile
//   scale(v, norm)         what the residuals of vector v are divided by, given the norms of f(z)
//   kLanesToTake           idle lanes that make taking rows worth while
//   kAnswerIsImage         whether f(z) or z itself is the answer of the best iterate z
template <class T, int NV, class Map>
class RowSolver {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;

  // Tiles of d * R values that `memory` must hold.
  static int64_t tiles(int history) { return solver_tiles(history); }

  RowSolver(Map& map, int64_t d, const SolveOptions<T>& options, const RowResults<T>& results, T* memory)
      : map_(map), d_(d), n_(d * R), opt_(options), out_(results), m_(options.history > 0 ? options.history : 1) {
    z_ = memory;
    start_ = z_ + n_;
    saved_ = start_ + n_;
    images_ = saved_ + n_;
    residuals_ = images_ + n_ * m_;
    for (int64_t& row : row_) row = -1;
  }

  void run(int64_t begin, int64_t end) {
    next_ = begin;
    end_ = end;
    if (end - begin < R) std::memset(z_, 0, sizeof(T) * n_ * tiles(opt_.history));  // lanes that never get a row
    refill(m_ - 1);
    if (map_.first_is_free() && active_ > 0) advance(m_ - 1);
    for (int64_t step = 0; active_ > 0; ++step) {
      const int slot = int(step % m_);
      T* f = images_ + n_ * slot;
      map_(z_, f);
      with_history(ages(1), [&](auto a) { measure<T, NV, a()>(d_, z_, f, residuals_, slot, m_, ff_, gram_); });
      judge(slot, nullptr);
      refill(slot);
      if (active_ > 0) advance(slot);
    }
  }

 private:
  // Idle lanes take the next rows, once there are enough of them. With a free start the rows are judged at once, as
  // if `slot` held their first evaluation, and those that end there make way for others.
  void refill(int slot) {
    while (next_ < end_ && (R - active_ >= Map::kLanesToTake || R - active_ >= end_ - next_)) {
      LaneRows<R> taken;
      for (int l = 0; l < R; ++l) {
        taken.row[l] = row_[l] < 0 && next_ < end_ ? next_++ : -1;
        if (taken.row[l] < 0) continue;
        row_[l] = taken.row[l];
        count_[l] = best_at_[l] = 0;
        best_[l] = std::numeric_limits<T>::infinity();
        best_saved_[l] = false;
        ++active_;
      }
      map_.take(taken, start_);
      if (!map_.first_is_free()) return blend<T, NV>(taken, start_, z_, d_);
      Vec<T> flag[NV], norm[NV] = {};
      const Vec<T> zero{};
      taking<T, NV>(taken, flag);
      T *f = images_ + n_ * slot, *g = residuals_ + n_ * slot;
      for (int64_t o = 0; o < n_; o += R)
        for (int v = 0; v < NV; ++v) {
          const int64_t at = o + v * W;
          const Vec<T> s = load(start_ + at);
          norm[v] = fma(s, s, norm[v]);
          store(f + at, flag[v] > zero ? s : load(f + at));
          store(g + at, flag[v] > zero ? s : load(g + at));
        }
      for (int v = 0; v < NV; ++v) {
        gram_[slot][slot][v] = flag[v] > zero ? norm[v] : gram_[slot][slot][v];
        ff_[v] = flag[v] > zero ? norm[v] : ff_[v];
      }
      judge(slot, &taken);
    }
  }

  // The newest images, of all rows or only of those just taken: counts them, and writes the answers of rows that end.
  void judge(int slot, const LaneRows<R>* only) {
    alignas(64) T residual[R];
    for (int v = 0; v < NV; ++v)
      store(residual + v * W, square_root<T>(gram_[slot][slot][v]) / map_.scale(v, square_root<T>(ff_[v])));
    for (int l = 0; l < R; ++l)
      ended_[l] = row_[l] >= 0 && (only == nullptr || only->row[l] >= 0) && ended(l, slot, residual[l]);
    write_answers();
  }

  bool ended(int l, int slot, T residual) {
    const int k = ++count_[l];
    if (out_.trace) out_.trace[(k - 1) * out_.trace_stride + row_[l]] = residual;
    if (residual < best_[l]) {
      best_[l] = residual;
      best_at_[l] = k;
      best_saved_[l] = false;
    }
    const int age = best_at_[l] > 0 ? k - best_at_[l] : 0;
    Outcome outcome;
    if (row_ends(residual, opt_.tol, k, opt_.max_iter, best_at_[l], outcome)) return finish(l, slot, age, outcome);
    if (!best_saved_[l] && age == m_ - 1) save_best(l, slot, age);  // the next step overwrites it
    return false;
  }

  struct Answer {  // of lane l: value[i * R + l] - minus[i * R + l]; without `value` NaN, without `minus` zero
    const T *value, *minus;
  };

  // The image f(z) of an iterate, or the iterate itself where the residual vouches for that.
  Answer answer(int slot, int age) const {
    const int64_t at = n_ * ((slot - age + m_) % m_);
    return {images_ + at, Map::kAnswerIsImage ? nullptr : residuals_ + at};
  }

  void save_best(int l, int slot, int age) {
    const Answer a = answer(slot, age);
    for (int64_t o = l; o < n_; o += R) saved_[o] = a.minus ? a.value[o] - a.minus[o] : a.value[o];
    best_saved_[l] = true;
  }

  bool finish(int l, int slot, int age, Outcome outcome) {
    const bool poisoned = outcome == Outcome::kNonFinite;
    // A free start has not seen the weights: if the next image is NaN, the best is no answer either.
    const bool hollow = poisoned && map_.first_is_free() && count_[l] == 2;
    if (hollow) best_[l] = std::numeric_limits<T>::infinity();
    if (poisoned && !Map::kAnswerIsImage) answer_[l] = {nullptr, nullptr};  // not solved at all
    else if (hollow) answer_[l] = answer(slot, 0);
    // Without any finite residual the current image is the answer: NaN, not the start.
    else answer_[l] = best_saved_[l] ? Answer{saved_, nullptr} : answer(slot, age);
    out_.residual[row_[l]] = best_[l];
    out_.nfe[row_[l]] = count_[l];
    out_.outcome[row_[l]] = int8_t(outcome);
    return true;
  }

  void write_answers() {
    for (int l = 0; l < R; ++l) {
      if (!ended_[l]) continue;
      const Answer a = answer_[l];
      LaneRows<R> alike;  // lanes whose answer lies in the same place
      for (int k = 0; k < R; ++k) {
        const bool same = ended_[k] && answer_[k].value == a.value && answer_[k].minus == a.minus;
        alike.row[k] = same ? row_[k] : -1;
        if (!same) continue;
        ended_[k] = false;
        row_[k] = -1;
        --active_;
      }
      if (a.value != nullptr) lanes_to_rows<T, NV>(a.value, a.minus, alike, out_.z, d_);
      else
        for (int64_t row : alike.row)
          for (int64_t i = 0; row >= 0 && i < d_; ++i) out_.z[row * d_ + i] = std::numeric_limits<T>::quiet_NaN();
    }
  }

  // The next iterate; idle lanes and fresh starts keep theirs.
  void advance(int slot) {
    alignas(64) T counts[R], keeps[R];
    for (int l = 0; l < R; ++l) {
      counts[l] = T(count_[l] > 1 ? count_[l] : 1);
      keeps[l] = row_[l] < 0 || count_[l] == 0 ? T(1) : T(0);
    }
    Vec<T> count[NV], keep[NV];
    for (int v = 0; v < NV; ++v) {
      count[v] = load(counts + v * W);
      keep[v] = load(keeps + v * W);
    }
    with_history(ages(0), [&](auto a) {
      mix<T, NV, a()>(d_, z_, images_, residuals_, slot, m_, gram_, count, keep, opt_.beta, opt_.lam);
    });
  }

  // How far back any lane looks, `more` evaluations from now.
  int ages(int more) const {
    int most = 1;
    for (int l = 0; l < R; ++l)
      if (row_[l] >= 0 && count_[l] + more > most) most = count_[l] + more;
    return most < m_ ? most : m_;
  }

  Map& map_;
  const int64_t d_, n_;
  const SolveOptions<T> opt_;
  const RowResults<T> out_;
  const int m_;
  T *z_, *start_, *saved_, *images_, *residuals_;
  Gram<T, NV> gram_ = {};
  Vec<T> ff_[NV] = {};
  T best_[R];
  int64_t row_[R], next_ = 0, end_ = 0;
  int count_[R] = {}, best_at_[R] = {}, active_ = 0;
  Answer answer_[R];
  bool best_saved_[R], ended_[R];
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
