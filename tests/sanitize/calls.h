// The blocks' solves and adjoints through the table of an instruction set.
#pragma once
#include "cases.h"

inline long long converged = 0, rows_solved = 0, slopes_compared = 0, series_compared = 0, layers_compared = 0;
// Converged rows with groups of two; those further from their image than expected.
inline long long narrow = 0, stretched = 0;

template <class T>
struct Solution {
  Array<T> z, residual, trace;
  Array<int32_t> nfe;
  Array<int8_t> outcome;
};
template <class T>
struct Gradients {
  Array<Array<T>> all;  // as Inputs::leaves
  Array<T> residual;
  Array<int32_t> nfe;
  Array<int8_t> outcome;
};

template <class T>
Solution<T> solve(const KernelTable& table, const Inputs& in, double tol, int threads) {
  const Shape& s = in.s;
  const int64_t count = in.blocks() * s.rows;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Solution<T> out{Array<T>(count * s.d, nan), Array<T>(count, nan), Array<T>(s.max_iter * count, nan),
                  Array<int32_t>(count, -1), Array<int8_t>(count, -1)};
  Array<Array<T>> params;
  for (auto& p : in.params) params.push_back(cast<T>(p));
  const auto p = pointers<const T>(params);
  const auto x = cast<T>(in.x), z0 = cast<T>(in.z0), sum = cast<T>(in.cell_sum), mask = cast<T>(in.mask);
  auto common = [&](auto problem) {
    problem.modalities = s.modalities, problem.rows = s.rows, problem.d = s.d, problem.groups = s.groups;
    problem.z0 = z0.empty() ? nullptr : z0.data(), problem.params = p.data(), problem.trace_stride = count;
    problem.tol = tol, problem.beta = s.history % 2 ? 1 : 0.9, problem.lam = 1e-6;
    problem.max_iter = s.max_iter, problem.history = s.history;
    problem.z = out.z.data(), problem.residual = out.residual.data(), problem.trace = out.trace.data();
    problem.nfe = out.nfe.data(), problem.outcome = out.outcome.data();
    return problem;
  };
  if (in.fuse) {
    auto problem = common(FuseProblem<T>{});
    problem.x = x.data();
    problem.relu_last = s.variant, problem.cell_sum = sum.data(), problem.mask = mask.empty() ? nullptr : mask.data();
    of(table, T{}).solve_fuse(problem, threads, parallel);
  } else {
    auto problem = common(CellProblem<T>{});
    const auto from = slices<const T>(x, s);
    problem.skip = s.variant, problem.x = from.data();
    of(table, T{}).solve_cells(problem, threads, parallel);
  }
  return out;
}

template <class T>
Gradients<T> adjoint(const KernelTable& table, const Inputs& in, const Array<double>& at, int mode, double tol, int threads,
                     bool want_params = true, int max_iter = 60) {
  const Shape& s = in.s;
  const int64_t count = in.blocks() * s.rows;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Gradients<T> out{{}, Array<T>(count, nan), Array<int32_t>(count, -1), Array<int8_t>(count, -1)};
  Array<Array<T>> params;
  for (auto& p : in.params) params.push_back(cast<T>(p));
  out.all = params;
  for (auto& gradient : out.all) std::fill(gradient.begin(), gradient.end(), nan);
  const auto p = pointers<const T>(params);
  const auto dparams = pointers<T>(out.all);
  out.all.push_back(Array<T>(count * s.d, nan));
  if (in.fuse) out.all.push_back(Array<T>(count * s.d, nan));
  const auto x = cast<T>(in.x), z = cast<T>(at), g = cast<T>(in.g), sum = cast<T>(in.cell_sum), mask = cast<T>(in.mask);
  auto common = [&](auto problem) {
    problem.modalities = s.modalities, problem.rows = s.rows, problem.d = s.d, problem.groups = s.groups;
    problem.z = z.data(), problem.params = p.data();
    problem.mode = mode, problem.tol = tol, problem.beta = 1, problem.lam = 1e-6;
    problem.max_iter = mode < 0 ? max_iter : mode, problem.history = mode < 0 ? std::min(s.history, 6) : 0;
    problem.residual = out.residual.data();
    problem.nfe = out.nfe.data(), problem.outcome = out.outcome.data();
    problem.dparams = want_params ? dparams.data() : nullptr;
    return problem;
  };
  if (in.fuse) {
    auto problem = common(FuseAdjointProblem<T>{});
    problem.g = g.data(), problem.x = x.data(), problem.dx = out.all[params.size()].data();
    problem.relu_last = s.variant, problem.cell_sum = sum.data(), problem.mask = mask.empty() ? nullptr : mask.data();
    problem.dcell_sum = out.all.back().data();
    of(table, T{}).adjoint_fuse(problem, threads, parallel);
  } else {
    auto problem = common(CellAdjointProblem<T>{});
    const auto cotangent = slices<const T>(g, s), from = slices<const T>(x, s);
    const auto to = slices<T>(out.all[params.size()], s);
    problem.skip = s.variant, problem.g = cotangent.data(), problem.x = from.data(), problem.dx = to.data();
    of(table, T{}).adjoint_cells(problem, threads, parallel);
  }
  return out;
}

template <class T>
bool same(const Gradients<T>& a, const Gradients<T>& b) {
  bool equal = same(a.residual, b.residual) && same(a.nfe, b.nfe) && same(a.outcome, b.outcome);
  for (size_t i = 0; i < a.all.size(); ++i) equal = equal && same(a.all[i], b.all[i]);
  return equal;
}
