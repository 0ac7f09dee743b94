// Forward operators: unpack tensors, allocate results, call the kernels. Schemas: deqfuse/backends/cpu_native.py.
#include "tensors.h"

namespace deqfuse {
namespace {

using Solved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using SolvedLayer = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool>;

// (steps, *rows), NaN where a row had stopped.
Tensor empty_trace(Shape rows, int64_t steps, ScalarType dtype) {
  rows.insert(rows.begin(), steps);
  Tensor trace = empty(rows, dtype);
  if (steps > 0) torch::stable::fill_(trace, std::numeric_limits<double>::quiet_NaN());
  return trace;
}
template <class T>
T* trace_at(const Tensor& trace, int64_t first_row) {
  return trace.numel() > 0 ? data<T>(trace) + first_row : nullptr;
}

template <class T, class P>
void point_size(P& p, int64_t modalities, int64_t rows, int64_t d, int64_t groups) {
  p.modalities = modalities;
  p.rows = rows;
  p.d = d;
  p.groups = groups;
}

Solved solve_cells(Tensor x, Tensors params, std::optional<Tensor> z0, int64_t groups, bool skip, double tol,
                   int64_t max_iter, int64_t history, double beta, double lam, int64_t steps) {
  const int64_t n = x.size(0), rows = x.size(1), d = x.size(2);
  const ScalarType dtype = compute_dtype(x);
  const Options options{tol, max_iter, history, beta, lam};
  options.expect(steps);
  expect_sizes(dtype, d, groups);
  prepare(x, dtype);
  prepare(params, dtype);
  prepare(z0, dtype);
  expect(x, n * rows * d, dtype, "x");
  expect(z0, n * rows * d, dtype, "z0");
  expect_params(params, 0, n, 10, d, dtype);
  const Statistics statistics({n, rows}, dtype);
  const Tensor z = empty({n, rows, d}, dtype), trace = empty_trace({n, rows}, steps, dtype);
  by_dtype(x, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params), from = slices<const T>(data<T>(x), n, rows * d);
    CellProblem<T> p{};
    point_size<T>(p, n, rows, d, groups);
    options.point(p);
    statistics.point<T>(p);
    p.skip = skip;
    p.x = from.data();
    p.z0 = data<T>(z0);
    p.params = in.data();
    p.z = data<T>(z);
    p.trace = trace_at<T>(trace, 0);
    p.trace_stride = n * rows;
    table.solve_cells(p, threads(), parallel);
  });
  return {z, statistics.residual, statistics.nfe, statistics.outcome, trace};
}

Solved solve_fuse(Tensor x, Tensor cell_sum, Tensors params, std::optional<Tensor> mask, std::optional<Tensor> z0,
                  int64_t modalities, int64_t groups, bool relu_last, double tol, int64_t max_iter, int64_t history,
                  double beta, double lam, int64_t steps) {
  const int64_t rows = x.size(0), d = x.size(1);
  const ScalarType dtype = compute_dtype(x);
  const Options options{tol, max_iter, history, beta, lam};
  options.expect(steps);
  expect_sizes(dtype, d, groups);
  prepare(x, dtype);
  prepare(cell_sum, dtype);
  prepare(params, dtype);
  prepare(mask, dtype);
  prepare(z0, dtype);
  expect(x, rows * d, dtype, "x_fuse");
  expect(cell_sum, rows * d, dtype, "cell_sum");
  expect(mask, rows * d, dtype, "mask");
  expect(z0, rows * d, dtype, "z0");
  expect_params(params, 0, 1, 6, d, dtype);
  const Statistics statistics({rows}, dtype);
  const Tensor z = empty({rows, d}, dtype), trace = empty_trace({rows}, steps, dtype);
  by_dtype(x, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params);
    FuseProblem<T> p{};
    point_size<T>(p, modalities, rows, d, groups);
    options.point(p);
    statistics.point<T>(p);
    p.relu_last = relu_last;
    p.x = data<T>(x);
    p.cell_sum = data<T>(cell_sum);
    p.mask = data<T>(mask);
    p.z0 = data<T>(z0);
    p.params = in.data();
    p.z = data<T>(z);
    p.trace = trace_at<T>(trace, 0);
    p.trace_stride = rows;
    table.solve_fuse(p, threads(), parallel);
  });
  return {z, statistics.residual, statistics.nfe, statistics.outcome, trace};
}

// What every solve of a layer is made of, but for its rows.
struct LayerForm {
  int64_t modalities, groups;
  bool skip, relu_last;
  Options options;

  // `in`: the parameters, the cells' first, then the fuse step's, modality_weights and, if `biased`, injection_bias.
  template <class T>
  LayerProblem<T> problem(const std::vector<const T*>& in, bool biased, int64_t rows, int64_t d) const {
    const int64_t n = modalities, weights = 10 * n + 6;
    LayerProblem<T> p{};
    p.rows = rows;
    p.d = d;
    p.weights = in[weights];
    p.bias = biased ? in[weights + 1] : nullptr;
    point_size<T>(p.cells, n, rows, d, groups);
    options.point(p.cells);
    p.cells.skip = skip;
    p.cells.params = in.data();
    point_size<T>(p.fuse, n, rows, d, groups);
    options.point(p.fuse);
    p.fuse.relu_last = relu_last;
    p.fuse.params = in.data() + 10 * n;
    return p;
  }
};

