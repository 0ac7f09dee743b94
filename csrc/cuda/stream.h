// The kernels as the operators call them; one file for each kind of block and number type (kernels_*.cu).
#pragma once

#include "adjoint.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// On a stream (cudaStream_t) of the current device. Throws std::runtime_error with CUDA's message.
template <template <class, int> class Kind, class T>
void run_on_stream(const AdjointProblem<T>& p, const TilePlan& plan, void* step_memory, void* stream);

// One of them, by the name that the runtime knows it by: all are compiled for the same architectures.
const void* any_kernel();

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
