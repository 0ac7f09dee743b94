// Forward: the problems of kernels.h cut into tasks, each a run of rows through RowSolver.
#pragma once

#include "anderson.h"
#include "maps.h"
#include "tasks.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T, class P>
SolveOptions<T> options(const P& p) {
  return {T(p.tol), p.max_iter, p.history, T(p.beta), T(p.lam)};
}

// The matrices of `blocks` blocks as their solves want them.
template <class T, int NV>
struct ForwardMatrices : Matrices<T, StraightForm<T, NV>> {
  template <class P>
  ForwardMatrices(const P& p, int64_t blocks, int64_t stride)
      : Matrices<T, StraightForm<T, NV>>(p.params, blocks, stride, p.d,
                                         uses(options<T>(p), p.z0 == nullptr, tiles<NV * kLanes<T>>(p.rows))) {}
  explicit ForwardMatrices(const CellProblem<T>& p) : ForwardMatrices(p, p.modalities, 10) {}
  explicit ForwardMatrices(const FuseProblem<T>& p) : ForwardMatrices(p, 1, 6) {}
};

// Rows in groups: which rows each has, one group after the other.
class RowGroups {
 public:
  // `group_of(k)`, in [0, groups), of k in [0, count); its row is number(k).
  template <class GroupOf, class Number>
  RowGroups(int64_t groups, int64_t count, GroupOf group_of, Number number) : begin_(groups + 1), rows_(count) {
    for (int64_t g = 0; g <= groups; ++g) begin_.get()[g] = 0;
    for (int64_t k = 0; k < count; ++k) ++begin_.get()[group_of(k) + 1];
    for (int64_t g = 0; g < groups; ++g) begin_.get()[g + 1] += begin_.get()[g];
    Scratch<int64_t> next(groups);
    std::memcpy(next.get(), begin_.get(), sizeof(int64_t) * groups);
    for (int64_t k = 0; k < count; ++k) rows_.get()[next.get()[group_of(k)]++] = number(k);
  }
  const int64_t* rows(int64_t g) const { return rows_.get() + begin_.get()[g]; }
  int64_t size(int64_t g) const { return begin_.get()[g + 1] - begin_.get()[g]; }

 private:
  const Scratch<int64_t> begin_, rows_;
};

// Runs body(group, rows of the group, begin, end) for all of them, in chunks of whole tiles of R rows.
template <int R, class Body>
void run_groups(const RowGroups& groups, int64_t count, int64_t wanted, int threads, ParallelFor parallel, Body body) {
  int64_t tasks = 0;
  for (int64_t g = 0; g < count; ++g) tasks += Chunks(groups.size(g), R, wanted).count;
  run_tasks(tasks, threads, parallel, [&](int64_t t) {
    int64_t g = 0;
    for (int64_t own; t >= (own = Chunks(groups.size(g), R, wanted).count); ++g) t -= own;
    const Chunks chunks(groups.size(g), R, wanted);
    const int64_t begin = t * chunks.rows;
    body(g, groups.rows(g), begin, chunks.end(begin));
  });
}

// What is said of rows that are not solved.
template <class T, class P>
void leave_out(const P& p, int64_t k, T value, Outcome outcome) {
  for (int64_t i = 0; i < p.d; ++i) p.z[k * p.d + i] = value;
  p.residual[k] = value;
  p.nfe[k] = 0;
  p.outcome[k] = int8_t(outcome);
}

// How the rows of a task lie: f(lanes).
template <class T, int NV, class F>
DEQFUSE_INLINE void with_lanes(int64_t d, int64_t rows, F f) {
  if constexpr (NV == 1 && kFewRows<T> > 0)
    if (rows <= kFewRows<T>) return f(FeaturesAsLanes<T>(d, int(rows)));
  f(RowsAsLanes<T, NV>(d));
}
// How a single row lies.
template <class T>
auto one_row(int64_t d) {
  if constexpr (kFewRows<T> > 0) return FeaturesAsLanes<T>(d, 1);
  else return RowsAsLanes<T, 1>(d);
}

