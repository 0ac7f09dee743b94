// Backward: the adjoint problems of kernels.h, a tile of rows per task; then the parameters' gradients over all rows.
#pragma once

#include "adjoint.h"
#include "dense_adjoint.h"
#include "solve.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// u for the rows of one tile, which are also `out.rows`, one after the other; `map` linearises them on the way. Whether
// they are what it was given last to evaluate. `z`, `g`: of the block; `jacobian`: as solve_left() wants it.
template <class T, int NV, class Map, class P, class MakeJacobian>
bool solve_tile(const P& p, Map& map, const LaneRows<NV * kLanes<T>>& rows, const RowResults<T>& out, T* memory,
                const T* z, const T* g, MakeJacobian jacobian) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  const int count = rows.count();
  if (p.mode < 0) {
    const bool evaluated = RowSolver<T, NV, Map>(map, d, options<T>(p), out, memory).run(0, count);
    const auto magnitude = [&](int lane) { return map.magnitude(lane); };
    return !(p.mode == kSolveLeft && solve_left(z, g, d, p.groups, T(p.tol), count, out, magnitude, jacobian)) &&
           evaluated;
  }
  T *now = memory, *next = memory + d * R;
  map.stage(rows, now, true);
  for (int k = 0; k < p.mode; ++k) {
    map.template evaluate<Digits::kAll>(now, next, false);
    std::swap(now, next);
  }
  lanes_to_rows<T, NV>(now, nullptr, lane_rows<R>(0, count), out.z, d);
  for (int lane = 0; lane < count; ++lane) {
    const int64_t r = rows.row[lane];
    out.residual[r] = std::numeric_limits<T>::quiet_NaN();
    out.nfe[r] = p.mode;
    out.outcome[r] = int8_t(Outcome::kMaxIter);
  }
  return false;
}

// What the adjoint of `blocks` blocks (cells, or the fuse step) of two matrices each needs beside its tiles: the weights
// and their transposes, and the parts of the parameters' gradients.
template <class T, int NV>
class AdjointMemory {
 public:
  static constexpr int R = NV * kLanes<T>;

  // `rows` has those of the blocks from number `first` on.
  template <class P>
  AdjointMemory(const P& p, const PresentRows& rows, int64_t first, int64_t blocks, int params, int sums)
      : straight(p.params, blocks, params, p.d, linearising(p)),
        transposed(p.params, blocks, params, p.d, solving(p)), rows_(rows), first_(first), blocks_(blocks),
        params_(params), kinds_(sums), out_(p.dparams),
        gradients_(out_ ? blocks : 0, p.rows, tiles<R>(p.rows), sums, p.d) {}

  template <class P>
  static int64_t bytes(const P& p) {
    const StraightForm<T, NV> straight(p.d, linearising(p));
    const TransposedForm<T, NV> transposed(p.d, solving(p));
    const int64_t copies = straight.size() + transposed.size();
    return 2 * int64_t(sizeof(T)) * copies + (p.dparams ? GradientMemory<T, NV>::bytes(p.rows, p.d) : 0);
  }

  const Matrices<T, StraightForm<T, NV>> straight;
  const Matrices<T, TransposedForm<T, NV>> transposed;

  GradientParts<T, NV> parts(int64_t block, int64_t tile) const {
    return gradients_.parts(block, rows_.size(first_ + block), tile);
  }

  void parameter_gradients(int threads, ParallelFor parallel) const {
    if (out_ == nullptr) return;
    run_tasks(blocks_ * gradients_.jobs(), threads, parallel, [&](int64_t t) {
      const int64_t block = t / gradients_.jobs(), rows = rows_.size(first_ + block);
      gradients_.run(block, rows, tiles<R>(rows), t % gradients_.jobs(), kinds_, out_ + block * params_, true);
    });
  }

 private:
  template <class P>
  static Uses linearising(const P& p) {
    return {tiles<R>(p.rows), 0};
  }
  template <class P>
  static Uses solving(const P& p) {
    const int64_t count = tiles<R>(p.rows);
    return p.mode < 0 ? uses(options<T>(p), true, count) : Uses{(int64_t(p.mode) + 1) * count, 0};
  }

