// Adjoint operators: unpack tensors, allocate gradients, call the kernels. Schemas: deqfuse/backends/cpu_native.py.
#include "tensors.h"

namespace deqfuse {
namespace {

template <class P>
void point_adjoint(P& p, int64_t modalities, int64_t rows, int64_t d, int64_t groups, int64_t mode,
                   const Options& options) {
  p.modalities = modalities;
  p.rows = rows;
  p.d = d;
  p.groups = groups;
  p.mode = int(mode);
  options.point(p);
}

using CellGradients = std::tuple<Tensor, Tensors, Tensor, Tensor, Tensor>;

CellGradients adjoint_cells(Tensor g, Tensor z, Tensor x, Tensors params, bool want_params, int64_t groups, bool skip,
                            int64_t mode, double tol, int64_t max_iter, int64_t history, double beta, double lam) {
  const int64_t n = z.size(0), rows = z.size(1), d = z.size(2);
  const ScalarType dtype = z.scalar_type();
  const Options options{tol, max_iter, history, beta, lam};
  options.expect();
  expect_sizes(dtype, d, groups);
  const Tensor x_given = x;
  const Tensors params_given = params;
  prepare(g, dtype);
  prepare(x, dtype);
  prepare(params, dtype);
  expect(z, n * rows * d, dtype, "z");
  expect(g, n * rows * d, dtype, "grad_z");
  expect(x, n * rows * d, dtype, "x");
  expect_params(params, 0, n, 10, d, dtype);
  const Statistics statistics({n, rows}, dtype);
  const Tensor dx = empty({n, rows, d}, dtype);
  Tensors dparams = want_params ? empty_like(params) : Tensors();
  by_dtype(z, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params);
    const auto out = pointers<T>(dparams), to = slices<T>(data<T>(dx), n, rows * d);
    const auto from = slices<const T>(data<T>(x), n, rows * d), cotangent = slices<const T>(data<T>(g), n, rows * d);
    CellAdjointProblem<T> p{};
    point_adjoint(p, n, rows, d, groups, mode, options);
    statistics.point<T>(p);
    p.skip = skip;
    p.z = data<T>(z);
    p.g = cotangent.data();
    p.x = from.data();
    p.dx = to.data();
    p.params = in.data();
    p.dparams = want_params ? out.data() : nullptr;
    table.adjoint_cells(p, threads(), parallel);
  });
  return {like(dx, x_given), like(std::move(dparams), params_given), statistics.residual, statistics.nfe,
          statistics.outcome};
}

using FuseGradients = std::tuple<Tensor, Tensor, Tensors, Tensor, Tensor, Tensor>;

FuseGradients adjoint_fuse(Tensor g, Tensor z, Tensor x, Tensor cell_sum, Tensors params, bool want_params,
                           std::optional<Tensor> mask, int64_t modalities, int64_t groups, bool relu_last, int64_t mode,
                           double tol, int64_t max_iter, int64_t history, double beta, double lam) {
  const int64_t rows = z.size(0), d = z.size(1);
  const ScalarType dtype = z.scalar_type();
  const Options options{tol, max_iter, history, beta, lam};
  options.expect();
  expect_sizes(dtype, d, groups);
  const Tensor x_given = x, sum_given = cell_sum;
  const Tensors params_given = params;
  prepare(g, dtype);
  prepare(x, dtype);
  prepare(cell_sum, dtype);
  prepare(params, dtype);
  prepare(mask, dtype);
  expect(z, rows * d, dtype, "z");
  expect(g, rows * d, dtype, "grad_z");
  expect(x, rows * d, dtype, "x_fuse");
  expect(cell_sum, rows * d, dtype, "cell_sum");
  expect(mask, rows * d, dtype, "mask");
  expect_params(params, 0, 1, 6, d, dtype);
  const Statistics statistics({rows}, dtype);
  const Tensor dx = empty({rows, d}, dtype), dcell_sum = empty({rows, d}, dtype);
  Tensors dparams = want_params ? empty_like(params) : Tensors();
  by_dtype(z, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params);
    const auto out = pointers<T>(dparams);
    FuseAdjointProblem<T> p{};
    point_adjoint(p, modalities, rows, d, groups, mode, options);
    statistics.point<T>(p);
    p.relu_last = relu_last;
    p.z = data<T>(z);
    p.g = data<T>(g);
    p.x = data<T>(x);
    p.cell_sum = data<T>(cell_sum);
    p.mask = data<T>(mask);
    p.dx = data<T>(dx);
    p.dcell_sum = data<T>(dcell_sum);
    p.params = in.data();
    p.dparams = want_params ? out.data() : nullptr;
    table.adjoint_fuse(p, threads(), parallel);
  });
  return {like(dx, x_given), like(dcell_sum, sum_given), like(std::move(dparams), params_given),
          statistics.residual, statistics.nfe, statistics.outcome};
}