// Its rows, and where it is prepared.
struct LayerRows {
  Tensors x;
  std::optional<Tensor> mask, z0_fuse, z0_cells, present;

  void check(int64_t n, int64_t d, ScalarType dtype) {
    const int64_t rows = x[0].size(0);
    prepare(x, dtype);
    prepare(mask, dtype);
    prepare(z0_fuse, dtype);
    prepare(z0_cells, dtype);
    for (const Tensor& t : x) expect(t, rows * d, dtype, "x");
    expect(mask, rows * d, dtype, "mask");
    expect(z0_fuse, rows * d, dtype, "z0_fuse");
    expect(z0_cells, n * rows * d, dtype, "z0_cells");
    expect(present, n * rows, ScalarType::Bool, "present");
  }
};

// The results hold the cells first and the fuse step last; its equilibrium comes again as a tensor of its own, for the
// caller to keep. `params`: where the parameters begin, by dtype.
template <class Params>
SolvedLayer solved_layer(const LayerForm& form, const LayerRows& in, bool biased, ScalarType dtype, int64_t steps,
                         const std::optional<Tensor>& prepared, Params params) {
  const int64_t n = form.modalities, rows = in.x[0].size(0), d = in.x[0].size(1);
  const Statistics statistics({n + 1, rows}, dtype);
  const Tensor z = empty({rows, d}, dtype), states = empty({n + 1, rows, d}, dtype);
  const Tensor trace = empty_trace({n + 1, rows}, steps, dtype);
  by_dtype(in.x[0], [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const std::vector<const T*> at = params(zero);
    const auto from = pointers<const T>(in.x);
    LayerProblem<T> p = form.problem<T>(at, biased, rows, d);
    statistics.point<T>(p.cells);
    p.cells.x = from.data();
    p.cells.present = data<bool>(in.present);
    p.cells.z0 = data<T>(in.z0_cells);
    p.cells.z = data<T>(states);
    p.cells.trace = trace_at<T>(trace, 0);
    statistics.point<T>(p.fuse, n * rows);
    p.fuse.mask = data<T>(in.mask);
    p.fuse.z0 = data<T>(in.z0_fuse);
    p.fuse.z = data<T>(states) + n * rows * d;
    p.fuse.copy = data<T>(z);
    p.fuse.trace = trace_at<T>(trace, n * rows);
    p.cells.trace_stride = p.fuse.trace_stride = (n + 1) * rows;
    if (prepared) {
      STD_TORCH_CHECK(prepared->numel() == table.prepared_size(p) && prepared->scalar_type() == dtype,
                      "deqfuse: prepared: expected what cpu_prepare_layer made for this layer, these options and this "
                      "dtype, got ", prepared->numel(), " values");
      p.prepared = data<T>(*prepared);
    }
    table.solve_layer(p, threads(), parallel);
  });
  return {z, states, statistics.residual, statistics.nfe, statistics.outcome, trace, statistics.all_converged()};
}

// `params`: the cells', the fuse step's, modality_weights and, if there is one, injection_bias.
SolvedLayer solve_layer(Tensors x, Tensors params, std::optional<Tensor> mask, std::optional<Tensor> z0_fuse,
                        std::optional<Tensor> z0_cells, std::optional<Tensor> present, int64_t groups, bool skip,
                        bool relu_last, double tol, int64_t max_iter, int64_t history, double beta, double lam,
                        int64_t steps) {
  STD_TORCH_CHECK(!x.empty(), "deqfuse: x: expected at least one tensor");
  const int64_t n = int64_t(x.size()), d = x[0].size(1);
  const ScalarType dtype = compute_dtype(x[0]);
  const LayerForm form{n, groups, skip, relu_last, {tol, max_iter, history, beta, lam}};
  form.options.expect(steps);
  expect_sizes(dtype, d, groups);
  LayerRows rows{x, mask, z0_fuse, z0_cells, present};
  rows.check(n, d, dtype);
  prepare(params, dtype);
  expect_layer_params(params, n, d, dtype);
  return solved_layer(form, rows, int64_t(params.size()) > 10 * n + 7, dtype, steps, std::nullopt,
                      [&](auto zero) { return pointers<const decltype(zero)>(params); });
}

