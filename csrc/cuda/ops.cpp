// deqfuse::cuda_adjoint_* on CUDA tensors. Nothing here waits for the device.
#define DEQFUSE_ISA gpu
#include "ops.h"

#include <torch/csrc/stable/accelerator.h>

#include "runtime.h"
#include "stream.h"

namespace deqfuse {
namespace DEQFUSE_ISA {
namespace {

// The device of this library's own runtime, which torch's guard does not set.
class OwnDeviceGuard {
 public:
  explicit OwnDeviceGuard(int index) {
    expect_success(cudaGetDevice(&before_));
    expect_success(cudaSetDevice(index));
  }
  OwnDeviceGuard(const OwnDeviceGuard&) = delete;
  OwnDeviceGuard& operator=(const OwnDeviceGuard&) = delete;
  ~OwnDeviceGuard() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

struct Cuda {
  explicit Cuda(const Tensor& t) : index(t.get_device_index()), guard(index), own_guard(index) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
  Place place(const Tensor&) const { return {aoti_torch_device_type_cuda(), index}; }
  size_t shared_limit() const {
    int bytes = 0;
    expect_success(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    return size_t(bytes);
  }
  template <template <class, int> class Kind, class T>
  void run(const AdjointProblem<T>& p, const TilePlan& plan, void* step_memory) const {
    run_on_stream<Kind>(p, plan, step_memory, stream);
  }

  const int32_t index;
  const torch::stable::accelerator::DeviceGuard guard;
  const OwnDeviceGuard own_guard;  // ends before torch's, which has the last word
  void* stream = nullptr;
};

auto adjoint_cells(Tensor g, Tensor z, Tensor x, Tensors params, bool want_params, int64_t groups, bool skip,
                   int64_t mode, double tol, int64_t max_iter, int64_t history, double beta, double lam,
                   bool allow_tf32) {
  return adjoint_cells_on(Cuda(z), g, z, x, params, want_params, groups, skip, mode,
                          {tol, max_iter, history, beta, lam}, allow_tf32);
}

auto adjoint_fuse(Tensor g, Tensor z, Tensor x, Tensor cell_sum, Tensors params, bool want_params,
                  std::optional<Tensor> mask, int64_t modalities, int64_t groups, bool relu_last, int64_t mode,
                  double tol, int64_t max_iter, int64_t history, double beta, double lam, bool allow_tf32,
                  std::optional<Tensor> counts) {
  return adjoint_fuse_on(Cuda(z), g, z, x, cell_sum, params, want_params, mask, modalities, groups, relu_last, mode,
                         {tol, max_iter, history, beta, lam}, allow_tf32, counts);
}

}  // namespace
}  // namespace DEQFUSE_ISA
}  // namespace deqfuse

// 1000 * major + 10 * minor of the CUDA that the driver knows (0: there is no driver), and of the runtime in here.
extern "C" __attribute__((visibility("default"))) void deqfuse_cuda_versions(int* driver, int* runtime) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  *runtime = CUDART_VERSION;
}

// Null, or why none of the kernels runs on this device: they were compiled for other architectures.
extern "C" __attribute__((visibility("default"))) const char* deqfuse_cuda_cannot_run(int device) {
  return deqfuse::gpu::cannot_run(deqfuse::gpu::any_kernel(), device);
}

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CUDA, m) {
  m.impl("cuda_adjoint_cells", TORCH_BOX(&deqfuse::gpu::adjoint_cells));
  m.impl("cuda_adjoint_fuse", TORCH_BOX(&deqfuse::gpu::adjoint_fuse));
}
