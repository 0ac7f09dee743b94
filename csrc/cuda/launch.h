// What the operators need of a device; host_launch.h and launch.cuh are the two.
#pragma once

#include "adjoint.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kProductTiles = 2;  // tiles that a launch of products takes at once

// The launches of an adjoint: whole tiles, or its stages with as many applications of J^T as the slowest row may need.
// A launch whose tiles are done returns at once.
template <template <class, int> class Kind, class T, class Launcher>
void launch_adjoint(const Launcher& launcher, const AdjointProblem<T>& p, const TilePlan& plan, void* step_memory) {
  const int64_t tiles = (p.rows + plan.rows - 1) / plan.rows;
  if (tiles > 0 && plan.cut != Cut::kSteps) launcher.template whole<Kind>(p, plan, tiles);
  if (tiles > 0 && plan.cut == Cut::kSteps) {
    const StepMemory<T> memory{static_cast<char*>(step_memory), plan.shared_bytes, tiles};
    auto stage = [&](Stage s) { launcher.template stage<Kind>(p, memory, s); };
    auto product = [&](Step s, bool always) { launcher.template product<Kind>(p, memory, s, always); };
    stage(Stage::kLinearise1);
    product(Step::kForward0, true);
    stage(Stage::kLinearise2);
    product(Step::kForward1, true);
    stage(Stage::kLinearise3);
    for (int k = 0; k < p.options.max_iter; ++k) {
      product(Step::kPull1, false);
      stage(Stage::kPullOn);
      product(Step::kPull0, false);
      stage(Stage::kAdvance);
    }
    stage(Stage::kFinish1);
    using Op = Kind<T, kStepRows>;
    if (Op::kOwesProduct || p.sums != nullptr) {
      product(Step::kPull1, true);
      stage(Stage::kFinish2);
    }
    if (Op::kOwesProduct) {
      product(Step::kOwed0, true);
      stage(Stage::kFinish3);
    }
  }
  if (p.sums != nullptr)
    launcher.vector_gradients(p, Kind<T, kStepRows>::kSums, tiles, Kind<T, kStepRows>::kOwesProduct);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
