// Kernels and their launches on a CUDA stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_policy.cuh"
#include "launch.h"
#include "runtime.h"
#include "stream.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kWholeThreads[] = {256, 512};  // resident, streamed

template <template <class, int> class Kind, class T, int kRows, bool kResident>
__global__ void __launch_bounds__(kWholeThreads[!kResident], 1)
    adjoint_whole_kernel(const __grid_constant__ AdjointProblem<T> p) {
  extern __shared__ __align__(16) unsigned char shared[];
  CudaPolicy<T, kRows, 1> policy(0, p.d);
  const int block = blockIdx.y;
  if constexpr (kResident) {
    T* copy = reinterpret_cast<T*>(shared);
    const int stride = weight_stride(p.d), size = round_up(p.d, 8) * stride;
    for (int which = 0; which < 2; ++which)
      for (int i = threadIdx.x / kWarp; i < p.d; i += blockDim.x / kWarp)
        for (int k = threadIdx.x % kWarp; k < p.d; k += kWarp)
          copy[which * size + i * stride + k] = p.params[block][2 * which][i * p.d + k];
    const Matrix<T> weights[2] = {{copy, stride}, {copy + size, stride}};
    adjoint_whole<Kind, T, kRows>(policy, p, block, blockIdx.x, copy + 2 * size, weights);
  } else {
    const Matrix<T> weights[2] = {{p.params[block][0], p.d}, {p.params[block][2], p.d}};
    adjoint_whole<Kind, T, kRows>(policy, p, block, blockIdx.x, shared, weights);
  }
}

template <template <class, int> class Kind, class T>
__global__ void __launch_bounds__(512, 1)
    adjoint_stage_kernel(const __grid_constant__ AdjointProblem<T> p, StepMemory<T> memory, Stage stage) {
  CudaPolicy<T, kStepRows, 1> policy(0, p.d);
  adjoint_stage<Kind>(policy, p, blockIdx.y, blockIdx.x, memory, stage);
}

constexpr int kProductThreads = 256;

template <template <class, int> class Kind, class T>
__global__ void __launch_bounds__(kProductThreads, 2)
    adjoint_product_kernel(const __grid_constant__ AdjointProblem<T> p, StepMemory<T> memory, Step step, bool always) {
  constexpr int kFeatures = kProductThreads / kWarp * Mma<T>::kFeatures;
  const int begin = blockIdx.y * kFeatures;
  CudaPolicy<T, kStepRows, kProductTiles> policy(begin, begin + kFeatures < p.d ? begin + kFeatures : p.d);
  adjoint_product<Kind>(policy, p, blockIdx.z, blockIdx.x * kProductTiles, memory, step, always);
}

template <class T>
__global__ void vector_gradient_kernel(const __grid_constant__ AdjointProblem<T> p, int kinds, int64_t tiles,
                                       T first_scale) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.d) vector_gradient(p, blockIdx.z, blockIdx.y, kinds, tiles, first_scale, i);
}

template <class T>
class CudaLauncher {
 public:
  explicit CudaLauncher(cudaStream_t stream) : stream_(stream) {}

  template <template <class, int> class Kind>
  void whole(const AdjointProblem<T>& p, const TilePlan& plan, int64_t tiles) const {
    constexpr int kWide = sizeof(T) == 4 ? 16 : 8;
    if (plan.cut == Cut::kResident)
      launch(adjoint_whole_kernel<Kind, T, kWide, true>, p, plan, tiles);
    else if (plan.rows == kWide)
      launch(adjoint_whole_kernel<Kind, T, kWide, false>, p, plan, tiles);
    else
      launch(adjoint_whole_kernel<Kind, T, 8, false>, p, plan, tiles);
  }

  template <template <class, int> class Kind>
  void stage(const AdjointProblem<T>& p, const StepMemory<T>& memory, Stage stage) const {
    adjoint_stage_kernel<Kind, T><<<dim3(memory.tiles, p.blocks), 512, 0, stream_>>>(p, memory, stage);
    expect_success(cudaGetLastError());
  }

  template <template <class, int> class Kind>
  void product(const AdjointProblem<T>& p, const StepMemory<T>& memory, Step step, bool always) const {
    constexpr int kFeatures = kProductThreads / kWarp * Mma<T>::kFeatures;
    const unsigned features = (p.d + kFeatures - 1) / kFeatures;
    const int64_t pairs = (memory.tiles + kProductTiles - 1) / kProductTiles;
    adjoint_product_kernel<Kind, T>
        <<<dim3(pairs, features, p.blocks), kProductThreads, 0, stream_>>>(p, memory, step, always);
    expect_success(cudaGetLastError());
  }

  void vector_gradients(const AdjointProblem<T>& p, int kinds, int64_t tiles, bool fuse) const {
    vector_gradient_kernel<T>
        <<<dim3((p.d + 127) / 128, kinds, p.blocks), 128, 0, stream_>>>(p, kinds, tiles, fuse ? p.modalities : T(1));
    expect_success(cudaGetLastError());
  }

 private:
  template <class Kernel>
  void launch(Kernel kernel, const AdjointProblem<T>& p, const TilePlan& plan, int64_t tiles) const {
    allow_shared_memory(reinterpret_cast<const void*>(kernel));
    kernel<<<dim3(tiles, p.blocks), plan.threads, plan.shared_bytes, stream_>>>(p);
    expect_success(cudaGetLastError());
  }

  const cudaStream_t stream_;
};

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
