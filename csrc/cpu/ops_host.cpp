// deqfuse::cuda_adjoint_* on CPU tensors: the CUDA kernels' bodies, run by the host policy. For tests; the cpu backend
// does not use it.
#define DEQFUSE_ISA host
#include "ops_host.h"

#include "../cuda/host_launch.h"
#include "../cuda/ops.h"

namespace deqfuse {
namespace DEQFUSE_ISA {
namespace {

HostDevice settings;

struct Host {
  static Place place(const Tensor&) { return {}; }
  static size_t shared_limit() { return settings.shared_limit; }
  template <template <class, int> class Kind, class T>
  static void run(const AdjointProblem<T>& p, const TilePlan& plan, void* step_memory) {
    launch_adjoint<Kind>(HostLauncher<T>(settings.reversed, settings.tensor_cores), p, plan, step_memory);
  }
};

auto adjoint_cells(Tensor g, Tensor z, Tensor x, Tensors params, bool want_params, int64_t groups, bool skip,
                   int64_t mode, double tol, int64_t max_iter, int64_t history, double beta, double lam,
                   bool allow_tf32) {
  return adjoint_cells_on(Host{}, g, z, x, params, want_params, groups, skip, mode, {tol, max_iter, history, beta, lam},
                          allow_tf32);
}

auto adjoint_fuse(Tensor g, Tensor z, Tensor x, Tensor cell_sum, Tensors params, bool want_params,
                  std::optional<Tensor> mask, int64_t modalities, int64_t groups, bool relu_last, int64_t mode,
                  double tol, int64_t max_iter, int64_t history, double beta, double lam, bool allow_tf32,
                  std::optional<Tensor> counts) {
  return adjoint_fuse_on(Host{}, g, z, x, cell_sum, params, want_params, mask, modalities, groups, relu_last, mode,
                         {tol, max_iter, history, beta, lam}, allow_tf32, counts);
}

}  // namespace
}  // namespace DEQFUSE_ISA

void set_host_device(const HostDevice& device) { DEQFUSE_ISA::settings = device; }

HostPlan host_plan(int64_t d, int64_t groups, int64_t itemsize) {
  using namespace DEQFUSE_ISA;
  const TilePlan plan = itemsize == 4 ? make_plan<float>(int(d), int(groups), settings.shared_limit)
                                      : make_plan<double>(int(d), int(groups), settings.shared_limit);
  const char* cut = plan.cut == Cut::kResident ? "resident" : plan.cut == Cut::kStreamed ? "streamed" : "steps";
  return {cut, plan.rows, plan.threads, int64_t(plan.shared_bytes)};
}

}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) {
  m.impl("cuda_adjoint_cells", TORCH_BOX(&deqfuse::host::adjoint_cells));
  m.impl("cuda_adjoint_fuse", TORCH_BOX(&deqfuse::host::adjoint_fuse));
}
