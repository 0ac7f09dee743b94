// One block: answers, gradients, bits, NaN rows.
#pragma once
#include "calls.h"

template <class T>
void check_forward(const KernelTable& table, const Inputs& in, double tol, const Solution<T>& out) {
  const Shape& s = in.s;
  const Solution<T> other = solve<T>(table, in, tol, 3);
  check(same(out.z, other.z) && same(out.residual, other.residual) && same(out.nfe, other.nfe) &&
            same(out.outcome, other.outcome) && same(out.trace, other.trace), "solve depends on the thread count");
  for (int64_t k = 0; k < int64_t(out.nfe.size()); ++k) {
    check(out.nfe[k] >= 1 && out.nfe[k] <= s.max_iter, "nfe", out.nfe[k]);
    check(out.outcome[k] >= 0 && out.outcome[k] < 3, "outcome", out.outcome[k]);
    ++rows_solved;
    check(Outcome(out.outcome[k]) == Outcome::kConverged ? out.residual[k] <= T(tol) : out.residual[k] > T(tol), "residual",
          out.residual[k]);
    if (Outcome(out.outcome[k]) != Outcome::kConverged) continue;
    ++converged;
    const Array<double> z(out.z.begin() + k * s.d, out.z.begin() + (k + 1) * s.d);
    const double error = distance(z, image(in, k / s.rows, k % s.rows, z));
    // The answer is the image of what was judged. In groups of two a norm stretches differences by up to 300, and now
    // and then the next norm once more.
    if (s.d / s.groups > 2) check(error < 10 * tol, "answer does not satisfy its equation", error);
    else check(error < 300 * 300 * tol, "answer is not near its image", error), ++narrow, stretched += !(error < 300 * tol);
  }
  if (in.blocks() > 1 || s.rows < 2) return;
  Inputs alone = in;
  alone.s.rows = 1;
  const int64_t r = s.rows - 1;
  for (Array<double>* a : {&alone.x, &alone.z0, &alone.cell_sum, &alone.mask}) *a = row(*a, r, s.d);
  check(same(solve<T>(table, alone, tol, 1).z, row(out.z, r, s.d)), "a row alone has another answer");
}

template <class T>
void check_nan(const KernelTable& table, const Inputs& in, double tol, const Solution<T>& clean) {
  const Shape& s = in.s;
  const int64_t bad = s.rows / 2;
  Inputs poisoned = in;
  poisoned.x[bad * s.d + s.d - 1] = std::nan("");
  const Solution<T> out = solve<T>(table, poisoned, tol, 2);
  for (int64_t k = 0; k < int64_t(out.nfe.size()); ++k)
    if (k == bad) {
      check(Outcome(out.outcome[k]) == Outcome::kNonFinite, "NaN row: outcome", out.outcome[k]);
      check(std::isnan(out.z[k * s.d + s.d - 1]), "NaN row comes back as numbers");
    } else {
      check(same(row(out.z, k, s.d), row(clean.z, k, s.d)) && out.nfe[k] == clean.nfe[k], "NaN reached another row");
    }
  adjoint<T>(table, poisoned, cast<double>(out.z), -1, tol, 2);
}

// <g, z*> along a direction, by the gradients and by central differences of the solve.
inline void check_gradients(const KernelTable& table, const Inputs& in, const Array<double>& z,
                            const Gradients<double>& gradients) {
  ++slopes_compared;
  Inputs way = in;
  double slope = 0, scale = 0, error = 1;
  for (size_t i = 0; i < way.leaves().size(); ++i) {
    Array<double>& direction = *way.leaves()[i];
    direction = normal(int64_t(direction.size()), 1);
    for (size_t k = 0; k < direction.size(); ++k) {
      slope += gradients.all[i][k] * direction[k];
      scale += std::pow(gradients.all[i][k], 2);
    }
  }
  for (double step : {1e-6, 1e-7}) {  // too wide where the solution bends, too narrow where it rounds
    double difference = 0;
    for (double sign : {step, -step}) {
      Inputs moved = in;
      moved.z0 = z;  // there may be other equilibria
      for (size_t i = 0; i < way.leaves().size(); ++i)
        for (size_t k = 0; k < way.leaves()[i]->size(); ++k) (*moved.leaves()[i])[k] += sign * (*way.leaves()[i])[k];
      const Array<double> there = solve<double>(table, moved, 1e-12, 2).z;
      for (size_t k = 0; k < there.size(); ++k) difference += in.g[k] * there[k] / (2 * sign);
    }
    error = std::min(error, std::fabs(slope - difference) / std::sqrt(scale));
  }
  check(error < 1e-4, "gradient is not the slope of the solve", error);
}