using LayerGradients = std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor, bool>;

// `grad_z` (B, d) for the fused output, `grad_cells` (N, B, d) for the cells where anything used them; `states` and
// `params` as in solve_layer.
LayerGradients adjoint_layer(Tensor grad_z, std::optional<Tensor> grad_cells, Tensor states, Tensors x, Tensors params,
                             bool want_params, std::optional<Tensor> mask, std::optional<Tensor> present, int64_t groups,
                             bool skip, bool relu_last, int64_t mode, double tol, int64_t max_iter, int64_t history,
                             double beta, double lam) {
  const int64_t n = int64_t(x.size()), rows = states.size(1), d = states.size(2), weights = 10 * n + 6;
  const ScalarType dtype = states.scalar_type();
  const bool biased = int64_t(params.size()) > weights + 1;
  const Options options{tol, max_iter, history, beta, lam};
  options.expect();
  expect_sizes(dtype, d, groups);
  const Tensors x_given = x, params_given = params;
  prepare(grad_z, dtype);
  prepare(grad_cells, dtype);
  prepare(x, dtype);
  prepare(params, dtype);
  prepare(mask, dtype);
  expect(states, (n + 1) * rows * d, dtype, "states");
  expect(grad_z, rows * d, dtype, "grad_z");
  expect(grad_cells, n * rows * d, dtype, "grad_cells");
  for (const Tensor& t : x) expect(t, rows * d, dtype, "x");
  expect(mask, rows * d, dtype, "mask");
  expect(present, n * rows, ScalarType::Bool, "present");
  expect_layer_params(params, n, d, dtype);
  const Statistics statistics({n + 1, rows}, dtype);
  Tensors dx = empty_like(x), dparams = want_params ? empty_like(params) : Tensors();
  by_dtype(states, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params), from = pointers<const T>(x);
    const auto out = pointers<T>(dparams), to = pointers<T>(dx);
    LayerAdjointProblem<T> p{};
    p.rows = rows;
    p.d = d;
    p.weights = in[weights];
    p.bias = biased ? in[weights + 1] : nullptr;
    p.g_cells = data<T>(grad_cells);
    p.dweights = want_params ? out[weights] : nullptr;
    p.dbias = want_params && biased ? out[weights + 1] : nullptr;
    point_adjoint(p.cells, n, rows, d, groups, mode, options);
    statistics.point<T>(p.cells);
    p.cells.skip = skip;
    p.cells.z = data<T>(states);
    p.cells.x = from.data();
    p.cells.present = data<bool>(present);
    p.cells.dx = to.data();
    p.cells.params = in.data();
    p.cells.dparams = want_params ? out.data() : nullptr;
    point_adjoint(p.fuse, n, rows, d, groups, mode, options);
    statistics.point<T>(p.fuse, n * rows);
    p.fuse.relu_last = relu_last;
    p.fuse.z = data<T>(states) + n * rows * d;
    p.fuse.g = data<T>(grad_z);
    p.fuse.mask = data<T>(mask);
    p.fuse.params = in.data() + 10 * n;
    p.fuse.dparams = want_params ? out.data() + 10 * n : nullptr;
    table.adjoint_layer(p, threads(), parallel);
  });
  return {like(std::move(dx), x_given), like(std::move(dparams), params_given), statistics.residual, statistics.nfe,
          statistics.outcome, statistics.all_converged()};
}

}  // namespace
}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) {
  m.impl("cpu_adjoint_cells", TORCH_BOX(&deqfuse::adjoint_cells));
  m.impl("cpu_adjoint_fuse", TORCH_BOX(&deqfuse::adjoint_fuse));
  m.impl("cpu_adjoint_layer", TORCH_BOX(&deqfuse::adjoint_layer));
}