template <class T, int NV, int NT>
auto matrix(const RowsAsLanes<T, NT>&, const ForwardMatrices<T, NV>& weights, int64_t block, int which) {
  return weights.at(block, which);
}
template <class T, int NV>
auto matrix(const FeaturesAsLanes<T>&, const ForwardMatrices<T, NV>& weights, int64_t block, int which) {
  return RowsMatrix<T>{weights.at(block, which), nullptr};
}

// Solves rows [begin, end) of a problem; map(memory) is their map.
template <class T, int NV, class Map, class P, class Lanes, class Make>
DEQFUSE_INLINE void solve_rows(const P& p, const Lanes& lanes, const RowResults<T>& out, int64_t begin, int64_t end,
                               Make make) {
  using Solver = RowSolver<T, NV, Map, Lanes>;
  const int64_t of_map = Map::tiles(p.d) * lanes.size();
  Scratch<T> memory(of_map + Solver::tiles(p.history) * lanes.size() + kSlack);
  Map map = make(memory.get());
  Solver(map, lanes, options<T>(p), out, memory.get() + of_map).run(begin, end);
}

// With `weights` in place.
template <class T, int NV>
void solve_cells(const CellProblem<T>& p, const ForwardMatrices<T, NV>& weights, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  Scratch<T> at_zero(p.modalities * d);
  auto cell = [&](auto lanes, int64_t i) {
    using Matrix = typename decltype(lanes)::Matrix;
    const T* const* q = p.params + 10 * i;
    const T* zero = at_zero.get() + i * d;
    return CellWeights<T, Matrix>{
        matrix(lanes, weights, i, 0), matrix(lanes, weights, i, 1), q[1], q[3], q[4], q[5], q[6], q[7], q[8], q[9], zero, p.skip};
  };
  if (p.z0 == nullptr)
    run_tasks(p.modalities, threads, parallel, [&](int64_t i) {
      const auto lanes = one_row<T>(d);
      Scratch<T> memory((2 + work_tiles<1>(d)) * lanes.size() + kSlack);
      cell_at_zero(cell(lanes, i), lanes, p.groups, memory.get(), at_zero.get() + i * d);
    });
  auto solve = [&](int64_t i, const int64_t* rows, int64_t begin, int64_t end) {
    const int64_t first = i * p.rows;
    const RowResults<T> out{p.z + first * d,     0,
                            p.residual + first,  p.nfe + first,
                            p.outcome + first,   p.trace ? p.trace + first : nullptr,
                            p.trace_stride,      rows};
    with_lanes<T, NV>(d, end - begin, [&](auto lanes) {
      using Map = CellMap<T, NV, decltype(lanes)>;
      solve_rows<T, NV, Map>(p, lanes, out, begin, end, [&](T* memory) {
        return Map(cell(lanes, i), p.x[i], p.z0 ? p.z0 + first * d : nullptr, lanes, p.groups, memory);
      });
    });
  };
  const int64_t wanted = (2 * threads + p.modalities - 1) / p.modalities;  // two tasks a thread even out
  if (p.present == nullptr) {
    const Chunks chunks(p.rows, R, wanted);
    run_tasks(p.modalities * chunks.count, threads, parallel, [&](int64_t t) {
      const int64_t begin = t % chunks.count * chunks.rows;
      solve(t / chunks.count, nullptr, begin, chunks.end(begin));
    });
    return;
  }
  const int64_t n = p.modalities, all = n * p.rows;
  for_rows(all, threads, parallel, [&](int64_t k) {
    if (!p.present[k]) leave_out(p, k, T(0), Outcome::kAbsent);
  });
  // The last group: what is absent.
  const RowGroups groups(
      n + 1, all, [&](int64_t k) { return p.present[k] ? k / p.rows : n; }, [&](int64_t k) { return k % p.rows; });
  run_groups<R>(groups, n, wanted, threads, parallel, solve);
}

