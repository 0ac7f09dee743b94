#define DEQFUSE_ISA gpu
#include "launch.cuh"

template <>
void deqfuse::gpu::run_on_stream<deqfuse::gpu::CellTile>(const AdjointProblem<float>& p, const TilePlan& plan,
                                                         void* step_memory, void* stream) {
  launch_adjoint<CellTile>(CudaLauncher<float>(static_cast<cudaStream_t>(stream)), p, plan, step_memory);
}

const void* deqfuse::gpu::any_kernel() { return reinterpret_cast<const void*>(vector_gradient_kernel<float>); }
