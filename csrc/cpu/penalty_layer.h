// The Jacobian penalty of the whole layer: its blocks are independent, each cut into tiles of rows; then the
// parameters' gradients over all rows.
#pragma once

#include "penalty.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// Features from which on products in fewer digits are used: 32 rows of 128 gain 5% only, for which the matrices are
// copied first.
constexpr int64_t kRoughFrom = 128;

// The begin-th to the one before the end-th row of each of some of the blocks, of which the fuse step is the last, at
// once.
template <class T, int NV>
class PenaltyBlocks {
 public:
  static constexpr int R = NV * kLanes<T>;
  using Cell = CellPenalty<T, NV>;
  using Fuse = FusePenalty<T, NV>;

  PenaltyBlocks(const PenaltyProblem<T>& p, const PresentRows& rows, int64_t first, int64_t count, T* dx_fuse)
      : straight(p.params + 10 * first, count, 10, p.d, uses(p, true)),
        transposed(p.params + 10 * first, count, 10, p.d, uses(p, false)),
        p_(p),
        rows_(rows),
        first_(first),
        count_(count),
        dx_fuse_(dx_fuse) {}

  // Of one block, and `rows` rows at once.
  static int64_t bytes(const PenaltyProblem<T>& p, int64_t rows) {
    const StraightForm<T, NV> straight(p.d, uses(p, true));
    const TransposedForm<T, NV> transposed(p.d, uses(p, false));
    const int64_t copies = straight.size() + transposed.size();
    return 2 * int64_t(sizeof(T)) * copies + (p.dparams ? GradientMemory<T, NV>::bytes(factor_rows(p, rows), p.d) : 0);
  }

  const Matrices<T, StraightForm<T, NV>> straight;
  const Matrices<T, TransposedForm<T, NV>> transposed;

  // after(task): `more` further tasks behind those of the rows.
  template <class After>
  void run(int64_t begin, int64_t end, int64_t more, int threads, ParallelFor parallel, After after) const {
    const int64_t n = p_.modalities;
    const GradientMemory<T, NV> gradients(p_.dparams ? count_ : 0, factor_rows(p_, end - begin), tiles<R>(end - begin),
                                          Cell::kSums, p_.d);
    const auto size = [&](int64_t block) { return rows_.size(first_ + block, begin, end); };
    run_tiles<R>(rows_, first_, count_, begin, end, threads, parallel,
                 [&](int64_t block, int64_t tile, const LaneRows<R>& rows) {
                   GradientParts<T, NV> parts;
                   if (p_.dparams) parts = gradients.parts(block, factor_rows(p_, size(block)), tile);
                   one_tile(block, rows, p_.dparams ? &parts : nullptr, tile * (p_.probes + 1));
                 });
    const int64_t jobs = p_.dparams ? gradients.jobs() : 0;
    run_tasks(count_ * jobs + more, threads, parallel, [&](int64_t t) {
      if (t >= count_ * jobs) return after(t - count_ * jobs);
      const int64_t block = t / jobs, i = first_ + block, rows = size(block);
      if (rows == 0 && begin > 0) return;  // nothing to add
      gradients.run(block, factor_rows(p_, rows), tiles<R>(rows), t % jobs, i < n ? Cell::kSums : Fuse::kSums,
                    p_.dparams + 10 * i, begin == 0);
    });
  }

 private:
  // Of a matrix as it lies: the linearisation, and back from every probe; of its transpose: every probe, and back
  // through the evaluation. Which are rough depends on d alone, or a row's bits would depend on its batch.
  static Uses uses(const PenaltyProblem<T>& p, bool linearises) {
    const int64_t count = tiles<R>(p.rows), exact = linearises ? count : 0, some = (p.probes + !linearises) * count;
    return p.d < kRoughFrom ? Uses{exact + some, 0} : Uses{exact, some};
  }
  // Of the factors of the weights' gradients: a tile for every probe of a tile, and one for the evaluation.
  static int64_t factor_rows(const PenaltyProblem<T>& p, int64_t rows) { return tiles<R>(rows) * R * (p.probes + 1); }

