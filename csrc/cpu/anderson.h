// Fixed points of all rows of a range, R at a time: Anderson mixing or damped iteration in SIMD lanes.
//
// Each lane runs its own problem with its own count of steps. When it stops, its answer is written and it takes the
// next row, of which a tile is kept ready. History slots are shared in memory but
// are always read newest first and only as far back as the lane's own count, hence a row's answer does
// not depend on its neighbours, on its lane, or on when it was taken: bit for bit.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../common/outcome.h"
#include "row_lanes.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
struct SolveOptions {
  T tol;
  int max_iter;
  int history;  // 0: damped iteration
  T beta, lam;
};

// Tiles that the state of a solve takes: z, starts and their images, saved answers; images and residuals.
constexpr int64_t solver_tiles(int history) { return 4 + 2 * (history > 0 ? history : 1); }

// Rows that begin at zero take plain steps until the next is expected to solve them, if the residual goes on falling as
// it did from the step before to the last; while each step at least halves it, and up to so many evaluations. That
// early there is no history worth mixing, and since no row ends there, some digits are enough.
constexpr int kWarmup = 4;

// Whether they do. A damped iteration is asked for its damping, a short one for each of its steps, and of a long one, to
// a tight tolerance, the first steps are a small part.
template <class T>
bool begins_plainly(const SolveOptions<T>& o) {
  return o.history > 0 && o.beta == T(1) && o.max_iter > 2 * kWarmup && o.tol >= T(1e-6);
}

// What a solve of so many tiles asks of each of its matrices.
template <class T>
Uses uses(const SolveOptions<T>& o, bool first_is_free, int64_t tiles) {
  return first_is_free && begins_plainly(o) ? Uses{2 * tiles, (kWarmup - 1) * tiles} : Uses{5 * tiles, 0};
}

// Where the answers of row r go; those in `z` lie by rows, or one after the other as lanes took them, where a run has
// one tile. `trace` (steps, rows_total) may be null. `rows`: which row is the k-th, or null where it is row k.
template <class T>
struct RowResults {
  T* z;
  T* residual;
  int32_t* nfe;
  int8_t* outcome;
  T* trace;
  int64_t trace_stride;
  const int64_t* rows = nullptr;
  bool z_by_lanes = false;
};

// Map: the problem.
//   tiles()                of d * R values that it needs
//   first_is_free()        whether rows start with their first evaluation
//   stage(rows, start, in_place)   reads rows into waiting lanes, or into those where they are solved; `start`: f(0) if
//                          first_is_free(), else z0
//   admit(moves)           moves what it keeps of waiting rows into the lanes where they are solved
//   evaluate<digits>(z, f, waiting)   f(z), whole tile, of the rows that wait or of those being solved
//   scale(v, norm)         what the residuals of vector v are divided by, given the norms of f(z)
//   kAnswerIsImage         whether f(z) or z itself is the answer of the best iterate z
template <class T, int NV, class Map, class Lanes = RowsAsLanes<T, NV>>
class RowSolver {
 public:
  static constexpr int W = kLanes<T>, R = NV * W;

  // Tiles that `memory` must hold, as `Lanes` has them.
  static int64_t tiles(int history) { return solver_tiles(history); }

  RowSolver(Map& map, const Lanes& lanes, const SolveOptions<T>& options, const RowResults<T>& results, T* memory)
      : map_(map), lanes_(lanes), d_(lanes.d), n_(lanes.size()), opt_(options), out_(results),
        m_(options.history > 0 ? options.history : 1) {
    z_ = memory;
    start_ = z_ + n_;
    saved_ = start_ + n_;
    images_ = saved_ + n_;
    residuals_ = images_ + n_ * m_;
    spare_ = residuals_ + n_ * m_;
    warm_ = map.first_is_free() && begins_plainly(options);
    for (int64_t& row : row_) row = -1;
  }

  // The rows from the begin-th on. Of rows that fit into one tile: whether all answers are the iterates that were
  // evaluated last.
  bool run(int64_t begin, int64_t end) {
    next_ = begin;
    end_ = end;
    if (end - begin < R) std::memset(z_, 0, sizeof(T) * n_ * tiles(opt_.history));  // lanes that never get a row
    refill(m_ - 1);
    if (judged_start() && active_ > 0) advance(m_ - 1);
    for (int64_t step = 0; active_ > 0; ++step) {
      const int slot = int(step % m_);
      T* f = images_ + n_ * slot;
      map_.template evaluate<Digits::kAll>(z_, f, false);
      with_history(ages(1), [&](auto a) { lanes_.template measured<a()>(z_, f, residuals_, slot, m_, ff_, gram_); });
      judge(slot, nullptr);
      refill(slot);
      if (active_ > 0) advance(slot);
    }
    return answers_are_last_;
  }

