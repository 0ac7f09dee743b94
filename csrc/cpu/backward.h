// Backward: the adjoint problems of kernels.h, a tile of rows per task; then the parameters' gradients over all rows.
#pragma once

#include "adjoint.h"
#include "solve.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// u for the rows of one tile, one after the other, which `map` linearises on the way. Whether they are what it was given
// last to evaluate.
template <class T, int NV, class Map, class P>
bool solve_tile(const P& p, Map& map, int64_t begin, int64_t end, const RowResults<T>& out, T* memory) {
  constexpr int R = NV * kLanes<T>;
  const int64_t d = p.d;
  if (p.mode < 0) return RowSolver<T, NV, Map>(map, d, options<T>(p), out, memory).run(begin, end);
  T *now = memory, *next = memory + d * R;
  const LaneRows<R> rows = lane_rows<R>(begin, int(end - begin));
  map.stage(rows, now, true);
  for (int k = 0; k < p.mode; ++k) {
    map.template evaluate<Digits::kAll>(now, next, false);
    std::swap(now, next);
  }
  lanes_to_rows<T, NV>(now, nullptr, lane_rows<R>(0, int(end - begin)), out.z, d);
  for (int64_t r = begin; r < end; ++r) {
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

  template <class P>
  AdjointMemory(const P& p, int64_t blocks, int params, int sums)
      : tiles(DEQFUSE_ISA::tiles<R>(p.rows)), straight(p.params, blocks, params, p.d, linearising(p)),
        transposed(p.params, blocks, params, p.d, solving(p)), d_(p.d), rows_(p.rows), blocks_(blocks),
        params_(params), kinds_(sums), out_(p.dparams),
        factors_(out_ ? 2 * blocks * (a_size() + b_size()) : 0), sums_(out_ ? blocks * tiles * sums * p.d : 0) {}

  template <class P>
  static int64_t bytes(const P& p, int64_t blocks) {
    const StraightForm<T, NV> straight(p.d, linearising(p));
    const TransposedForm<T, NV> transposed(p.d, solving(p));
    const int64_t copies = straight.size() + transposed.size();
    const int64_t factors = Cotangents<T, NV>::size(p.rows, p.d) + Inputs<T, NV>::size(p.rows, p.d);
    return 2 * blocks * int64_t(sizeof(T)) * (copies + (p.dparams ? factors : 0));
  }

  const int64_t tiles;
  const Matrices<T, StraightForm<T, NV>> straight;
  const Matrices<T, TransposedForm<T, NV>> transposed;

  GradientParts<T, NV> parts(int64_t block, int64_t tile) const {
    GradientParts<T, NV> out;
    for (int which = 0; which < 2; ++which) {
      T* p = factors_.get() + (2 * block + which) * (a_size() + b_size());
      out.cotangent[which] = {p, rows_, d_};
      out.input[which] = {p + a_size(), rows_, d_};
    }
    out.sums = sums_.get() + (block * tiles + tile) * kinds_ * d_;
    return out;
  }

  // dW = cotangent^T input over all rows, and the vectors' sums over the tiles, in order. The first bias of the fuse
  // step enters `first_bias` times.
  void parameter_gradients(T first_bias, int threads, ParallelFor parallel) const {
    if (out_ == nullptr) return;
    constexpr int64_t kWidth = kGradientColumns<T, NV>;
    const int64_t columns = (d_ + kWidth - 1) / kWidth, jobs = 2 * columns + 1;
    run_tasks(blocks_ * jobs, threads, parallel, [&](int64_t t) {
      const int64_t block = t / jobs, job = t % jobs;
      const GradientParts<T, NV> part = parts(block, 0);
      T* const* out = out_ + block * params_;
      if (job < 2 * columns) {
        const int which = int(job / columns);
        outer_product(part.cotangent[which], part.input[which], job % columns * kWidth, out[2 * which]);
        return;
      }
      for (int kind = 0; kind < kinds_; ++kind) {
        T* sum = out[kind < 2 ? 2 * kind + 1 : kind + 2];
        for (int64_t i = 0; i < d_; ++i) sum[i] = 0;
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int64_t i = 0; i < d_; ++i) sum[i] += part.sums[(tile * kinds_ + kind) * d_ + i];
        if (kind == 0)
          for (int64_t i = 0; i < d_; ++i) sum[i] *= first_bias;
      }
    });
  }

 private:
  template <class P>
  static Uses linearising(const P& p) {
    return {DEQFUSE_ISA::tiles<R>(p.rows), 0};
  }
  template <class P>
  static Uses solving(const P& p) {
    const int64_t count = DEQFUSE_ISA::tiles<R>(p.rows);
    return p.mode < 0 ? uses(options<T>(p), true, count) : Uses{(int64_t(p.mode) + 1) * count, 0};
  }

  int64_t a_size() const { return Cotangents<T, NV>::size(rows_, d_); }
  int64_t b_size() const { return Inputs<T, NV>::size(rows_, d_); }

  const int64_t d_, rows_, blocks_;
  const int params_, kinds_;
  T* const* out_;
  Scratch<T> factors_, sums_;
};

