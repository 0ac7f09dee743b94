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

template <class T, int NV>
void solve_cells(const CellProblem<T>& p, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  Scratch<T> at_zero(p.modalities * d);
  auto cell = [&](int64_t i) {
    const T* const* q = p.params + 10 * i;
    const T* zero = at_zero.get() + i * d;
    return CellWeights<T>{{q[0]}, {q[2]}, q[1], q[3], q[4], q[5], q[6], q[7], q[8], q[9], zero, p.skip};
  };
  if (p.z0 == nullptr)
    run_tasks(p.modalities, threads, parallel, [&](int64_t i) {
      Scratch<T> memory(2 * d * kLanes<T>);
      cell_at_zero(cell(i), d, p.groups, memory.get(), at_zero.get() + i * d);
    });
  const Chunks chunks(p.rows, R, (2 * threads + p.modalities - 1) / p.modalities);  // two tasks a thread even out
  run_tasks(p.modalities * chunks.count, threads, parallel, [&](int64_t t) {
    const int64_t i = t / chunks.count, begin = t % chunks.count * chunks.rows, first = i * p.rows;
    using Map = CellMap<T, NV>;
    using Solver = RowSolver<T, NV, Map>;
    Scratch<T> memory((Map::tiles() + Solver::tiles(p.history)) * d * R);
    Map map(cell(i), p.x[i], p.z0 ? p.z0 + first * d : nullptr, d, p.groups, memory.get());
    RowResults<T> out{p.z + first * d, p.residual + first, p.nfe + first, p.outcome + first,
                      p.trace ? p.trace + first : nullptr, p.trace_stride};
    Solver(map, d, options<T>(p), out, memory.get() + Map::tiles() * d * R).run(begin, chunks.end(begin));
  });
}

template <class T, int NV>
void solve_fuse(const FuseProblem<T>& p, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  const T* const* q = p.params;
  const FuseWeights<T> fuse{{q[0]}, {q[2]}, q[1], q[3], q[4], q[5], T(p.modalities), p.relu_last};
  const Chunks chunks(p.rows, R, 2 * threads);
  run_tasks(chunks.count, threads, parallel, [&](int64_t t) {
    const int64_t begin = t * chunks.rows;
    using Map = FuseMap<T, NV>;
    using Solver = RowSolver<T, NV, Map>;
    Scratch<T> memory((Map::tiles() + Solver::tiles(p.history)) * d * R);
    Map map(fuse, p.x, p.cell_sum, p.mask, p.z0, d, p.groups, memory.get());
    RowResults<T> out{p.z, p.residual, p.nfe, p.outcome, p.trace, p.trace_stride};
    Solver(map, d, options<T>(p), out, memory.get() + Map::tiles() * d * R).run(begin, chunks.end(begin));
  });
}

// The fuse step's injection sum_i w_i x_i + bias, and what its gate sees of the cells, sum_i z_i: row-major (rows, d).
template <class T>
class FuseInputs {
 public:
  FuseInputs(int64_t rows, int64_t d) : x(rows * d), cell_sum(rows * d) {}

  void fill(int64_t modalities, int64_t rows, int64_t d, const T* const* x_cells, const T* z, const T* weights,
            const T* bias, int threads, ParallelFor parallel) const {
    const T offset = bias ? *bias : T(0);
    for_rows(rows, threads, parallel, [&](int64_t r) {
      T *__restrict to = x.get() + r * d, *__restrict sum = cell_sum.get() + r * d;
      for (int64_t k = 0; k < d; ++k) to[k] = sum[k] = T(0);
      for (int64_t i = 0; i < modalities; ++i) {
        const T *from = x_cells[i] + r * d, *cell = z + (i * rows + r) * d, w = weights[i];
        for (int64_t k = 0; k < d; ++k) {
          to[k] += w * from[k];
          sum[k] += cell[k];
        }
      }
      for (int64_t k = 0; k < d; ++k) to[k] += offset;
    });
  }

  const Scratch<T> x, cell_sum;
};

template <class T, int NV>
void solve_layer(const LayerProblem<T>& p, int threads, ParallelFor parallel) {
  const CellProblem<T>& c = p.cells;
  solve_cells<T, NV>(c, threads, parallel);
  const FuseInputs<T> inputs(c.rows, c.d);
  inputs.fill(c.modalities, c.rows, c.d, c.x, c.z, p.weights, p.bias, threads, parallel);
  FuseProblem<T> fuse = p.fuse;
  fuse.x = inputs.x.get();
  fuse.cell_sum = inputs.cell_sum.get();
  solve_fuse<T, NV>(fuse, threads, parallel);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
