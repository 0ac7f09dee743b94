// The stages of an adjoint in their order: all in one launch, or a launch for each.
#pragma once

#include "cell.h"
#include "fuse.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// A tile of rows from its linearisation to its gradients. `memory` holds its vectors, `weights` the matrices.
template <template <class, int> class Kind, class T, int kRows, class P>
DEQFUSE_BODY void adjoint_whole(P& policy, const AdjointProblem<T>& p, int block, int tile, void* memory,
                                const Matrix<T> (&weights)[2]) {
  const TileMemory<T, kRows> m(memory, p.d, p.groups, kSlots);
  Kind<T, kRows> op(p, block, tile, m, kWork);
  auto forward = [&](int which) {
    policy.template product<false>(weights[which], m.slot(kWork), m.slot(kWork), p, m.stride, op.forward(which));
  };
  op.linearise_1(policy);
  forward(0);
  op.linearise_2(policy);
  forward(1);
  op.linearise_3(policy);
  while (policy.any(op.count, [&](int r) { return op.active(r); })) {
    op.pull(policy);
    policy.template product<true>(weights[1], m.slot(kWork), m.slot(kWork), p, m.stride, Dressing<T>{});
    op.pull_on(policy);
    policy.template product<true>(weights[0], m.slot(Kind<T, kRows>::kPulledSlot), m.slot(kWork), p, m.stride,
                                  op.pulled());
    op.advance(policy);
  }
  op.finish_1(policy);
  if (!Kind<T, kRows>::kOwesProduct && p.sums == nullptr) return;
  policy.template product<true>(weights[1], m.slot(kWork), m.slot(kWork), p, m.stride, Dressing<T>{});
  op.finish_2(policy);
  if (!Kind<T, kRows>::kOwesProduct) return;
  policy.template product<true>(weights[0], m.slot(kWork), m.slot(kWork), p, m.stride, Dressing<T>{});
  op.finish_3(policy);
}

// What one launch does to its tiles, between two launches of products.
enum class Stage { kLinearise1, kLinearise2, kLinearise3, kPullOn, kAdvance, kFinish1, kFinish2, kFinish3 };

// Vectors of the tiles of wide problems in global memory, one tile after the other; behind each whether it is at work.
template <class T>
struct StepMemory {
  char* base;
  size_t bytes;   // of one tile
  int64_t tiles;  // of one block

  DEQFUSE_INLINE void* at(int block, int64_t tile) const { return base + (block * tiles + tile) * bytes; }
  DEQFUSE_INLINE int& busy(int block, int64_t tile) const {
    return *reinterpret_cast<int*>(base + (block * tiles + tile + 1) * bytes - sizeof(int));
  }
};

template <template <class, int> class Kind, class T, class P>
DEQFUSE_BODY void adjoint_stage(P& policy, const AdjointProblem<T>& p, int block, int tile, const StepMemory<T>& memory,
                                Stage stage) {
  if ((stage == Stage::kPullOn || stage == Stage::kAdvance) && !memory.busy(block, tile)) return;
  const TileMemory<T, kStepRows> m(memory.at(block, tile), p.d, p.groups, kStepSlots);
  Kind<T, kStepRows> op(p, block, tile, m, kSlots);
  switch (stage) {
    case Stage::kLinearise1:
      return op.linearise_1(policy);
    case Stage::kLinearise2:
      return op.linearise_2(policy);
    case Stage::kPullOn:
      return op.pull_on(policy);
    case Stage::kFinish1:
      return op.finish_1(policy);
    case Stage::kFinish2:
      return op.finish_2(policy);
    case Stage::kFinish3:
      return op.finish_3(policy);
    case Stage::kLinearise3:
      op.linearise_3(policy);
      break;
    case Stage::kAdvance:
      op.advance(policy);
      break;
  }
  const bool busy = policy.any(op.count, [&](int r) { return op.active(r); });
  policy.each(1, [&](int) { memory.busy(block, tile) = busy; });
  if (busy) op.pull(policy);
}

// Which product a launch computes: the operand's slot, the matrix, whether transposed, how the result is dressed.
enum class Step { kForward0, kForward1, kPull1, kPull0, kOwed0 };

template <template <class, int> class Kind, class T, class P>
DEQFUSE_BODY void adjoint_product(P& policy, const AdjointProblem<T>& p, int block, int tile,
                                  const StepMemory<T>& memory, Step step, bool always) {
  if (!always && !policy.any(P::kTiles, [&](int t) { return tile + t < memory.tiles && memory.busy(block, tile + t); }))
    return;
  const TileMemory<T, kStepRows> m(memory.at(block, tile), p.d, p.groups, kStepSlots);
  const Kind<T, kStepRows> op(p, block, tile, m, kSlots);
  const bool last = step == Step::kPull0;
  const int which = step == Step::kForward1 || step == Step::kPull1 ? 1 : 0;
  const Matrix<T> a{p.params[block][2 * which], p.d};
  const int in = last ? Kind<T, kStepRows>::kPulledSlot : kWork;
  const int tiles = memory.tiles - tile < P::kTiles ? int(memory.tiles - tile) : P::kTiles;
  const ptrdiff_t step_bytes = ptrdiff_t(memory.bytes);
  if (step == Step::kForward0 || step == Step::kForward1)
    policy.template product<false>(a, m.slot(in), m.slot(kSlots), p, m.stride, op.forward(which), tiles, step_bytes);
  else
    policy.template product<true>(a, m.slot(in), m.slot(kSlots), p, m.stride, last ? op.pulled() : Dressing<T>{}, tiles,
                                  step_bytes);
}

// A parameter vector's gradient at feature i: its sums over all tiles, in order.
template <class T>
DEQFUSE_BODY void vector_gradient(const AdjointProblem<T>& p, int block, int kind, int kinds, int64_t tiles,
                                  T first_scale, int i) {
  T sum = T(0);
  for (int64_t t = 0; t < tiles; ++t) sum += p.sums[((block * tiles + t) * kinds + kind) * p.d + i];
  p.vector_grads[block][kind][i] = kind == 0 ? first_scale * sum : sum;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
