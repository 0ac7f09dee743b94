// CPU operators on torch's stable ABI: unpack tensors, allocate results, call the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace deqfuse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, context);
  });
}

int threads() { return int(torch::stable::get_num_threads()); }

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

using Solved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Solved allocate(const Tensor& x, int64_t steps) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  std::vector<int64_t> rows(shape.begin(), shape.end() - 1), trace(rows);
  trace.insert(trace.begin(), steps);
  Tensor history = torch::stable::new_empty(x, trace);
  torch::stable::fill_(history, std::numeric_limits<double>::quiet_NaN());
  return {torch::stable::new_empty(x, shape), torch::stable::new_empty(x, rows),
          torch::stable::new_empty(x, rows, ScalarType::Int), torch::stable::new_empty(x, rows, ScalarType::Char),
          history};
}

template <class T, class P>
void fill_common(P& p, const Solved& out, int64_t groups, double tol, int64_t max_iter, int64_t history, double beta,
                 double lam, int64_t steps) {
  p.groups = groups;
  p.tol = tol;
  p.max_iter = int(max_iter);
  p.history = int(history);
  p.beta = beta;
  p.lam = lam;
  p.z = data<T>(std::get<0>(out));
  p.residual = data<T>(std::get<1>(out));
  p.nfe = data<int32_t>(std::get<2>(out));
  p.outcome = data<int8_t>(std::get<3>(out));
  p.trace = steps > 0 ? data<T>(std::get<4>(out)) : nullptr;
}

template <class T>
std::vector<T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<T*> out;
  for (const Tensor& t : tensors) out.push_back(data<T>(t));
  return out;
}

template <class F>
void by_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Float) f(float{});
  else f(double{});
}

const Kernels<float>& table(float) { return kernels().f32; }
const Kernels<double>& table(double) { return kernels().f64; }

Solved solve_cells(Tensor x, std::vector<Tensor> params, std::optional<Tensor> z0, int64_t groups, bool skip, double tol,
                   int64_t max_iter, int64_t history, double beta, double lam, int64_t steps) {
  Solved out = allocate(x, steps);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    CellProblem<T> p{};
    p.modalities = x.size(0);
    p.rows = x.size(1);
    p.d = x.size(2);
    p.skip = skip;
    p.x = data<T>(x);
    p.z0 = data<T>(z0);
    const auto in = pointers<T>(params);
    p.params = in.data();
    fill_common<T>(p, out, groups, tol, max_iter, history, beta, lam, steps);
    table(zero).solve_cells(p, threads(), parallel);
  });
  return out;
}

Solved solve_fuse(Tensor x, Tensor cell_sum, std::vector<Tensor> params, std::optional<Tensor> mask, std::optional<Tensor> z0,
                  int64_t modalities, int64_t groups, bool relu_last, double tol, int64_t max_iter, int64_t history,
                  double beta, double lam, int64_t steps) {
  Solved out = allocate(x, steps);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    FuseProblem<T> p{};
    p.modalities = modalities;
    p.rows = x.size(0);
    p.d = x.size(1);
    p.relu_last = relu_last;
    p.x = data<T>(x);
    p.cell_sum = data<T>(cell_sum);
    p.mask = data<T>(mask);
    p.z0 = data<T>(z0);
    const auto in = pointers<T>(params);
    p.params = in.data();
    fill_common<T>(p, out, groups, tol, max_iter, history, beta, lam, steps);
    table(zero).solve_fuse(p, threads(), parallel);
  });
  return out;
}

template <class T, class P>
void fill_adjoint(P& p, const Tensor& g, const Tensor& z, const Tensor& x, int64_t groups, int64_t mode, double tol,
                  int64_t max_iter, int64_t history, double beta, double lam) {
  p.d = z.size(z.dim() - 1);
  p.rows = z.size(z.dim() - 2);
  p.g = data<T>(g);
  p.z = data<T>(z);
  p.x = data<T>(x);
  p.groups = groups;
  p.mode = int(mode);
  p.tol = tol;
  p.max_iter = int(max_iter);
  p.history = int(history);
  p.beta = beta;
  p.lam = lam;
}

struct Statistics {
  Tensor residual, nfe, outcome;
  explicit Statistics(const Tensor& z)
      : residual(torch::stable::new_empty(z, rows(z))),
        nfe(torch::stable::new_empty(z, rows(z), ScalarType::Int)),
        outcome(torch::stable::new_empty(z, rows(z), ScalarType::Char)) {}
  template <class T, class P>
  void point(P& p) const {
    p.residual = data<T>(residual);
    p.nfe = data<int32_t>(nfe);
    p.outcome = data<int8_t>(outcome);
  }
  static std::vector<int64_t> rows(const Tensor& z) {
    return std::vector<int64_t>(z.sizes().begin(), z.sizes().end() - 1);
  }
};

using CellGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// `dparams` receives the parameters' gradients; empty when they are not wanted.
CellGradients adjoint_cells(Tensor g, Tensor z, Tensor x, std::vector<Tensor> params, std::vector<Tensor> dparams,
                            int64_t groups, bool skip, int64_t mode, double tol, int64_t max_iter, int64_t history,
                            double beta, double lam) {
  Tensor dx = torch::stable::empty_like(z);
  Statistics statistics(z);
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    CellAdjointProblem<T> p{};
    fill_adjoint<T>(p, g, z, x, groups, mode, tol, max_iter, history, beta, lam);
    p.modalities = z.size(0);
    p.skip = skip;
    const auto in = pointers<T>(params), out = pointers<T>(dparams);
    p.params = in.data();
    p.dparams = out.empty() ? nullptr : out.data();
    p.dx = data<T>(dx);
    statistics.point<T>(p);
    table(zero).adjoint_cells(p, threads(), parallel);
  });
  return {dx, statistics.residual, statistics.nfe, statistics.outcome};
}

using FuseGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FuseGradients adjoint_fuse(Tensor g, Tensor z, Tensor x, Tensor cell_sum, std::vector<Tensor> params,
                           std::vector<Tensor> dparams, std::optional<Tensor> mask, int64_t modalities, int64_t groups,
                           bool relu_last, int64_t mode, double tol, int64_t max_iter, int64_t history, double beta,
                           double lam) {
  Tensor dx = torch::stable::empty_like(z), dcell_sum = torch::stable::empty_like(z);
  Statistics statistics(z);
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    FuseAdjointProblem<T> p{};
    fill_adjoint<T>(p, g, z, x, groups, mode, tol, max_iter, history, beta, lam);
    p.modalities = modalities;
    p.relu_last = relu_last;
    p.cell_sum = data<T>(cell_sum);
    p.mask = data<T>(mask);
    const auto in = pointers<T>(params), out = pointers<T>(dparams);
    p.params = in.data();
    p.dparams = out.empty() ? nullptr : out.data();
    p.dx = data<T>(dx);
    p.dcell_sum = data<T>(dcell_sum);
    statistics.point<T>(p);
    table(zero).adjoint_fuse(p, threads(), parallel);
  });
  return {dx, dcell_sum, statistics.residual, statistics.nfe, statistics.outcome};
}

// The state of a solve lives in tensors that Python allocates; returns whether any row is active.
bool anderson_step(Tensor fz, Tensor z, Tensor best, Tensor images, Tensor residuals, Tensor gram, Tensor best_residual,
                   Tensor nfe, Tensor best_at, Tensor outcome, Tensor active, Tensor trace, int64_t step, double tol,
                   int64_t max_iter, double beta, double lam) {
  const int64_t rows = z.size(0);
  by_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    StepProblem<T> p{};
    p.rows = rows;
    p.n = z.size(1);
    p.step = step;
    p.history = int(images.size(0));
    p.max_iter = int(max_iter);
    p.tol = tol;
    p.beta = beta;
    p.lam = lam;
    p.fz = data<T>(fz);
    p.z = data<T>(z);
    p.best = data<T>(best);
    p.images = data<T>(images);
    p.residuals = data<T>(residuals);
    p.gram = data<T>(gram);
    p.best_residual = data<T>(best_residual);
    p.nfe = data<int32_t>(nfe);
    p.best_at = data<int32_t>(best_at);
    p.outcome = data<int8_t>(outcome);
    p.active = data<bool>(active);
    p.trace = trace.size(0) > 0 ? data<T>(trace) : nullptr;
    table(zero).anderson_step(p, threads(), parallel);
  });
  const bool* flags = data<bool>(active);
  return std::any_of(flags, flags + rows, [](bool flag) { return flag; });
}

}  // namespace
}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) {
  m.impl("cpu_solve_cells", TORCH_BOX(&deqfuse::solve_cells));
  m.impl("cpu_solve_fuse", TORCH_BOX(&deqfuse::solve_fuse));
  m.impl("cpu_adjoint_cells", TORCH_BOX(&deqfuse::adjoint_cells));
  m.impl("cpu_adjoint_fuse", TORCH_BOX(&deqfuse::adjoint_fuse));
  m.impl("cpu_anderson_step", TORCH_BOX(&deqfuse::anderson_step));
}
