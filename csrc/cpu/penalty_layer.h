// The Jacobian penalty of the whole layer: its blocks are independent, each cut into tiles of rows; then the parameters'
// gradients over all rows.
#pragma once

#include "penalty.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Some of the blocks, of which the fuse step is the last, at once. `more` further tasks come after the rows'.
template <class T, int NV, class After>
void penalty_some_blocks(const PenaltyProblem<T>& p, int64_t first, int64_t count, T* dx_fuse, int64_t more, int threads,
                         ParallelFor parallel, After after) {
  constexpr int R = NV * kLanes<T>;
  using Cell = CellPenalty<T, NV>;
  using Fuse = FusePenalty<T, NV>;
  const int64_t n = p.modalities, d = p.d, size = p.rows * d, tiles_of_rows = tiles<R>(p.rows);
  const T* const* params = p.params + 10 * first;
  const Uses each{(p.probes + 1) * tiles_of_rows, 0};
  const Matrices<T, StraightForm<T, NV>> straight(params, count, 10, d, each);
  const Matrices<T, TransposedForm<T, NV>> transposed(params, count, 10, d, each);
  const int64_t factor_rows = tiles_of_rows * (p.probes + 1) * R;
  const GradientMemory<T, NV> gradients(p.dparams ? count : 0, factor_rows, tiles_of_rows, Cell::kSums, d);
  copy_all(threads, parallel, straight, transposed);
  run_tasks(count * tiles_of_rows, threads, parallel, [&](int64_t t) {
    const int64_t block = t / tiles_of_rows, tile = t % tiles_of_rows, i = first + block, begin = tile * R;
    const LaneRows<R> rows = lane_rows<R>(begin, int(p.rows - begin < R ? p.rows - begin : R));
    const T *z = p.states + i * size, *const *q = params + 10 * block;
    const Probes<T> probes{p.noise + i * size, p.probes, (n + 1) * size};
    T* value = p.value + i * p.rows;
    GradientParts<T, NV> parts, *wanted = p.dparams ? &parts : nullptr;
    if (wanted) parts = gradients.parts(block, tile);
    if (i < n) {
      Scratch<T> memory(Cell::tiles(d, p.groups) * d * R);
      Cell cell({straight, transposed, block, q, p.skip}, d, p.groups, memory.get());
      cell.run(z, p.x[i], probes, rows, value, p.dx[i], wanted, tile * (p.probes + 1));
    } else {
      Scratch<T> memory(Fuse::tiles(d, p.groups) * d * R);
      Fuse fuse({straight, transposed, block, q, n, p.relu_last}, p.mask != nullptr, d, p.groups, memory.get());
      const FuseRows<T> from{nullptr, nullptr, n, p.rows, p.x, p.states, p.weights, p.bias};
      fuse.run(z, from, p.mask, probes, rows, value, dx_fuse, wanted, tile * (p.probes + 1));
    }
  });
  const int64_t jobs = p.dparams ? gradients.jobs() : 0;
  run_tasks(count * jobs + more, threads, parallel, [&](int64_t t) {
    if (t >= count * jobs) return after(t - count * jobs);
    const int64_t block = t / jobs, i = first + block;
    gradients.run(block, t % jobs, i < n ? Cell::kSums : Fuse::kSums, T(i < n ? 1 : n), p.dparams + 10 * i);
  });
}

template <class T, int NV>
void penalty_layer(const PenaltyProblem<T>& p, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  const int64_t n = p.modalities, rows = p.rows, d = p.d, tiles_of_rows = tiles<R>(rows);
  const Uses each{(p.probes + 1) * tiles_of_rows, 0};
  const int64_t copies = StraightForm<T, NV>(d, each).size() + TransposedForm<T, NV>(d, each).size();
  const int64_t factors = p.dparams ? GradientMemory<T, NV>::bytes(tiles_of_rows * (p.probes + 1) * R, d) : 0;
  const int64_t most = blocks_at_once(n + 1, 2 * int64_t(sizeof(T)) * copies + factors);
  Scratch<T> dx_fuse(rows * d);
  const InjectionGradients<T> injection(n, rows, d, p.weights, p.dweights, p.dbias);
  for (int64_t first = 0; first <= n; first += most) {
    const int64_t count = n + 1 - first < most ? n + 1 - first : most, last = first + count > n;
    const int64_t pieces = last ? (rows + kPiece - 1) / kPiece : 0;
    penalty_some_blocks<T, NV>(p, first, count, dx_fuse.get(), pieces, threads, parallel, [&](int64_t piece) {
      for (int64_t r = piece * kPiece; r < rows && r < (piece + 1) * kPiece; ++r)
        for (int64_t i = 0; i < n; ++i) injection.add(i, r, dx_fuse.get(), p.x[i], p.dx[i]);
    });
  }
  injection.finish();
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