  const PresentRows& rows_;
  const int64_t first_, blocks_;
  const int params_, kinds_;
  T* const* out_;
  const GradientMemory<T, NV> gradients_;
};

// Some modalities at once, from number `first` of `present` on. after(i, r): what is left to do for row r of modality i
// once dx is there.
template <class T, int NV, class After>
void adjoint_some_cells(const CellAdjointProblem<T>& p, const PresentRows& present, int64_t first, int threads,
                        ParallelFor parallel, After after) {
  constexpr int R = NV * kLanes<T>;
  using Map = CellAdjoint<T, NV>;
  const int64_t d = p.d;
  const AdjointMemory<T, NV> shared(p, present, first, p.modalities, 10, Map::kSums);
  copy_all(threads, parallel, shared.straight, shared.transposed);
  const auto one_tile = [&](int64_t i, int64_t tile, const LaneRows<R>& rows) {
    const int64_t at = i * p.rows, map_tiles = Map::tiles(d, p.groups);
    const CellLinearWeights<T, NV> w(shared.straight, shared.transposed, i, p.params + 10 * i, p.skip);
    Scratch<T> memory((1 + map_tiles + RowSolver<T, NV, Map>::tiles(p.history)) * d * R);
    T *u = memory.get(), *of_map = u + d * R;
    Map map(w, p.z + at * d, p.x[i], p.g[i], d, p.groups, of_map);
    const RowResults<T> out{u, p.residual + at, p.nfe + at, p.outcome + at, nullptr, 0, rows.row, true};
    const auto jacobian = [&](int64_t r, Arena<double>& doubles, int32_t* indices) {
      return CellJacobian<double, T>(p.params + 10 * i, p.x[i] + r * d, p.skip, d, p.groups, doubles, indices);
    };
    const bool evaluated =
        solve_tile<T, NV>(p, map, rows, out, of_map + map_tiles * d * R, p.z + at * d, p.g[i], jacobian);
    GradientParts<T, NV> parts;
    if (p.dparams) parts = shared.parts(i, tile);
    const int count = rows.count();
    map.finish(u, evaluated, rows, p.dx[i], p.dparams ? &parts : nullptr, lane_rows<R>(tile * R, count));
    for (int lane = 0; lane < count; ++lane) after(i, rows.row[lane]);
  };
  run_tiles<R>(present, first, p.modalities, 0, p.rows, threads, parallel, one_tile);
  shared.parameter_gradients(threads, parallel);
}

// All modalities.
template <class T, int NV, class After>
void adjoint_cells(const CellAdjointProblem<T>& p, const PresentRows& present, int threads, ParallelFor parallel,
                   After after) {
  const int64_t n = p.modalities, size = p.rows * p.d, most = blocks_at_once(n, AdjointMemory<T, NV>::bytes(p));
  for (int64_t first = 0; first < n; first += most) {
    CellAdjointProblem<T> part = p;
    part.modalities = n - first < most ? n - first : most;
    part.z += first * size;
    part.params += 10 * first;
    part.dparams += p.dparams ? 10 * first : 0;
    part.residual += first * p.rows;
    part.nfe += first * p.rows;
    part.outcome += first * p.rows;
    part.x += first;
    part.g += first;
    part.dx += first;
    adjoint_some_cells<T, NV>(part, present, first, threads, parallel,
                              [&](int64_t i, int64_t r) { after(first + i, r); });
  }
}

template <class T, int NV>
void adjoint_cells(const CellAdjointProblem<T>& p, int threads, ParallelFor parallel) {
  const PresentRows all(nullptr, p.modalities, p.rows);
  adjoint_cells<T, NV>(p, all, threads, parallel, [](int64_t, int64_t) {});
}