// A layer for many solves without starts: its matrices in the form that the kernels read, and the addresses of its
// parameters, which the caller keeps alive, in place and unchanged.
std::tuple<Tensor, Tensor> prepare_layer(Tensors params, int64_t groups, bool skip, bool relu_last, double tol,
                                         int64_t max_iter, int64_t history, double beta, double lam) {
  const int64_t count = int64_t(params.size()), n = (count - 7) / 10;
  STD_TORCH_CHECK(n > 0, "deqfuse: params: expected those of a layer, got ", count, " tensors");
  const int64_t d = params[0].size(0);
  const ScalarType dtype = params[0].scalar_type();
  const LayerForm form{n, groups, skip, relu_last, {tol, max_iter, history, beta, lam}};
  form.options.expect();
  expect_sizes(dtype, d, groups);
  expect_layer_params(params, n, d, dtype);
  const Tensor addresses = empty({count}, ScalarType::Long);
  for (int64_t i = 0; i < count; ++i) data<int64_t>(addresses)[i] = reinterpret_cast<int64_t>(params[i].data_ptr());
  std::optional<Tensor> prepared;
  by_dtype(params[0], [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params);
    const LayerProblem<T> p = form.problem<T>(in, count > 10 * n + 7, 0, d);
    prepared = empty({table.prepared_size(p)}, dtype);
    table.prepare_layer(p, data<T>(*prepared), threads(), parallel);
  });
  return {*prepared, addresses};
}

// Of a layer that was prepared with these options.
SolvedLayer solve_prepared(Tensors x, Tensor prepared, Tensor addresses, std::optional<Tensor> present, int64_t groups,
                           bool skip, bool relu_last, double tol, int64_t max_iter, int64_t history, double beta,
                           double lam, int64_t steps) {
  STD_TORCH_CHECK(!x.empty(), "deqfuse: x: expected at least one tensor");
  const int64_t n = int64_t(x.size()), d = x[0].size(1), count = addresses.numel();
  const ScalarType dtype = compute_dtype(x[0]);
  STD_TORCH_CHECK(count == 10 * n + 7 || count == 10 * n + 8, "deqfuse: addresses: expected those of a layer of ", n,
                  " modalities, got ", count);
  expect(addresses, count, ScalarType::Long, "addresses");
  const LayerForm form{n, groups, skip, relu_last, {tol, max_iter, history, beta, lam}};
  form.options.expect(steps);
  expect_sizes(dtype, d, groups);
  LayerRows rows{x, {}, {}, {}, present};
  rows.check(n, d, dtype);
  return solved_layer(form, rows, count > 10 * n + 7, dtype, steps, prepared, [&](auto zero) {
    const int64_t* at = data<int64_t>(addresses);
    std::vector<const decltype(zero)*> in(count);
    for (int64_t i = 0; i < count; ++i) in[i] = reinterpret_cast<const decltype(zero)*>(at[i]);
    return in;
  });
}

// The state of a solve lives in tensors that Python allocates; returns whether any row is active.
bool anderson_step(Tensor fz, Tensor z, Tensor best, Tensor images, Tensor residuals, Tensor gram, Tensor best_residual,
                   Tensor nfe, Tensor best_at, Tensor outcome, Tensor active, Tensor trace, int64_t step, double tol,
                   int64_t max_iter, double beta, double lam) {
  const int64_t rows = z.size(0), n = z.size(1), m = images.size(0), state = rows * n;
  const ScalarType dtype = z.scalar_type();
  const Options options{tol, max_iter, m, beta, lam};
  options.expect(trace.size(0));
  expect_sizes(dtype, 1, 1);
  STD_TORCH_CHECK(m > 0 && step >= 0, "deqfuse: expected a history and step >= 0");
  for (const Tensor* t : {&fz, &z, &best}) expect(*t, state, dtype, "fz, z, best");
  for (const Tensor* t : {&images, &residuals}) expect(*t, m * state, dtype, "images, residuals");
  expect(gram, rows * m * m, dtype, "gram");
  expect(best_residual, rows, dtype, "best_residual");
  expect(trace, trace.size(0) * rows, dtype, "trace");
  for (const Tensor* t : {&nfe, &best_at}) expect(*t, rows, ScalarType::Int, "nfe, best_at");
  expect(outcome, rows, ScalarType::Char, "outcome");
  expect(active, rows, ScalarType::Bool, "active");
  by_dtype(z, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    StepProblem<T> p{};
    options.point(p);
    p.rows = rows;
    p.n = n;
    p.step = step;
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
    p.trace = trace_at<T>(trace, 0);
    table.anderson_step(p, threads(), parallel);
  });
  const bool* flags = data<bool>(active);
  return std::any_of(flags, flags + rows, [](bool flag) { return flag; });
}

}  // namespace
}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) {
  m.impl("cpu_solve_cells", TORCH_BOX(&deqfuse::solve_cells));
  m.impl("cpu_solve_fuse", TORCH_BOX(&deqfuse::solve_fuse));
  m.impl("cpu_solve_layer", TORCH_BOX(&deqfuse::solve_layer));
  m.impl("cpu_prepare_layer", TORCH_BOX(&deqfuse::prepare_layer));
  m.impl("cpu_solve_prepared", TORCH_BOX(&deqfuse::solve_prepared));
  m.impl("cpu_anderson_step", TORCH_BOX(&deqfuse::anderson_step));
}
