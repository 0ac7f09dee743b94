// Every kernel of every instruction set that runs here, on awkward shapes, without torch or Python: for
// sanitizers and for emulators. What is checked, for float and double:
//   - answers satisfy their equation, evaluated naively in double;
//   - gradients agree with central differences of the solve along a random direction of all inputs;
//   - any thread count, and a row alone, give the same bits;
//   - a NaN row comes back as NaN and changes no other row;
//   - the whole layer is its blocks, fed by hand, bit for bit;
//   - rows that are mended one at a time satisfy their equation, and dense adjoints theirs.
// Arrays have their exact size, so that a sanitizer sees every access beyond them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/common/outcome.h"
#include "../../csrc/cpu/kernels.h"

using namespace deqfuse;
template <class T>
using Array = std::vector<T>;

std::string now;  // the case that is running
long long checks = 0, converged = 0, rows_solved = 0, slopes_compared = 0, series_compared = 0, layers_compared = 0, mended = 0;
long long narrow = 0, stretched = 0;  // converged rows with groups of two; those further from their image than expected

void check(bool ok, const char* what, double value = 0) {
  ++checks;
  if (ok) return;
  std::printf("FAILED %s: %s (%.3g)\n", now.c_str(), what, value);
  std::exit(1);
}

void parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(body, i, context);
  if (count > 0) body(0, context);
  for (std::thread& t : others) t.join();
}

std::mt19937 random_bits(0);
Array<double> normal(int64_t count, double scale, double mean = 0) {
  std::normal_distribution<double> draw(mean, scale);
  Array<double> out(count);
  for (double& v : out) v = draw(random_bits);
  return out;
}

struct Shape {
  int64_t modalities, rows, d, groups;
  bool variant;  // skip in the cells, relu last in the fuse step
  bool warm, masked;
  int history, max_iter;
};

// All inputs of one block kind. `fuse` has one block, with cell_sum and perhaps a mask; cells have N.
struct Inputs {
  Shape s;
  bool fuse;
  Array<Array<double>> params;
  Array<double> x, z0, cell_sum, mask, g;

  int64_t blocks() const { return fuse ? 1 : s.modalities; }
  Inputs(const Shape& shape, bool is_fuse) : s(shape), fuse(is_fuse) {
    const int64_t d = s.d, size = blocks() * s.rows * d;
    const double n = double(s.modalities), small = 0.1 / std::sqrt(d);
    for (int64_t i = 0; i < blocks(); ++i) {
      params.push_back(normal(d * d, fuse ? 0.25 / n / std::sqrt(d) : 1 / std::sqrt(d)));
      params.push_back(normal(d, 0.3, fuse ? 1 / n : 0));
      params.push_back(normal(d * d, small));
      params.push_back(normal(d, 0.3));
      for (int k = 0; k < (fuse ? 1 : 3); ++k) {
        params.push_back(normal(d, 0.1, 1));
        params.push_back(normal(d, 0.1));
      }
    }
    x = normal(size, 1);
    g = normal(size, 1);
    if (s.warm) z0 = normal(size, 1);
    if (!fuse) return;
    cell_sum = normal(size, 1);
    if (s.masked)
      for (int64_t i = 0; i < size; ++i) mask.push_back(random_bits() % 4 ? 4. / 3 : 0);
  }
  // What the answer depends on differentiably, in the order of Gradients::all.
  Array<Array<double>*> leaves() {
    Array<Array<double>*> out;
    for (auto& p : params) out.push_back(&p);
    out.push_back(&x);
    if (fuse) out.push_back(&cell_sum);
    return out;
  }
};

void group_norm(Array<double>& y, const Array<double>& weight, const Array<double>& bias, int64_t groups) {
  const int64_t width = int64_t(y.size()) / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0, var = 0;
    for (int64_t k = g * width; k < (g + 1) * width; ++k) mean += y[k] / width;
    for (int64_t k = g * width; k < (g + 1) * width; ++k) var += (y[k] - mean) * (y[k] - mean) / width;
    for (int64_t k = g * width; k < (g + 1) * width; ++k)
      y[k] = (y[k] - mean) / std::sqrt(var + 1e-5) * weight[k] + bias[k];
  }
}
void relu(Array<double>& y) {
  for (double& v : y) v = v < 0 ? 0 : v;
}
Array<double> product(const Array<double>& a, const Array<double>& v) {
  Array<double> out(v.size());
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t k = 0; k < v.size(); ++k) out[i] += a[i * v.size() + k] * v[k];
  return out;
}