  void one_tile(int64_t block, const LaneRows<R>& rows, const GradientParts<T, NV>* parts, int64_t number) const {
    const int64_t n = p_.modalities, d = p_.d, i = first_ + block, size = p_.rows * d;
    const T *z = p_.states + i * size, *const *q = p_.params + 10 * i;
    const Probes<T> probes{p_.noise + i * size, p_.probes, (n + 1) * size};
    T* value = p_.value + i * p_.rows;
    if (i < n) {
      Scratch<T> memory(Cell::tiles(d, p_.groups) * d * R);
      Cell cell({straight, transposed, block, q, p_.skip}, d, p_.groups, memory.get());
      cell.run(z, p_.x[i], probes, rows, value, p_.dx[i], parts, number);
    } else {
      Scratch<T> memory(Fuse::tiles(d, p_.groups) * d * R);
      Fuse fuse({straight, transposed, block, q, p_.relu_last}, p_.mask != nullptr, d, p_.groups, memory.get());
      const FuseRows<T> from{nullptr, nullptr, n, p_.rows, p_.x, p_.states, p_.weights, p_.bias, p_.present};
      fuse.run(z, from, p_.mask, probes, rows, value, dx_fuse_, parts, number);
    }
  }

  const PenaltyProblem<T>& p_;
  const PresentRows& rows_;
  const int64_t first_, count_;
  T* const dx_fuse_;
};

// Rows that are taken at once: enough tasks for all threads, and no more, so that the factors of the weights' gradients
// are still in cache when these are computed. A multiple of kSummedRows, so that no sum depends on it.
template <int R>
int64_t rows_at_once(int64_t blocks, int threads) {
  const int64_t tiles_wanted = (8 * int64_t(threads) + blocks - 1) / blocks;
  return round_up(tiles_wanted * R, kSummedRows);
}

template <class T, int NV>
void penalty_layer(const PenaltyProblem<T>& p, int threads, ParallelFor parallel) {
  constexpr int R = NV * kLanes<T>;
  using Blocks = PenaltyBlocks<T, NV>;
  const int64_t n = p.modalities, rows = p.rows, d = p.d;
  const PresentRows present(p.present, n, rows);
  present.for_absent(threads, parallel, [&](int64_t i, int64_t r) {
    p.value[i * rows + r] = T(0);
    if (i < n) std::memset(p.dx[i] + r * d, 0, sizeof(T) * d);
  });
  Scratch<T> dx_fuse(rows * d);
  const InjectionGradients<T> injection(n, present, d, p.weights, p.dweights, p.dbias);
  const int64_t fewest = rows_at_once<R>(n + 1, threads);
  const int64_t most = blocks_at_once(n + 1, Blocks::bytes(p, rows < fewest ? rows : fewest));
  for (int64_t first = 0; first <= n; first += most) {
    const int64_t count = n + 1 - first < most ? n + 1 - first : most, step = rows_at_once<R>(count, threads);
    const Blocks blocks(p, present, first, count, dx_fuse.get());
    copy_all(threads, parallel, blocks.straight, blocks.transposed);
    for (int64_t begin = 0; begin < rows || begin == 0; begin += step) {
      const int64_t end = begin + step < rows ? begin + step : rows;
      const int64_t pieces = first + count > n && end == rows ? (rows + kPiece - 1) / kPiece : 0;
      blocks.run(begin, end, pieces, threads, parallel, [&](int64_t piece) {
        for (int64_t r = piece * kPiece; r < rows && r < (piece + 1) * kPiece; ++r)
          for (int64_t i = 0; i < n; ++i)
            if (present.has(i, r)) injection.add(i, r, dx_fuse.get(), p.x[i], p.dx[i]);
      });
    }
  }
  injection.finish();
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
