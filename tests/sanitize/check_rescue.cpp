// Rows that are mended one at a time, and adjoints by LU factors, of every instruction set that runs here. What is
// checked, for float and double, at maps that do not contract and solves of two evaluations:
//   - mended rows satisfy their equation, evaluated naively in double; rows without work stay as they are;
//   - adjoints by LU factors are those of a long iteration, where that converges;
//   - any thread count gives the same bits;
//   - a NaN row stays what it is, forward and backward.
#include <type_traits>

#include "calls.h"

long long mended = 0, adjoints = 0;

template <class T, class Rows, class Call>
void with_rows(const Inputs& in, const Array<int64_t>& which, RescueProblem<T, Rows> problem, Call call) {
  const Shape& s = in.s;
  Array<Array<T>> params;
  for (auto& p : in.params) params.push_back(cast<T>(p));
  const auto pointed = pointers<const T>(params);
  const auto x = cast<T>(in.x), sum = cast<T>(in.cell_sum), mask = cast<T>(in.mask);
  const auto from = slices<const T>(x, s);
  Rows& rows = problem.rows;
  rows.modalities = s.modalities, rows.rows = s.rows, rows.d = s.d, rows.groups = s.groups;
  rows.params = pointed.data(), rows.which = which.data(), rows.count = int64_t(which.size());
  if constexpr (std::is_same_v<Rows, SomeFuseRows<T>>) {
    rows.relu_last = s.variant, rows.x = x.data(), rows.cell_sum = sum.data();
    rows.mask = mask.empty() ? nullptr : mask.data();
  } else {
    rows.skip = s.variant, rows.x = from.data();
  }
  call(problem);
}

template <class T>
Solution<T> rescue(const KernelTable& table, const Inputs& in, Solution<T> found, double tol, int most, int threads) {
  Array<int64_t> left;
  for (size_t k = 0; k < found.outcome.size(); ++k)
    if (Outcome(found.outcome[k]) != Outcome::kConverged) left.push_back(int64_t(k));
  auto results = [&](auto problem) {
    problem.tol = tol, problem.most = most, problem.z = found.z.data(), problem.residual = found.residual.data();
    problem.nfe = found.nfe.data(), problem.outcome = found.outcome.data();
    return problem;
  };
  if (in.fuse)
    with_rows(in, left, results(RescueProblem<T, SomeFuseRows<T>>{}),
              [&](const auto& p) { of(table, T{}).rescue_fuse(p, threads, parallel); });
  else
    with_rows(in, left, results(RescueProblem<T, SomeCellRows<T>>{}),
              [&](const auto& p) { of(table, T{}).rescue_cells(p, threads, parallel); });
  return found;
}

template <class T>
Solution<T> check_forward(const KernelTable& table, const Inputs& in, double tol, int64_t bad) {
  const Shape& s = in.s;
  const Solution<T> left = solve<T>(table, in, tol, 1);
  check(same(rescue(table, in, left, tol, 0, 1).z, left.z), "rows change without work");
  const Solution<T> out = rescue(table, in, left, tol, 400, 1), other = rescue(table, in, left, tol, 400, 3);
  check(same(out.z, other.z) && same(out.residual, other.residual) && same(out.nfe, other.nfe) &&
            same(out.outcome, other.outcome), "rescue depends on the thread count");
  check(Outcome(out.outcome[bad]) == Outcome::kNonFinite, "a poisoned row was mended");
  for (int64_t k = 0; k < int64_t(out.outcome.size()); ++k) {
    if (Outcome(out.outcome[k]) != Outcome::kRescued) continue;
    ++mended;
    const Array<double> z = cast<double>(row(out.z, k, s.d));
    check(distance(z, image(in, k / s.rows, k % s.rows, z)) < 3 * tol, "a mended row does not satisfy its equation");
  }
  return out;
}

// Adjoints whose iteration may apply J^T two times, so that factors solve nearly all.
template <class T>
void check_adjoint(const KernelTable& table, const Inputs& in, const Solution<T>& at, double tol, int64_t bad) {
  const Array<double> z = cast<double>(at.z);
  const Gradients<T> out = adjoint<T>(table, in, z, kSolveLeft, tol, 1, true, 2);
  check(same(out, adjoint<T>(table, in, z, kSolveLeft, tol, 3, true, 2)), "adjoint depends on the thread count");
  const Gradients<T> long_run = adjoint<T>(table, in, z, kIterate, tol / 100, 1);
  const Shape& s = in.s;
  for (int64_t k = 0; k < int64_t(out.outcome.size()); ++k) {
    const Outcome how = Outcome(out.outcome[k]);
    if (k == bad) check(how == Outcome::kNonFinite, "a poisoned adjoint", int(how));
    else check(how == Outcome::kConverged || how == Outcome::kSingular, "an adjoint that is left", int(how));
    if (how != Outcome::kConverged || Outcome(long_run.outcome[k]) != Outcome::kConverged) continue;
    ++adjoints;
    const Array<double> dx = cast<double>(row(long_run.all[in.params.size()], k, s.d));
    const double error = distance(row(out.all[in.params.size()], k, s.d), dx);
    check(error < 1e3 * tol, "adjoint by factors differs from that of an iteration", error);
  }
}

void check_shape(const KernelTable& table, const Shape& s, bool fuse) {
  now = std::string(table.name) + (fuse ? " fuse" : " cells") + " rescue N=" + std::to_string(s.modalities) +
        " B=" + std::to_string(s.rows) + " d=" + std::to_string(s.d) + " groups=" + std::to_string(s.groups);
  Inputs in(s, fuse);
  for (size_t i : {size_t(0), size_t(2)})
    for (double& v : in.params[i]) v *= 8;  // not a contraction
  const int64_t bad = s.rows / 2;
  in.x[bad * s.d] = std::nan("");
  check_adjoint(table, in, check_forward<double>(table, in, 1e-8, bad), 1e-8, bad);
  check_adjoint(table, in, check_forward<float>(table, in, 1e-3, bad), 1e-3, bad);
}

// Every other instruction set, from number argv[1] on; without it all.
int main(int argc, char** argv) {
  const std::vector<const KernelTable*> tables = kernel_tables();
  for (size_t i = argc > 1 ? size_t(std::atoi(argv[1])) : 0; i < tables.size(); i += argc > 1 ? 2 : 1) {
    checks = mended = adjoints = 0;
    int turn = 0;
    for (auto [d, groups] : {std::pair<int64_t, int64_t>{4, 2}, {12, 4}, {20, 4}, {33, 3}, {50, 2}})
      for (int64_t rows : {1, 2, 15, 17})
        for (bool fuse : {false, true}) {
          ++turn;
          check_shape(*tables[i], {1 + turn / 2 % 3, rows, d, groups, turn % 3 == 0, false, turn % 4 == 0, 5, 2}, fuse);
        }
    std::printf("%s: rescue, %lld checks, %lld rows mended, %lld adjoints compared\n", tables[i]->name, checks, mended,
                adjoints);
    check(mended > 50 && adjoints > 50, "too few cases say anything");
  }
}