// f(z) of row r of block b, as the equations say it.
Array<double> image(const Inputs& in, int64_t b, int64_t r, const Array<double>& z) {
  const Shape& s = in.s;
  const int64_t at = (b * s.rows + r) * s.d;
  const Array<double>* p = &in.params[b * 10];
  Array<double> y = product(p[0], z);
  if (in.fuse) {
    const Array<double> sum(in.cell_sum.begin() + at, in.cell_sum.begin() + at + s.d), constant = product(p[0], sum);
    for (int64_t i = 0; i < s.d; ++i) y[i] = z[i] * (s.modalities * (y[i] + p[1][i]) + constant[i]);
    y = product(p[2], y);
    for (int64_t i = 0; i < s.d; ++i) y[i] = (y[i] + p[3][i]) * (in.mask.empty() ? 1 : in.mask[at + i]) + in.x[at + i];
    if (!s.variant) relu(y);
    group_norm(y, p[4], p[5], s.groups);
    if (s.variant) relu(y);
    return y;
  }
  for (int64_t i = 0; i < s.d; ++i) y[i] += p[1][i];
  group_norm(y, p[4], p[5], s.groups);
  relu(y);
  y = product(p[2], y);
  for (int64_t i = 0; i < s.d; ++i) y[i] += p[3][i] + in.x[at + i];
  group_norm(y, p[6], p[7], s.groups);
  for (int64_t i = 0; i < s.d && s.variant; ++i) y[i] += z[i];
  relu(y);
  group_norm(y, p[8], p[9], s.groups);
  return y;
}

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

