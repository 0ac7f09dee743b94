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

// With `weights` in place.
template <class T, int NV>
void solve_cells(const CellProblem<T>& p, const ForwardMatrices<T, NV>& weights, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  Scratch<T> at_zero(p.modalities * d);
  using Matrix = typename StraightForm<T, NV>::Matrix;
  auto cell = [&](int64_t i) {
    const T* const* q = p.params + 10 * i;
    const T* zero = at_zero.get() + i * d;
    return CellWeights<T, Matrix>{weights.at(i, 0), weights.at(i, 1), q[1], q[3], q[4], q[5], q[6], q[7], q[8], q[9], zero, p.skip};
  };
  if (p.z0 == nullptr)
    run_tasks(p.modalities, threads, parallel, [&](int64_t i) {
      Scratch<T> memory((2 + work_tiles<1>(d)) * d * kLanes<T>);
      cell_at_zero(cell(i), d, p.groups, memory.get(), at_zero.get() + i * d);
    });
  const Chunks chunks(p.rows, R, (2 * threads + p.modalities - 1) / p.modalities);  // two tasks a thread even out
  run_tasks(p.modalities * chunks.count, threads, parallel, [&](int64_t t) {
    const int64_t i = t / chunks.count, begin = t % chunks.count * chunks.rows, first = i * p.rows;
    using Map = CellMap<T, NV>;
    using Solver = RowSolver<T, NV, Map>;
    Scratch<T> memory((Map::tiles(d) + Solver::tiles(p.history)) * d * R);
    Map map(cell(i), p.x[i], p.z0 ? p.z0 + first * d : nullptr, d, p.groups, memory.get());
    RowResults<T> out{p.z + first * d,     0,
                      p.residual + first,  p.nfe + first,
                      p.outcome + first,   p.trace ? p.trace + first : nullptr,
                      p.trace_stride};
    Solver(map, d, options<T>(p), out, memory.get() + Map::tiles(d) * d * R).run(begin, chunks.end(begin));
  });
}

template <class T, int NV>
void solve_fuse(const FuseProblem<T>& p, const FuseRows<T>& from, const ForwardMatrices<T, NV>& weights, int threads,
                ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  const T* const* q = p.params;
  const FuseWeights<T, typename StraightForm<T, NV>::Matrix> fuse{weights.at(0, 0), weights.at(0, 1), q[1], q[3], q[4], q[5], T(p.modalities), p.relu_last};
  const Chunks chunks(p.rows, R, 2 * threads);
  run_tasks(chunks.count, threads, parallel, [&](int64_t t) {
    const int64_t begin = t * chunks.rows;
    using Map = FuseMap<T, NV>;
    using Solver = RowSolver<T, NV, Map>;
    Scratch<T> memory((Map::tiles(d) + Solver::tiles(p.history)) * d * R);
    Map map(fuse, from, p.mask, p.z0, d, p.groups, memory.get());
    RowResults<T> out{p.z, 0, p.residual, p.nfe, p.outcome, p.trace, p.trace_stride};
    const int64_t end = chunks.end(begin);
    Solver(map, d, options<T>(p), out, memory.get() + Map::tiles(d) * d * R).run(begin, end);
    if (p.copy) std::memcpy(p.copy + begin * d, p.z + begin * d, sizeof(T) * (end - begin) * d);
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
  solve_fuse<T, NV>(p.fuse, rows_of_layer<T>(p), fuse, threads, parallel);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