// Some modalities at once. after(i, begin, end): what is left to do for these rows of modality i once dx is there.
template <class T, int NV, class After>
void adjoint_some_cells(const CellAdjointProblem<T>& p, int threads, ParallelFor parallel, After after) {
  constexpr int R = NV * kLanes<T>;
  using Map = CellAdjoint<T, NV>;
  const int64_t d = p.d;
  const AdjointMemory<T, NV> shared(p, p.modalities, 10, Map::kSums);
  copy_all(threads, parallel, shared.straight, shared.transposed);
  run_tasks(p.modalities * shared.tiles, threads, parallel, [&](int64_t t) {
    const int64_t i = t / shared.tiles, begin = t % shared.tiles * R, first = i * p.rows;
    const int64_t end = begin + R < p.rows ? begin + R : p.rows, map_tiles = Map::tiles(d, p.groups);
    const T* const* q = p.params + 10 * i;
    const CellAdjointWeights<T, NV> w{{shared.straight.at(i, 0), shared.straight.at(i, 1), q[1], q[3], q[4], q[5], q[6],
                                       q[7], q[8], q[9], nullptr, p.skip},
                                      shared.transposed.at(i, 0), shared.transposed.at(i, 1)};
    Scratch<T> memory((1 + map_tiles + RowSolver<T, NV, Map>::tiles(p.history)) * d * R);
    T *u = memory.get(), *of_map = u + d * R;
    Map map(w, p.z + first * d, p.x[i], p.g[i], d, p.groups, of_map);
    const RowResults<T> out{u, begin, p.residual + first, p.nfe + first, p.outcome + first, nullptr, 0};
    const bool evaluated = solve_tile<T, NV>(p, map, begin, end, out, of_map + map_tiles * d * R);
    GradientParts<T, NV> parts;
    if (p.dparams) parts = shared.parts(i, t % shared.tiles);
    map.finish(u, evaluated, lane_rows<R>(begin, int(end - begin)), p.dx[i], p.dparams ? &parts : nullptr);
    after(i, begin, end);
  });
  shared.parameter_gradients(T(1), threads, parallel);
}

// All modalities: as many at once as need 16 MB for their weights and the factors of their gradients, or one.
template <class T, int NV, class After>
void adjoint_cells(const CellAdjointProblem<T>& p, int threads, ParallelFor parallel, After after) {
  const int64_t n = p.modalities, size = p.rows * p.d;
  const int64_t bytes = AdjointMemory<T, NV>::bytes(p, 1), limit = int64_t(16) << 20;
  const int64_t most = bytes > 0 && limit / bytes < n ? (limit > bytes ? limit / bytes : 1) : n;
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
    adjoint_some_cells<T, NV>(part, threads, parallel,
                              [&](int64_t i, int64_t begin, int64_t end) { after(first + i, begin, end); });
  }
}

