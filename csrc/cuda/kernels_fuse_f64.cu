#define DEQFUSE_ISA gpu
#include "launch.cuh"

template <>
void deqfuse::gpu::run_on_stream<deqfuse::gpu::FuseTile>(const AdjointProblem<double>& p, const TilePlan& plan,
                                                         void* step_memory, void* stream) {
  launch_adjoint<FuseTile>(CudaLauncher<double>(static_cast<cudaStream_t>(stream)), p, plan, step_memory);
}