 private:
  int64_t number(int64_t k) const { return out_.rows ? out_.rows[k] : k; }

  // Whether rows begin with an evaluation that needs no product and counts as their first.
  bool judged_start() const { return map_.first_is_free() && !warm_; }

  // Idle lanes take the next rows. With a judged start it is as if `slot` held their first evaluation, and those that
  // end there make way for others.
  void refill(int slot) {
    while (active_ < R && (staged_ < staged_end_ || next_ < end_)) {
      const bool in_place = active_ == 0 && staged_ == staged_end_;  // an idle tile needs no waiting room
      if (staged_ == staged_end_) stage(in_place);
      LaneMoves<T, NV> moves;
      moves.whole_tile = in_place;
      LaneRows<R> taken;
      for (int l = 0; l < R; ++l) {
        taken.row[l] = -1;
        if (row_[l] >= 0 || staged_ == staged_end_) continue;
        moves.add(staged_, l);
        before_[l] = steps_of_start_[staged_];
        row_[l] = taken.row[l] = number(first_staged_ + staged_++);
        count_[l] = best_at_[l] = 0;
        best_[l] = std::numeric_limits<T>::infinity();
        best_saved_[l] = false;
        ++active_;
      }
      if (!in_place) map_.admit(moves);
      if (!judged_start()) {
        lanes_.move(moves, start_, z_);
        continue;
      }
      lanes_.move(moves, start_, images_ + n_ * slot, residuals_ + n_ * slot);
      for (int k = 0; k < moves.count; ++k) {
        const int l = moves.to[k];
        gram_[slot][slot][l / W][l % W] = ff_[l / W][l % W] = square_of_start_[moves.from[k]];
      }
      judge(slot, &taken);
    }
  }

  // A tile of next rows, so that what they start from costs whole vectors: into waiting lanes, or where they stay.
  void stage(bool in_place) {
    first_staged_ = next_;
    staged_ = 0;
    staged_end_ = end_ - next_ < R ? int(end_ - next_) : R;
    next_ += staged_end_;
    LaneRows<R> rows = lane_rows<R>(first_staged_, staged_end_);
    for (int l = 0; l < staged_end_; ++l) rows.row[l] = number(rows.row[l]);
    map_.stage(rows, start_, in_place);
    if (!map_.first_is_free()) return;
    Vec<T> square[NV] = {};
    lanes_.squares(start_, square);
    for (int v = 0; v < NV; ++v) store(square_of_start_ + v * W, square[v]);
    if (warm_) warm_up(!in_place);
  }

  // From f(0) to the iterate that is evaluated next. A row that is ready keeps it while others go on.
  void warm_up(bool waiting) {
    alignas(64) T residual[R], before[R], ready[R];
    for (int v = 0; v < NV; ++v) {
      const Vec<T> norm = square_root<T>(load(square_of_start_ + v * W));
      store(before + v * W, norm / map_.scale(v, norm));
    }
    int left = 0;
    for (int l = 0; l < R; ++l) {
      const bool goes_on = l < staged_end_ && before[l] > opt_.tol;
      ready[l] = goes_on ? T(0) : T(1);
      left += goes_on;
      steps_of_start_[l] = 1;
      if (l < staged_end_) record(l, before[l]);
    }
    for (int k = 1; k < kWarmup && left > 0; ++k) {
      map_.template evaluate<Digits::kSome>(start_, spare_, waiting);
      Vec<T> gg[NV] = {}, ff[NV] = {};
      lanes_.plain_step(start_, spare_, ready, gg, ff);
      for (int v = 0; v < NV; ++v)
        store(residual + v * W, square_root<T>(gg[v]) / map_.scale(v, square_root<T>(ff[v])));
      std::swap(start_, spare_);
      for (int l = 0; l < staged_end_; ++l) {
        if (ready[l] > T(0)) continue;
        ++steps_of_start_[l];
        record(l, residual[l]);
        const T rate = residual[l] / before[l];
        before[l] = residual[l];
        if (rate < T(0.5) && rate * residual[l] > T(1.5) * opt_.tol) continue;
        ready[l] = T(1);
        --left;
        if (rate < T(1)) continue;
        lanes_.copy_row(l, spare_, nullptr, start_);  // a step away from the solution, or NaN: not taken
      }
    }
  }

  // In the trace, of waiting lane l.
  void record(int l, T residual) {
    if (out_.trace) out_.trace[(steps_of_start_[l] - 1) * out_.trace_stride + number(first_staged_ + l)] = residual;
  }