template <class T, int NV>
void adjoint_cells(const CellAdjointProblem<T>& p, int threads, ParallelFor parallel) {
  adjoint_cells<T, NV>(p, threads, parallel, [](int64_t, int64_t, int64_t) {});
}

template <class T, int NV>
void adjoint_fuse(const FuseAdjointProblem<T>& p, const FuseRows<T>& from, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  using Map = FuseAdjoint<T, NV>;
  const int64_t d = p.d;
  const AdjointMemory<T, NV> shared(p, 1, 6, Map::kSums);
  copy_all(threads, parallel, shared.straight, shared.transposed);
  const T* const* q = p.params;
  const FuseAdjointWeights<T, NV> w{{shared.straight.at(0, 0), shared.straight.at(0, 1), q[1], q[3], q[4], q[5],
                                     T(p.modalities), p.relu_last},
                                    shared.transposed.at(0, 0), shared.transposed.at(0, 1)};
  run_tasks(shared.tiles, threads, parallel, [&](int64_t t) {
    const int64_t begin = t * R, end = begin + R < p.rows ? begin + R : p.rows, map_tiles = Map::tiles(d, p.groups);
    Scratch<T> memory((1 + map_tiles + RowSolver<T, NV, Map>::tiles(p.history)) * d * R);
    T *u = memory.get(), *of_map = u + d * R;
    Map map(w, p.z, from, p.mask, p.g, d, p.groups, of_map);
    const RowResults<T> out{u, begin, p.residual, p.nfe, p.outcome, nullptr, 0};
    const bool evaluated = solve_tile<T, NV>(p, map, begin, end, out, of_map + map_tiles * d * R);
    GradientParts<T, NV> parts;
    if (p.dparams) parts = shared.parts(0, t);
    map.finish(u, evaluated, lane_rows<R>(begin, int(end - begin)), p.dx, p.dcell_sum, p.dparams ? &parts : nullptr);
  });
  shared.parameter_gradients(T(p.modalities), threads, parallel);
}

template <class T, int NV>
void adjoint_fuse(const FuseAdjointProblem<T>& p, int threads, ParallelFor parallel) {
  adjoint_fuse<T, NV>(p, {p.x, p.cell_sum}, threads, parallel);
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
  adjoint_fuse<T, NV>(f, rows_of_layer<T>(p), threads, parallel);

  for (int64_t i = 0; i < n; ++i) g.get()[i] = p.g_cells ? g_cells.get() + i * size : dcell_sum.get();
  if (p.g_cells)
    for_rows(n * rows, threads, parallel, [&](int64_t r) {
      for (int64_t k = 0; k < d; ++k)
        g_cells.get()[r * d + k] = p.g_cells[r * d + k] + dcell_sum.get()[r % rows * d + k];
    });
  c.g = g.get();
  // x_i also reaches the fuse step, through its injection. `terms`: per row those of dweights, and of dbias.
  Scratch<T> terms(p.dweights ? rows * (n + 1) : 0);
  adjoint_cells<T, NV>(c, threads, parallel, [&](int64_t i, int64_t begin, int64_t end) {
    const T weight = p.weights[i];
    for (int64_t r = begin; r < end; ++r) {
      const T* __restrict from = dx_fuse.get() + r * d;
      T* __restrict to = c.dx[i] + r * d;
      for (int64_t k = 0; k < d; ++k) to[k] += weight * from[k];
      if (p.dweights) terms.get()[r * (n + 1) + i] = dot(c.x[i] + r * d, from, d);
      if (p.dbias == nullptr || i > 0) continue;
      T& sum = terms.get()[r * (n + 1) + n] = T(0);
      for (int64_t k = 0; k < d; ++k) sum += from[k];
    }
  });
  for (int64_t i = 0; i <= n; ++i) {
    T* out = i < n && p.dweights ? p.dweights + i : i == n ? p.dbias : nullptr;
    if (out == nullptr) continue;
    *out = T(0);
    for (int64_t r = 0; r < rows; ++r) *out += terms.get()[r * (n + 1) + i];
  }
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