template <class T, class From>
Array<T> cast(const Array<From>& a) {
  return Array<T>(a.begin(), a.end());
}
template <class T, class A>
auto pointers(A& arrays) {
  Array<T*> out;
  for (auto& a : arrays) out.push_back(a.data());
  return out;
}
// One pointer per modality.
template <class T, class A>
Array<T*> slices(A& values, const Shape& s) {
  Array<T*> out;
  for (int64_t i = 0; i < s.modalities; ++i) out.push_back(values.data() + i * s.rows * s.d);
  return out;
}
const Kernels<float>& of(const KernelTable& t, float) { return t.f32; }
const Kernels<double>& of(const KernelTable& t, double) { return t.f64; }

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
                     bool want_params = true) {
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
    problem.max_iter = mode < 0 ? 60 : mode, problem.history = mode < 0 ? std::min(s.history, 6) : 0;
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
bool same(const Array<T>& a, const Array<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
Array<T> row(const Array<T>& a, int64_t r, int64_t width) {
  return a.empty() ? a : Array<T>(a.begin() + r * width, a.begin() + (r + 1) * width);
}
template <class T>
double distance(const Array<T>& a, const Array<double>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) difference += std::pow(a[i] - b[i], 2), norm += b[i] * b[i];
  return std::sqrt(difference / (norm + 1e-12));
}

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
void check_gradients(const KernelTable& table, const Inputs& in, const Array<double>& z, const Gradients<double>& gradients) {
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

bool all_converged(const Array<int8_t>& outcome) {
  return std::all_of(outcome.begin(), outcome.end(), [](int8_t o) { return Outcome(o) == Outcome::kConverged; });
}

template <class T>
bool same(const Gradients<T>& a, const Gradients<T>& b) {
  bool equal = same(a.residual, b.residual) && same(a.nfe, b.nfe) && same(a.outcome, b.outcome);
  for (size_t i = 0; i < a.all.size(); ++i) equal = equal && same(a.all[i], b.all[i]);
  return equal;
}

// f(problem) with one that works on single rows, where SomeRows lie first.
template <class T, template <class, class> class Problem, class F>
void with_rows(const Inputs& in, const Array<int64_t>& which, F f) {
  const Shape& s = in.s;
  Array<Array<T>> params;
  for (auto& p : in.params) params.push_back(cast<T>(p));
  const auto pointed = pointers<const T>(params);
  const auto x = cast<T>(in.x), sum = cast<T>(in.cell_sum), mask = cast<T>(in.mask);
  const auto from = slices<const T>(x, s);
  auto common = [&](auto problem) {
    auto& rows = problem.rows;
    rows.modalities = s.modalities, rows.rows = s.rows, rows.d = s.d, rows.groups = s.groups;
    rows.params = pointed.data(), rows.which = which.data(), rows.count = int64_t(which.size());
    return problem;
  };
  if (in.fuse) {
    auto problem = common(Problem<T, SomeFuseRows<T>>{});
    problem.rows.relu_last = s.variant, problem.rows.x = x.data(), problem.rows.cell_sum = sum.data();
    problem.rows.mask = mask.empty() ? nullptr : mask.data();
    f(problem);
  } else {
    auto problem = common(Problem<T, SomeCellRows<T>>{});
    problem.rows.skip = s.variant, problem.rows.x = from.data();
    f(problem);
  }
}

template <class T>
Solution<T> rescue(const KernelTable& table, const Inputs& in, Solution<T> found, double tol, int most, int threads) {
  Array<int64_t> left;
  for (size_t k = 0; k < found.outcome.size(); ++k)
    if (Outcome(found.outcome[k]) != Outcome::kConverged) left.push_back(int64_t(k));
  with_rows<T, RescueProblem>(in, left, [&](auto problem) {
    problem.tol = tol, problem.most = most, problem.z = found.z.data(), problem.residual = found.residual.data();
    problem.nfe = found.nfe.data(), problem.outcome = found.outcome.data();
    if constexpr (std::is_same_v<decltype(problem.rows), SomeFuseRows<T>>)
      of(table, T{}).rescue_fuse(problem, threads, parallel);
    else of(table, T{}).rescue_cells(problem, threads, parallel);
  });
  return found;
}

// Rows that are given two evaluations, and a poisoned one, which stays as it was; the adjoints of all by LU factors.
template <class T>
void check_dense(const KernelTable& table, const Inputs& in, double tol) {
  const Shape& s = in.s;
  const int64_t count = in.blocks() * s.rows, bad = s.rows / 2;
  Inputs hard = in;
  hard.s.max_iter = 2;
  for (size_t i : {size_t(0), size_t(2)})
    for (double& v : hard.params[i]) v *= 8;  // not a contraction
  hard.x[bad * s.d] = std::nan("");
  const Solution<T> left = solve<T>(table, hard, tol, 1);
  check(same(rescue(table, hard, left, tol, 0, 1).z, left.z), "rows change without work");
  const Solution<T> out = rescue(table, hard, left, tol, 400, 1), other = rescue(table, hard, left, tol, 400, 3);
  check(same(out.z, other.z) && same(out.residual, other.residual) && same(out.nfe, other.nfe) &&
            same(out.outcome, other.outcome), "rescue depends on the thread count");
  for (int64_t k = 0; k < count; ++k) {
    if (Outcome(left.outcome[k]) == Outcome::kConverged || Outcome(out.outcome[k]) != Outcome::kConverged) continue;
    check(k != bad, "a poisoned row was mended");
    ++mended;
    const Array<double> z = cast<double>(row(out.z, k, s.d));
    check(distance(z, image(hard, k / s.rows, k % s.rows, z)) < 3 * tol, "a mended row does not satisfy its equation");
  }

  Array<int64_t> all;
  for (int64_t k = 0; k < count; ++k) all.push_back(k);
  const Array<T> z = out.z, g = cast<T>(in.g);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Array<T> u[2], residual(count, nan), condition(count, nan);
  for (int threads : {1, 3}) {
    u[threads / 2] = Array<T>(count * s.d, nan);
    with_rows<T, DenseAdjointProblem>(hard, all, [&](auto problem) {
      problem.z = z.data(), problem.g = g.data(), problem.u = u[threads / 2].data();
      problem.residual = residual.data(), problem.condition = condition.data();
      if constexpr (std::is_same_v<decltype(problem.rows), SomeFuseRows<T>>)
        of(table, T{}).dense_adjoint_fuse(problem, threads, parallel);
      else of(table, T{}).dense_adjoint_cells(problem, threads, parallel);
    });
  }
  check(same(u[0], u[1]), "dense adjoint depends on the thread count");
  // J = L R, either of which a norm stretches by up to 316, and one of them may have two.
  for (int64_t k = 0; k < count; ++k)
    check(k == bad || residual[k] < 1e-16 * std::pow(316, 3) * std::max(1., double(condition[k])), "dense adjoint", residual[k]);
}

void check_blocks(const KernelTable& table, const Shape& s, bool fuse) {
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
  if (s.rows > 0 && s.rows < 17 && !s.warm) check_dense<float>(table, in, 1e-3), check_dense<double>(table, in, 1e-8);

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

// Rows of z = (cos z) / 2 + x, evaluated here, mixed by the kernel.
template <class T>
void check_steps(const KernelTable& table, int64_t rows, int64_t n, int m, T tol) {
  now = std::string(table.name) + " anderson_step R=" + std::to_string(rows) + " n=" + std::to_string(n) +
        " m=" + std::to_string(m);
  const int max_iter = 60;
  Array<T> x = cast<T>(normal(rows * n, 1)), answers[2];
  if (rows > 1) x[n] = std::numeric_limits<T>::quiet_NaN();
  for (int threads : {1, 3}) {
    Array<T> z(rows * n), best(z), f(z), images(m * rows * n), residuals(images), gram(rows * m * m);
    Array<T> best_residual(rows, std::numeric_limits<T>::infinity()), trace(max_iter * rows);
    Array<int32_t> nfe(rows), best_at(rows);
    Array<int8_t> outcome(rows, -1);
    const std::unique_ptr<bool[]> active(new bool[rows]);
    std::fill_n(active.get(), rows, true);
    for (int step = 0; std::any_of(active.get(), active.get() + rows, [](bool a) { return a; }); ++step) {
      for (int64_t i = 0; i < rows * n; ++i) f[i] = std::cos(z[i]) / 2 + x[i];
      of(table, T{}).anderson_step({rows, n, step, m, max_iter, tol, 1, 1e-6, f.data(), z.data(), best.data(), images.data(),
                                    residuals.data(), gram.data(), best_residual.data(), trace.data(), nfe.data(),
                                    best_at.data(), outcome.data(), active.get()}, threads, parallel);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const bool bad = rows > 1 && r == 1;
      check(Outcome(outcome[r]) == (bad ? Outcome::kNonFinite : Outcome::kConverged), "outcome", outcome[r]);
      for (int64_t i = r * n; i < (r + 1) * n && !bad; ++i) {
        const double error = std::fabs(std::cos(best[i]) / 2 + x[i] - best[i]);
        check(error < 10 * tol * std::sqrt(n), "answer does not satisfy its equation", error);
      }
    }
    answers[threads > 1] = best;
  }
  check(same(answers[0], answers[1]), "step depends on the thread count");
}

template <class T>
T nan() {
  return std::numeric_limits<T>::quiet_NaN();
}

// The whole layer, of the inputs of its blocks; `fuse.x` and `fuse.cell_sum` are for it to make.
template <class T>
struct Layer {
  const Inputs &cells, &fuse;
  const Shape& s = cells.s;
  int64_t rows = s.rows, n = s.modalities, size = rows * s.d, count = (n + 1) * rows;
  Array<Array<T>> params, x;
  Array<T> z0_cells = cast<T>(cells.z0), z0_fuse = cast<T>(fuse.z0), mask = cast<T>(fuse.mask);
  Array<T> weights = cast<T>(normal(n, 0.3, 1)), bias = {T(0.3)};
  bool biased;

  Layer(const Inputs& of_cells, const Inputs& of_fuse, bool with_bias) : cells(of_cells), fuse(of_fuse), biased(with_bias) {
    for (const Inputs* in : {&cells, &fuse})
      for (auto& p : in->params) params.push_back(cast<T>(p));
    const auto all = cast<T>(cells.x);
    for (int64_t i = 0; i < n; ++i) x.emplace_back(all.begin() + i * size, all.begin() + (i + 1) * size);
  }
  static const T* maybe(const Array<T>& a) { return a.empty() ? nullptr : a.data(); }

  Solution<T> solve(const KernelTable& table, double tol, int threads) const {
    Solution<T> out{Array<T>(count * s.d, nan<T>()), Array<T>(count, nan<T>()), Array<T>(s.max_iter * count, nan<T>()),
                    Array<int32_t>(count, -1), Array<int8_t>(count, -1)};
    const auto p = pointers<const T>(params), from = pointers<const T>(x);
    auto common = [&](auto& block, int64_t first) {
      block.modalities = n, block.rows = rows, block.d = s.d, block.groups = s.groups;
      block.tol = tol, block.beta = s.history % 2 ? 1 : 0.9, block.lam = 1e-6;
      block.max_iter = s.max_iter, block.history = s.history, block.trace_stride = count;
      block.z = out.z.data() + first * s.d, block.residual = out.residual.data() + first;
      block.nfe = out.nfe.data() + first, block.outcome = out.outcome.data() + first;
      block.trace = out.trace.data() + first;
    };
    LayerProblem<T> problem{};
    problem.rows = rows, problem.d = s.d, problem.weights = weights.data(), problem.bias = biased ? bias.data() : nullptr;
    common(problem.cells, 0), common(problem.fuse, n * rows);
    problem.cells.skip = problem.fuse.relu_last = s.variant;
    problem.cells.x = from.data(), problem.cells.params = p.data(), problem.fuse.params = p.data() + 10 * n;
    problem.cells.z0 = maybe(z0_cells), problem.fuse.z0 = maybe(z0_fuse), problem.fuse.mask = maybe(mask);
    of(table, T{}).solve_layer(problem, threads, parallel);
    return out;
  }

  // all: the parameters', weights', bias's (as it came where there is none), and N times dx.
  Gradients<T> adjoint(const KernelTable& table, const Array<T>& z, bool use_cells, double tol, int threads,
                       bool want_params = true) const {
    Gradients<T> out{params, Array<T>(count, nan<T>()), Array<int32_t>(count, -1), Array<int8_t>(count, -1)};
    out.all.push_back(weights), out.all.push_back(bias);
    out.all.insert(out.all.end(), x.begin(), x.end());
    for (auto& gradient : out.all) std::fill(gradient.begin(), gradient.end(), nan<T>());
    const auto p = pointers<const T>(params), from = pointers<const T>(x);
    const auto to = pointers<T>(out.all);
    const auto g = cast<T>(fuse.g), g_cells = cast<T>(cells.g);
    auto common = [&](auto& block, int64_t first) {
      block.modalities = n, block.rows = rows, block.d = s.d, block.groups = s.groups;
      block.z = z.data() + first * s.d;
      block.mode = -1, block.tol = tol, block.beta = 1, block.lam = 1e-6;
      block.max_iter = 60, block.history = std::min(s.history, 6);
      block.residual = out.residual.data() + first, block.nfe = out.nfe.data() + first;
      block.outcome = out.outcome.data() + first;
    };
    LayerAdjointProblem<T> problem{};
    problem.rows = rows, problem.d = s.d, problem.weights = weights.data(), problem.bias = biased ? bias.data() : nullptr;
    problem.g_cells = use_cells ? g_cells.data() : nullptr;
    common(problem.cells, 0), common(problem.fuse, n * rows);
    problem.cells.params = p.data(), problem.fuse.params = p.data() + 10 * n;
    problem.cells.skip = problem.fuse.relu_last = s.variant;
    problem.cells.x = from.data(), problem.cells.dx = to.data() + params.size() + 2;
    problem.fuse.g = g.data(), problem.fuse.mask = maybe(mask);
    if (want_params) {
      problem.cells.dparams = to.data(), problem.fuse.dparams = to.data() + 10 * n;
      problem.dweights = to[params.size()], problem.dbias = biased ? to[params.size() + 1] : nullptr;
    }
    of(table, T{}).adjoint_layer(problem, threads, parallel);
    return out;
  }
};

template <class A>
A joined(A a, const A& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

template <class T>
void check_layer(const KernelTable& table, const Inputs& cells, Inputs fuse, bool biased, bool use_cells, double tol) {
  const Layer<T> layer(cells, fuse, biased);
  const int64_t n = layer.n, size = layer.size;
  const Solution<T> out = layer.solve(table, tol, 1), other = layer.solve(table, tol, 3);
  check(same(out.z, other.z) && same(out.residual, other.residual) && same(out.nfe, other.nfe) &&
            same(out.outcome, other.outcome) && same(out.trace, other.trace), "layer depends on the thread count");
  const Solution<T> first = solve<T>(table, cells, tol, 2);
  for (int64_t k = 0; k < size; ++k) {  // T's sums, which doubles carry unchanged
    T sum = 0, injection = 0;
    for (int64_t i = 0; i < n; ++i) injection += layer.weights[i] * layer.x[i][k], sum += first.z[i * size + k];
    fuse.x[k] = injection + (biased ? layer.bias[0] : T(0)), fuse.cell_sum[k] = sum;
  }
  const Solution<T> last = solve<T>(table, fuse, tol, 2);
  Array<T> trace;
  for (int k = 0; k < layer.s.max_iter; ++k)
    trace = joined(joined(trace, row(first.trace, k, n * layer.rows)), row(last.trace, k, layer.rows));
  check(same(out.z, joined(first.z, last.z)) && same(out.residual, joined(first.residual, last.residual)) &&
            same(out.nfe, joined(first.nfe, last.nfe)) && same(out.outcome, joined(first.outcome, last.outcome)) &&
            same(out.trace, trace), "layer is not its blocks");

  const Gradients<T> u = layer.adjoint(table, out.z, use_cells, tol, 1);
  check(same(u, layer.adjoint(table, out.z, use_cells, tol, 3)), "layer's adjoint depends on the thread count");
  const Gradients<T> f = adjoint<T>(table, fuse, cast<double>(last.z), -1, tol, 2);
  const Array<T>&dx = f.all[6], &dsum = f.all[7];
  Inputs owed = cells;
  for (int64_t k = 0; k < n * size; ++k) owed.g[k] = (use_cells ? T(cells.g[k]) : T(0)) + dsum[k % size];
  const Gradients<T> c = adjoint<T>(table, owed, cast<double>(first.z), -1, tol, 2);
  check(same(u.residual, joined(c.residual, f.residual)) && same(u.nfe, joined(c.nfe, f.nfe)) &&
            same(u.outcome, joined(c.outcome, f.outcome)), "layer's adjoint: statistics");
  for (int64_t i = 0; i < 10 * n; ++i) check(same(u.all[i], c.all[i]), "layer's adjoint: cells' parameters");
  for (int64_t i = 0; i < 6; ++i) check(same(u.all[10 * n + i], f.all[i]), "layer's adjoint: fuse parameters");
  double bias = 0, size_of_bias = 1e-12;
  int64_t finite = 0;
  for (T v : dx) bias += v, size_of_bias += std::fabs(v);
  const double eps = 100 * std::numeric_limits<T>::epsilon(), given = u.all[10 * n + 7][0];
  // A row that diverged shows in the sums, as it does in any other parameter's gradient.
  auto agree = [&](double a, double b, double scale) {
    return std::isfinite(b) ? std::fabs(a - b) < eps * scale : !std::isfinite(a);
  };
  check(biased ? agree(given, bias, size_of_bias) : std::isnan(given), "layer's adjoint: bias", given - bias);
  const Gradients<T> inputs_only = layer.adjoint(table, out.z, use_cells, tol, 2, false);
  for (int64_t i = 0; i < n; ++i) {
    Array<T> expected(size);
    double weight = 0, size_of_weight = 1e-12;
    for (int64_t k = 0; k < size; ++k) {
      expected[k] = c.all[10 * n][i * size + k] + layer.weights[i] * dx[k];
      weight += double(layer.x[i][k]) * dx[k], size_of_weight += std::fabs(double(layer.x[i][k]) * dx[k]);
    }
    check(same(u.all[10 * n + 8 + i], expected), "layer's adjoint: dx");
    check(same(inputs_only.all[10 * n + 8 + i], expected), "layer's adjoint: dx alone");
    const double found = u.all[10 * n + 6][i];
    check(agree(found, weight, size_of_weight), "layer's adjoint: weights", found - weight);
    finite += std::isfinite(weight);
  }
  layers_compared += finite == n;
}

void check_layers(const KernelTable& table, const Shape& s, bool biased, bool use_cells) {
  now = std::string(table.name) + " layer N=" + std::to_string(s.modalities) + " B=" + std::to_string(s.rows) +
        " d=" + std::to_string(s.d) + " bias=" + std::to_string(biased) + " g_cells=" + std::to_string(use_cells);
  const std::mt19937 before = random_bits;  // the blocks' problems stay the ones they are without the layers'
  const Inputs cells(s, false), fuse(s, true);
  check_layer<float>(table, cells, fuse, biased, use_cells, 1e-4);
  check_layer<double>(table, cells, fuse, biased, use_cells, 1e-10);
  random_bits = before;
}

void check_table(const KernelTable& table) {
  const int64_t dims[][2] = {{4, 2}, {12, 4}, {20, 4}, {50, 2}};
  int history = 0, turn = 0;  // history runs through 0 .. 8, the rest turns with it
  for (auto [d, groups] : dims)
    for (int64_t rows : {0, 1, 15, 16, 17, 33})
      for (bool variant : {false, true})
        for (bool fuse : {false, true}) {
          const bool warm = turn % 3 == 1, masked = turn % 4 == 1;
          check_blocks(table, {1 + turn / 2 % 3, rows, d, groups, variant, warm, masked, history, 80}, fuse);
          history = (history + 2) % 9;
          ++turn;
        }
  for (bool fuse : {false, true}) check_blocks(table, {2, 17, 300, 4, false, false, true, 5, 12}, fuse);
  for (int max_iter : {1, 2, 3}) check_blocks(table, {2, 70, 20, 4, true, max_iter == 2, false, 5, max_iter}, max_iter == 3);
  for (auto [d, groups] : {std::pair<int64_t, int64_t>{12, 4}, {20, 4}, {66, 2}})
    for (int64_t rows : {0, 1, 17, 70, 150})
      for (bool biased : {false, true})
        for (bool use_cells : {false, true}) {
          const bool variant = turn % 5 < 2, warm = turn % 3 == 1, masked = turn % 4 == 1;
          check_layers(table, {1 + turn % 4, rows, d, groups, variant, warm, masked, 1 + turn % 8, 25}, biased, use_cells);
          ++turn;
        }
  for (int m = 1; m <= 8; ++m)
    for (int64_t rows : {0, 1, 17})
      for (int64_t n : {1, 3, 17, 300}) {
        check_steps<float>(table, rows, n, m, 1e-5f);
        check_steps<double>(table, rows, n, m, 1e-10);
      }
}

// Tiles of four vectors, which only large problems get.
void check_large(const KernelTable& table) {
  for (bool fuse : {false, true}) {
    now = std::string(table.name) + (fuse ? " fuse" : " cells") + " of 257 rows, d=768";
    const Inputs in({1, 257, 768, 4, false, false, true, 5, 30}, fuse);
    const auto out = solve<float>(table, in, 1e-3, 2);
    check_forward(table, in, 1e-3, out);
    const auto u = adjoint<float>(table, in, cast<double>(out.z), -1, 1e-3, 1);
    check(same(u, adjoint<float>(table, in, cast<double>(out.z), -1, 1e-3, 3)), "adjoint depends on the thread count");
  }
}

// Every other instruction set, from number argv[1] on; without it all.
int main(int argc, char** argv) {
  std::vector<const KernelTable*> tables{&kernels_base()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kernels_avx2());
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) tables.push_back(&kernels_avx512());
  if (__builtin_cpu_supports("avx512vnni")) tables.push_back(&kernels_vnni());
  if (may_use_amx()) tables.push_back(&kernels_amx());
#endif
  for (size_t i = argc > 1 ? size_t(std::atoi(argv[1])) : 0; i < tables.size(); i += argc > 1 ? 2 : 1) {
    const KernelTable* table = tables[i];
    checks = converged = rows_solved = slopes_compared = series_compared = layers_compared = narrow = stretched = mended = 0;
    check_table(*table);
    if (table->plan(257, 768, 4, 5).rows_per_tile == 64) check_large(*table);
    std::printf("%s: %lld checks, %lld of %lld rows converged, gradients of %lld cases compared with slopes, "
                "%lld with series, %lld layers with their blocks, %lld rows mended\n",
                table->name, checks, converged, rows_solved, slopes_compared, series_compared, layers_compared, mended);
    const bool enough = slopes_compared > 30 && series_compared > 10 && layers_compared > 100 && mended > 50;
    check(converged > rows_solved / 2 && enough, "too few cases say anything");
    check(narrow > 100 && stretched <= narrow / 100, "answers do not satisfy their equations", double(stretched));
  }
}