  // The newest images, of all rows or only of those just taken: counts them, and writes the answers of rows that end.
  void judge(int slot, const LaneRows<R>* only) {
    alignas(64) T residual[R];
    for (int v = 0; v < NV; ++v)
      store(residual + v * W, square_root<T>(gram_[slot][slot][v]) / map_.scale(v, square_root<T>(ff_[v])));
    const bool at_start = only != nullptr;
    for (int l = 0; l < R; ++l)
      ended_[l] = row_[l] >= 0 && (!at_start || only->row[l] >= 0) && ended(l, slot, residual[l], at_start);
    write_answers();
  }

  bool ended(int l, int slot, T residual, bool at_start) {
    const int k = ++count_[l];
    if (out_.trace) out_.trace[(before_[l] + k - 1) * out_.trace_stride + row_[l]] = residual;
    if (residual < best_[l]) {
      best_[l] = residual;
      best_at_[l] = k;
      best_saved_[l] = false;
    }
    const int age = best_at_[l] > 0 ? k - best_at_[l] : 0;
    Outcome outcome;
    if (row_ends(residual, opt_.tol, k, opt_.max_iter - before_[l], best_at_[l], outcome)) {
      finish(l, slot, age, outcome, at_start);
      return true;
    }
    if (!best_saved_[l] && age == m_ - 1) save_best(l, slot, age);  // the next step overwrites it
    return false;
  }

  struct Answer {  // of a lane, its part of the tiles value - minus; without `value` NaN, without `minus` zero
    const T *value, *minus;
  };

  // The image f(z) of an iterate, or the iterate itself where the residual vouches for that.
  Answer answer(int slot, int age) const {
    const int64_t at = n_ * ((slot - age + m_) % m_);
    return {images_ + at, Map::kAnswerIsImage ? nullptr : residuals_ + at};
  }

  void save_best(int l, int slot, int age) {
    const Answer a = answer(slot, age);
    lanes_.copy_row(l, a.value, a.minus, saved_);
    best_saved_[l] = true;
  }

  void finish(int l, int slot, int age, Outcome outcome, bool at_start) {
    const bool poisoned = outcome == Outcome::kNonFinite;
    // A free start has not seen the weights: if the next image is NaN, the best is no answer either.
    const bool hollow = poisoned && judged_start() && count_[l] == 2;
    if (hollow) best_[l] = std::numeric_limits<T>::infinity();
    const bool is_last = age == 0 && !poisoned && !at_start;  // it lies in z_, where a start never was
    answers_are_last_ &= is_last;
    if (poisoned && !Map::kAnswerIsImage) answer_[l] = {nullptr, nullptr};  // not solved at all
    else if (hollow) answer_[l] = answer(slot, 0);
    else if (is_last && !Map::kAnswerIsImage) answer_[l] = {z_, nullptr};
    // Without any finite residual the current image is the answer: NaN, not the start.
    else answer_[l] = best_saved_[l] ? Answer{saved_, nullptr} : answer(slot, age);
    out_.residual[row_[l]] = best_[l];
    out_.nfe[row_[l]] = before_[l] + count_[l];
    out_.outcome[row_[l]] = int8_t(outcome);
  }

  void write_answers() {
    for (int l = 0; l < R; ++l) {
      if (!ended_[l]) continue;
      const Answer a = answer_[l];
      LaneRows<R> alike;  // lanes whose answer lies in the same place
      for (int k = 0; k < R; ++k) {
        const bool same = ended_[k] && answer_[k].value == a.value && answer_[k].minus == a.minus;
        alike.row[k] = !same ? -1 : out_.z_by_lanes ? k : row_[k];
        if (!same) continue;
        ended_[k] = false;
        row_[k] = -1;
        --active_;
      }
      if (a.value != nullptr) lanes_.give(a.value, a.minus, alike, out_.z);
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
      lanes_.template mixed<a()>(z_, images_, residuals_, slot, m_, gram_, count, keep, opt_.beta, opt_.lam);
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
  const Lanes lanes_;
  const int64_t d_, n_;
  const SolveOptions<T> opt_;
  const RowResults<T> out_;
  const int m_;
  bool warm_, answers_are_last_ = true;
  T *z_, *start_, *spare_, *saved_, *images_, *residuals_;
  Gram<T, NV> gram_ = {};
  Vec<T> ff_[NV] = {};
  T best_[R];
  int64_t row_[R], next_ = 0, end_ = 0;
  int64_t first_staged_ = 0;
  int staged_ = 0, staged_end_ = 0;  // waiting lanes whose rows have not been taken
  int count_[R] = {}, best_at_[R] = {}, active_ = 0;
  int before_[R] = {}, steps_of_start_[R] = {};  // evaluations that `count_` leaves out; of waiting rows
  alignas(64) T square_of_start_[R];
  Answer answer_[R];
  bool best_saved_[R], ended_[R];
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