template <class T, int NV>
void adjoint_fuse(const FuseAdjointProblem<T>& p, const FuseRows<T>& from, const PresentRows& present, int threads,
                  ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  using Map = FuseAdjoint<T, NV>;
  const int64_t d = p.d;
  const AdjointMemory<T, NV> shared(p, present, p.modalities, 1, 6, Map::kSums);
  copy_all(threads, parallel, shared.straight, shared.transposed);
  const FuseLinearWeights<T, NV> w(shared.straight, shared.transposed, 0, p.params, p.relu_last);
  const auto one_tile = [&](int64_t, int64_t tile, const LaneRows<R>& rows) {
    const int64_t map_tiles = Map::tiles(d, p.groups), all = 1 + map_tiles + RowSolver<T, NV, Map>::tiles(p.history);
    Scratch<T> memory(all * d * R + 2 * d);
    T *u = memory.get(), *of_map = u + d * R, *made = u + all * d * R;
    Map map(w, p.z, from, p.mask, p.g, d, p.groups, of_map);
    const RowResults<T> out{u, p.residual, p.nfe, p.outcome, nullptr, 0, rows.row, true};
    const auto jacobian = [&](int64_t r, Arena<double>& doubles, int32_t* indices) {
      const FuseInputs<T> in{from.x_row(r, d, made), from.cell_sum_row(r, d, made + d), p.mask ? p.mask + r * d : nullptr,
                             from.count(r), p.relu_last};
      return FuseJacobian<double, T>(p.params, in, d, p.groups, doubles, indices);
    };
    const bool evaluated = solve_tile<T, NV>(p, map, rows, out, of_map + map_tiles * d * R, p.z, p.g, jacobian);
    GradientParts<T, NV> parts;
    if (p.dparams) parts = shared.parts(0, tile);
    map.finish(u, evaluated, rows, p.dx, p.dcell_sum, p.dparams ? &parts : nullptr,
               lane_rows<R>(tile * R, rows.count()));
  };
  run_tiles<R>(present, p.modalities, 1, 0, p.rows, threads, parallel, one_tile);
  shared.parameter_gradients(threads, parallel);
}

template <class T, int NV>
void adjoint_fuse(const FuseAdjointProblem<T>& p, int threads, ParallelFor parallel) {
  const PresentRows all(nullptr, p.modalities, p.rows);
  adjoint_fuse<T, NV>(p, {p.x, p.cell_sum, p.modalities}, all, threads, parallel);
}

template <class T, int NV>
void adjoint_layer(const LayerAdjointProblem<T>& p, int threads, ParallelFor parallel) {
  CellAdjointProblem<T> c = p.cells;
  FuseAdjointProblem<T> f = p.fuse;
  const int64_t n = c.modalities, rows = c.rows, d = c.d, size = rows * d;
  Scratch<T> dx_fuse(size), dcell_sum(size), g_cells(p.g_cells ? n * size : 0);
  Scratch<const T*> g(n);
  f.dx = dx_fuse.get();
  f.dcell_sum = dcell_sum.get();
  const PresentRows present(c.present, n, rows);
  present.for_absent(threads, parallel, [&](int64_t i, int64_t r) {
    const AdjointCommon<T>& block = i < n ? static_cast<const AdjointCommon<T>&>(c) : f;
    const int64_t k = i < n ? i * rows + r : r;
    block.residual[k] = T(0);
    block.nfe[k] = 0;
    block.outcome[k] = int8_t(Outcome::kConverged);
    if (i < n) std::memset(c.dx[i] + r * d, 0, sizeof(T) * d);
  });
  adjoint_fuse<T, NV>(f, rows_of_layer<T>(p), present, threads, parallel);

  for (int64_t i = 0; i < n; ++i) g.get()[i] = p.g_cells ? g_cells.get() + i * size : dcell_sum.get();
  if (p.g_cells)
    for_rows(n * rows, threads, parallel, [&](int64_t r) {
      if (!present.has(r / rows, r % rows)) return;
      for (int64_t k = 0; k < d; ++k)
        g_cells.get()[r * d + k] = p.g_cells[r * d + k] + dcell_sum.get()[r % rows * d + k];
    });
  c.g = g.get();
  // x_i also reaches the fuse step, through its injection.
  const InjectionGradients<T> injection(n, present, d, p.weights, p.dweights, p.dbias);
  adjoint_cells<T, NV>(c, present, threads, parallel,
                       [&](int64_t i, int64_t r) { injection.add(i, r, dx_fuse.get(), c.x[i], c.dx[i]); });
  injection.finish();
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
