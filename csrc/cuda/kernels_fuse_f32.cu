#define DEQFUSE_ISA gpu
#include "launch.cuh"

template <>
void deqfuse::gpu::run_on_stream<deqfuse::gpu::FuseTile>(const AdjointProblem<float>& p, const TilePlan& plan,
                                                         void* step_memory, void* stream) {
  launch_adjoint<FuseTile>(CudaLauncher<float>(static_cast<cudaStream_t>(stream)), p, plan, step_memory);
}
