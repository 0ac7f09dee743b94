// Launches on the CPU, one block of the grid after the other, in memory that holds NaN at first.
#pragma once

#include <memory>

#include "host_policy.h"
#include "launch.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T>
class HostLauncher {
 public:
  explicit HostLauncher(bool reversed, bool tensor_cores = false) : reversed_(reversed), tensor_cores_(tensor_cores) {}

  template <template <class, int> class Kind>
  void whole(const AdjointProblem<T>& p, const TilePlan& plan, int64_t tiles) const {
    constexpr int kWide = sizeof(T) == 4 ? 16 : 8;
    if (plan.rows == kWide)
      whole_tiles<Kind, kWide>(p, plan, tiles);
    else
      whole_tiles<Kind, 8>(p, plan, tiles);
  }

  template <template <class, int> class Kind>
  void stage(const AdjointProblem<T>& p, const StepMemory<T>& memory, Stage stage) const {
    HostPolicy<T, kStepRows, 1> policy(reversed_, tensor_cores_, 0, p.d);
    for_grid(p, memory.tiles, 1,
             [&](int block, int tile) { adjoint_stage<Kind>(policy, p, block, tile, memory, stage); });
  }

  template <template <class, int> class Kind>
  void product(const AdjointProblem<T>& p, const StepMemory<T>& memory, Step step, bool always) const {
    constexpr int kFeatures = 64;
    for (int begin = 0; begin < p.d; begin += kFeatures) {
      HostPolicy<T, kStepRows, kProductTiles> policy(reversed_, tensor_cores_, begin,
                                                     begin + kFeatures < p.d ? begin + kFeatures : p.d);
      for_grid(p, memory.tiles, kProductTiles,
               [&](int block, int tile) { adjoint_product<Kind>(policy, p, block, tile, memory, step, always); });
    }
  }

  void vector_gradients(const AdjointProblem<T>& p, int kinds, int64_t tiles, bool fuse) const {
    for (int block = 0; block < p.blocks; ++block)
      for (int kind = 0; kind < kinds; ++kind)
        for (int i = 0; i < p.d; ++i) vector_gradient(p, block, kind, kinds, tiles, fuse ? p.modalities : T(1), i);
  }

 private:
  template <class F>
  void for_grid(const AdjointProblem<T>& p, int64_t tiles, int step, F f) const {
    for (int block = 0; block < p.blocks; ++block)
      for (int64_t tile = 0; tile < tiles; tile += step) f(block, int(tile));
  }

  template <template <class, int> class Kind, int kRows>
  void whole_tiles(const AdjointProblem<T>& p, const TilePlan& plan, int64_t tiles) const {
    const bool resident = plan.cut == Cut::kResident;
    const int stride = resident ? weight_stride(p.d) : p.d;
    HostPolicy<T, kRows, 1> policy(reversed_, tensor_cores_, 0, p.d);
    for_grid(p, tiles, 1, [&](int block, int tile) {
      const std::unique_ptr<char[]> memory(new char[plan.shared_bytes]);
      std::memset(memory.get(), 0xff, plan.shared_bytes);
      char* tile_memory = memory.get();
      Matrix<T> weights[2];
      for (int which = 0; which < 2; ++which) {
        weights[which] = {p.params[block][2 * which], stride};
        if (!resident) continue;
        T* copy = reinterpret_cast<T*>(tile_memory);
        for (int i = 0; i < p.d; ++i)
          std::memcpy(copy + i * stride, p.params[block][2 * which] + i * p.d, sizeof(T) * p.d);
        weights[which].a = copy;
        tile_memory += sizeof(T) * round_up(p.d, 8) * stride;
      }
      adjoint_whole<Kind, T, kRows>(policy, p, block, tile, tile_memory, weights);
    });
  }

  const bool reversed_, tensor_cores_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