template <class T, int NV>
void solve_fuse(const FuseProblem<T>& p, const FuseRows<T>& from, const ForwardMatrices<T, NV>& weights, int threads,
                ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  const T* const* q = p.params;
  auto solve = [&](int64_t modalities, const int64_t* rows, int64_t begin, int64_t end) {
    const RowResults<T> out{p.z, 0, p.residual, p.nfe, p.outcome, p.trace, p.trace_stride, rows};
    with_lanes<T, NV>(d, end - begin, [&](auto lanes) {
      using Map = FuseMap<T, NV, decltype(lanes)>;
      const typename Map::Weights fuse{
          matrix(lanes, weights, 0, 0), matrix(lanes, weights, 0, 1), q[1], q[3], q[4], q[5], T(modalities), p.relu_last};
      solve_rows<T, NV, Map>(p, lanes, out, begin, end,
                             [&](T* memory) { return Map(fuse, from, p.mask, p.z0, lanes, p.groups, memory); });
    });
    if (p.copy == nullptr) return;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t at = (rows ? rows[k] : k) * d;
      std::memcpy(p.copy + at, p.z + at, sizeof(T) * d);
    }
  };
  if (from.present == nullptr) {
    const Chunks chunks(p.rows, R, 2 * threads);
    run_tasks(chunks.count, threads, parallel, [&](int64_t t) {
      const int64_t begin = t * chunks.rows;
      solve(p.modalities, nullptr, begin, chunks.end(begin));
    });
    return;
  }
  // Rows with the same number of modalities make a group.
  const RowGroups groups(
      p.modalities + 1, p.rows,
      [&](int64_t r) {
        int64_t count = 0;
        for (int64_t i = 0; i < p.modalities; ++i) count += from.present[i * p.rows + r];
        return count;
      },
      [](int64_t r) { return r; });
  for (int64_t k = 0; k < groups.size(0); ++k) {
    const int64_t r = groups.rows(0)[k];
    leave_out(p, r, std::numeric_limits<T>::quiet_NaN(), Outcome::kEmpty);
    if (p.copy) std::memcpy(p.copy + r * d, p.z + r * d, sizeof(T) * d);
  }
  run_groups<R>(groups, p.modalities + 1, 2 * threads, threads, parallel,
                [&](int64_t n, const int64_t* rows, int64_t begin, int64_t end) {
                  if (n > 0) solve(n, rows, begin, end);
                });
}

template <class T, int NV>
void solve_cells(const CellProblem<T>& p, int threads, ParallelFor parallel) {
  const ForwardMatrices<T, NV> weights(p);
  copy_all(threads, parallel, weights);
  solve_cells<T, NV>(p, weights, threads, parallel);
}

template <class T, int NV>
void solve_fuse(const FuseProblem<T>& p, int threads, ParallelFor parallel) {
  const ForwardMatrices<T, NV> weights(p);
  copy_all(threads, parallel, weights);
  solve_fuse<T, NV>(p, {p.x, p.cell_sum}, weights, threads, parallel);
}

// What the fuse step of a layer is made of: the cells' inputs and their equilibria.
template <class T, class P>
FuseRows<T> rows_of_layer(const P& p) {
  return {nullptr, nullptr, p.cells.modalities, p.rows, p.cells.x, p.cells.z, p.weights, p.bias};
}

template <class T, int NV>
void solve_layer(const LayerProblem<T>& p, int threads, ParallelFor parallel) {
  const ForwardMatrices<T, NV> cells(p.cells), fuse(p.fuse);
  copy_all(threads, parallel, cells, fuse);
  solve_cells<T, NV>(p.cells, cells, threads, parallel);
  FuseRows<T> from = rows_of_layer<T>(p);
  from.present = p.cells.present;
  solve_fuse<T, NV>(p.fuse, from, fuse, threads, parallel);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