inline bool all_converged(const Array<int8_t>& outcome) {
  return std::all_of(outcome.begin(), outcome.end(), [](int8_t o) { return Outcome(o) == Outcome::kConverged; });
}

inline void check_blocks(const KernelTable& table, const Shape& s, bool fuse) {
  now = std::string(table.name) + (fuse ? " fuse" : " cells") + " N=" + std::to_string(s.modalities) +
        " B=" + std::to_string(s.rows) + " d=" + std::to_string(s.d) + " groups=" + std::to_string(s.groups) +
        " variant=" + std::to_string(s.variant) + " warm=" + std::to_string(s.warm) + " mask=" + std::to_string(s.masked) +
        " m=" + std::to_string(s.history) + " max_iter=" + std::to_string(s.max_iter);
  const Inputs in(s, fuse);
  const auto low = solve<float>(table, in, 1e-4, 1);
  const auto high = solve<double>(table, in, 1e-12, 1);
  check_forward(table, in, 1e-4, low);
  check_forward(table, in, 1e-12, high);
  if (s.rows > 0) check_nan(table, in, 1e-4, low), check_nan(table, in, 1e-12, high);

  const auto u = adjoint<double>(table, in, high.z, -1, 1e-12, 1);
  check(same(u, adjoint<double>(table, in, high.z, -1, 1e-12, 3)), "adjoint depends on the thread count");
  const auto u32 = adjoint<float>(table, in, high.z, -1, 1e-5, 1);
  check(same(u32, adjoint<float>(table, in, high.z, -1, 1e-5, 3)), "adjoint depends on the thread count");
  const auto inputs_only = adjoint<double>(table, in, high.z, -1, 1e-12, 1, false);
  for (size_t i = in.params.size(); i < u.all.size(); ++i)
    check(same(inputs_only.all[i], u.all[i]), "input gradients depend on whether parameters' are wanted");
  for (int k : {0, 1}) {
    const auto cut = adjoint<float>(table, in, high.z, k, 0, 2);
    for (auto& a : cut.all)
      for (float v : a) check(std::isfinite(v), "cut series is not finite");
  }
  if (s.rows == 0) {
    for (auto& a : u.all)
      for (double v : a) check(v == 0, "gradient of no rows", v);
    return;
  }
  if (!all_converged(high.outcome) || !all_converged(u.outcome)) return;
  if (s.d < 50) check_gradients(table, in, high.z, u);
  if (s.d > 12) return;
  // A group whose values are nearly equal has a large Jacobian: there the series may diverge, and few digits are left.
  const auto series = adjoint<double>(table, in, high.z, 200, 0, 2), longer = adjoint<double>(table, in, high.z, 201, 0, 2);
  double last = 0;
  for (size_t i = 0; i < u.all.size(); ++i) last += distance(series.all[i], longer.all[i]);
  if (!(last < 1e-11)) return;
  ++series_compared;
  for (size_t i = 0; i < u.all.size(); ++i) {
    check(distance(u.all[i], series.all[i]) < 1e-8, "long series differs from the solve", distance(u.all[i], series.all[i]));
    if (s.d / s.groups > 2 && all_converged(u32.outcome))
      check(distance(u32.all[i], u.all[i]) < 0.1, "float differs from double", distance(u32.all[i], u.all[i]));
  }
}
