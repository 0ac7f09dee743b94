// The bodies of the CUDA adjoint kernels through the host policy, without torch or Python: for sanitizers.
//   - gradients are those of the CPU kernels, for every cut of a problem;
//   - the order of lanes and rows does not matter, bit for bit;
//   - a row's linear solve finds the solution of small systems, goes on after a breakdown, and ends when it is stuck.
// Arrays have their exact size, so that a sanitizer sees every access beyond them.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#define DEQFUSE_ISA host
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/host_launch.h"

using namespace deqfuse::host;
using deqfuse::Outcome;
template <class T>
using Array = std::vector<T>;

long long checks = 0, solved = 0, all_rows = 0;

void check(bool ok, const char* what, double value = 0) {
  ++checks;
  if (ok) return;
  std::printf("FAILED: %s (%.3g)\n", what, value);
  std::exit(1);
}

std::mt19937 random_bits(0);
template <class T>
Array<T> normal(int64_t count, double scale, double mean = 0) {
  std::normal_distribution<double> draw(mean, scale);
  Array<T> out(count);
  for (T& v : out) v = T(draw(random_bits));
  return out;
}

void parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, context);
}

// ---- one row's solve of a dense system, by the code of the tiles -------------------------------------------------

struct Solved {
  Array<double> x;
  LinearRow<double> row;
};

// (I - A) x = b, with M = I - A given.
Solved solve_dense(const Array<double>& m, const Array<double>& b, double tol, int max_iter) {
  const int d = int(b.size());
  AdjointProblem<double> p{};
  Array<double> u(d), residual(1);
  Array<int32_t> nfe(1);
  Array<int8_t> outcome(1);
  p.rows = 1, p.blocks = 1, p.d = d, p.groups = 1;
  p.options = linear_options<double>(-1, tol, max_iter, 6, 1);
  p.g = b.data(), p.u = u.data(), p.residual = residual.data(), p.nfe = nfe.data(), p.outcome = outcome.data();
  Array<char> memory(TileMemory<double, 8>::bytes(d, 1, kSlots));
  const TileMemory<double, 8> slots(memory.data(), d, 1, kSlots);
  Tile<double, 8> tile(p, 0, 0, slots, kWork);
  const HostLanes lanes(kWarp, 0, false);
  tile.begin_row(lanes, 0);
  while (tile.active(0)) {
    const double* v = tile.operand(0);
    for (int i = 0; i < d; ++i) {
      double image = v[i];
      for (int k = 0; k < d; ++k) image -= m[i * d + k] * v[k];
      slots.slot(kWork, 0)[i] = image;
    }
    tile.advance_row(lanes, 0);
  }
  for (double& v : u) v *= slots.row(0).magnitude;
  check(nfe[0] <= max_iter && outcome[0] == int8_t(slots.row(0).outcome), "statistics of a row");
  return {u, slots.row(0)};
}

double error(const Array<double>& m, const Array<double>& b, const Array<double>& x) {
  double worst = 0;
  const int d = int(b.size());
  for (int i = 0; i < d; ++i) {
    double left = b[i];
    for (int k = 0; k < d; ++k) left -= m[i * d + k] * x[k];
    worst = std::max(worst, std::fabs(left));
  }
  return worst;
}

// Rows are copied whole, in and out of memory: what begin() leaves unwritten would be read there.
template <class T>
void check_rows_are_written_whole() {
  for (int max_iter : {0, 1, 60})
    for (int mode : {-1, 0, 3})
      for (T squares : {T(0), T(2)}) {
        LinearRow<T> rows[2];
        std::memset(&rows[0], 0x00, sizeof rows[0]);
        std::memset(&rows[1], 0x7f, sizeof rows[1]);
        for (LinearRow<T>& row : rows) row.begin(T(1), squares, linear_options<T>(mode, 1e-6, max_iter, 6, 1));
        check(std::memcmp(&rows[0], &rows[1], sizeof rows[0]) == 0, "a row is written whole", mode);
      }
}

void check_linear_solve() {
  for (int d : {1, 2, 5, 12}) {
    Array<double> m = normal<double>(d * d, 0.4 / std::sqrt(double(d)));
    for (int i = 0; i < d; ++i) m[i * d + i] += 1;
    for (double size : {1e-100, 1.0, 1e100}) {
      const Array<double> b = normal<double>(d, size);
      const Solved found = solve_dense(m, b, 1e-12, 200);
      check(found.row.outcome == Outcome::kConverged, "dense system: outcome", int(found.row.outcome));
      check(error(m, b, found.x) < 1e-11 * size * d, "dense system: residual", error(m, b, found.x) / size);
    }
  }
  // After the first step (shadow, r) is exactly zero: only a new shadow residual gets any further.
  const Array<double> broken{1, 0, 0, 1, 2, 1, 0, 1, 3}, e1{1, 0, 0};
  const Solved restarted = solve_dense(broken, e1, 1e-12, 60);
  check(restarted.row.outcome == Outcome::kConverged, "breakdown: outcome", int(restarted.row.outcome));
  check(error(broken, e1, restarted.x) < 1e-11, "breakdown: residual", error(broken, e1, restarted.x));
  // (r, M r) = 0 for every r: no step has any length. It must end, and say so, with what it began with.
  const Solved stuck = solve_dense({0, -1, 1, 0}, {1, 0}, 1e-12, 1000);
  check(stuck.row.outcome == Outcome::kStalled, "stuck: outcome", int(stuck.row.outcome));
  check(stuck.x[0] == 0 && stuck.x[1] == 0 && stuck.row.best == 1, "stuck: answer");
  check(stuck.row.nfe < 100, "stuck: nfe", stuck.row.nfe);
}

// ---- whole adjoints ----------------------------------------------------------------------------------------------

struct Shape {
  int64_t modalities, rows;
  int d, groups;
  bool variant, masked;
};

// A made-up state serves: the adjoint needs no equilibrium.
struct Inputs {
  Shape s;
  int64_t blocks, size;
  int count;
  Array<Array<double>> params;
  Array<double> z, x, g, cell_sum, mask;

  Inputs(const Shape& shape, bool fuse)
      : s(shape), blocks(fuse ? 1 : shape.modalities), size(blocks * shape.rows * shape.d), count(fuse ? 6 : 10) {
    for (int64_t i = 0; i < blocks * count; ++i) {
      const bool matrix = i % count == 0 || i % count == 2, gamma = i % count >= 4 && i % 2 == 0;
      params.push_back(matrix ? normal<double>(s.d * s.d, 0.2 / std::sqrt(double(s.d)))
                              : normal<double>(s.d, 0.1, gamma));
    }
    z = normal<double>(size, 1), x = normal<double>(size, 1), g = normal<double>(size, 1);
    if (!fuse) return;
    cell_sum = normal<double>(size, 1);
    for (int64_t i = 0; s.masked && i < size; ++i) mask.push_back(random_bits() % 4 ? 4. / 3 : 0);
  }
};

struct Gradients {
  Array<Array<double>> params;
  Array<double> dx, dcell_sum, residual;
  Array<int32_t> nfe;
  Array<int8_t> outcome;

  explicit Gradients(const Inputs& in)
      : params(in.params),
        dx(in.size),
        dcell_sum(in.cell_sum.size()),
        residual(in.blocks * in.s.rows),
        nfe(residual.size()),
        outcome(residual.size()) {}
};

template <class A>
auto pointers(A& arrays) {
  Array<decltype(arrays[0].data())> out;
  for (auto& a : arrays) out.push_back(a.data());
  return out;
}

Gradients by_cpu(const Inputs& in, bool fuse) {
  Gradients out(in);
  const auto params = pointers(in.params);
  const auto grads = pointers(out.params);
  auto common = [&](auto problem) {
    problem.modalities = in.s.modalities, problem.rows = in.s.rows, problem.d = in.s.d, problem.groups = in.s.groups;
    problem.z = in.z.data(), problem.params = params.data(), problem.dparams = grads.data();
    problem.mode = -1, problem.tol = 1e-12, problem.max_iter = 300, problem.history = 6, problem.beta = 1;
    problem.lam = 1e-6, problem.residual = out.residual.data(), problem.nfe = out.nfe.data();
    problem.outcome = out.outcome.data();
    return problem;
  };
  if (fuse) {
    auto p = common(deqfuse::FuseAdjointProblem<double>{});
    p.relu_last = in.s.variant, p.g = in.g.data(), p.x = in.x.data(), p.cell_sum = in.cell_sum.data();
    p.mask = in.mask.empty() ? nullptr : in.mask.data(), p.dx = out.dx.data(), p.dcell_sum = out.dcell_sum.data();
    deqfuse::kernels_base().f64.adjoint_fuse(p, 1, parallel);
    return out;
  }
  auto p = common(deqfuse::CellAdjointProblem<double>{});
  Array<const double*> g, x;
  Array<double*> dx;
  for (int64_t i = 0; i < in.blocks; ++i) {
    const int64_t at = i * in.s.rows * in.s.d;
    g.push_back(in.g.data() + at), x.push_back(in.x.data() + at), dx.push_back(out.dx.data() + at);
  }
  p.skip = in.s.variant, p.g = g.data(), p.x = x.data(), p.dx = dx.data();
  deqfuse::kernels_base().f64.adjoint_cells(p, 1, parallel);
  return out;
}

// With the weights' gradients from the panels, as torch makes them.
template <template <class, int> class Kind>
Gradients by_bodies(const Inputs& in, bool fuse, size_t shared_limit, bool reversed) {
  Gradients out(in);
  const Shape& s = in.s;
  const TilePlan plan = make_plan<double>(s.d, s.groups, shared_limit);
  const int64_t tiles = (s.rows + plan.rows - 1) / plan.rows;
  constexpr int kSums = Kind<double, 16>::kSums;
  Array<double> u(in.size), sums(in.blocks * tiles * kSums * s.d + 1), panels[4];
  for (auto& panel : panels) panel.resize(in.size + 1);
  Array<char> memory(plan.cut == Cut::kSteps ? plan.shared_bytes * tiles * in.blocks : 0, char(0xff));
  AdjointProblem<double> p{};
  p.rows = s.rows, p.blocks = int(in.blocks), p.d = s.d, p.groups = s.groups, p.variant = s.variant, p.exact = true;
  p.modalities = double(s.modalities), p.options = linear_options<double>(-1, 1e-12, 300, 6, 1);
  p.z = in.z.data(), p.x = in.x.data(), p.cell_sum = in.cell_sum.data();
  p.mask = in.mask.empty() ? nullptr : in.mask.data(), p.g = in.g.data(), p.g_stride = s.rows * s.d;
  p.u = u.data(), p.dx = out.dx.data(), p.dcell_sum = out.dcell_sum.data();
  p.residual = out.residual.data(), p.nfe = out.nfe.data(), p.outcome = out.outcome.data(), p.sums = sums.data();
  p.cotangent[0] = panels[0].data(), p.input[1] = panels[1].data();
  if (fuse) p.input[0] = panels[2].data(), p.cotangent[1] = p.mask ? panels[3].data() : nullptr;
  for (int64_t b = 0; b < in.blocks; ++b) {
    for (int k = 0; k < in.count; ++k) p.params[b][k] = in.params[b * in.count + k].data();
    for (int kind = 0; kind < kSums; ++kind)
      p.vector_grads[b][kind] = out.params[b * in.count + (kind < 2 ? 2 * kind + 1 : kind + 2)].data();
  }
  launch_adjoint<Kind>(HostLauncher<double>(reversed), p, plan, memory.data());
  for (int64_t b = 0; b < in.blocks; ++b)
    for (int which = 0; which < 2; ++which) {
      const double* left = which == 0 || (fuse && p.mask) ? p.cotangent[which] : p.dx;
      const double* right = which == 1 || fuse ? p.input[which] : p.z;
      Array<double>& grad = out.params[b * in.count + 2 * which];
      for (int i = 0; i < s.d; ++i)
        for (int k = 0; k < s.d; ++k) {
          grad[i * s.d + k] = 0;
          for (int64_t r = b * s.rows; r < (b + 1) * s.rows; ++r)
            grad[i * s.d + k] += left[r * s.d + i] * right[r * s.d + k];
        }
    }
  return out;
}

template <class T>
bool same(const Array<T>& a, const Array<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), sizeof(T) * a.size()) == 0);
}
bool same(const Gradients& a, const Gradients& b) {
  bool equal = same(a.dx, b.dx) && same(a.dcell_sum, b.dcell_sum) && same(a.nfe, b.nfe) && same(a.outcome, b.outcome);
  for (size_t i = 0; i < a.params.size(); ++i) equal = equal && same(a.params[i], b.params[i]);
  return equal;
}

void check_close(const Array<double>& given, const Array<double>& expected, const char* what) {
  double difference = 0, norm = 1e-12;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(given[i] - expected[i], 2);
    norm += std::pow(expected[i], 2);
  }
  check(std::sqrt(difference / norm) < 1e-8, what, std::sqrt(difference / norm));
}

template <template <class, int> class Kind>
void check_adjoint(const Shape& shape, bool fuse) {
  const Inputs in(shape, fuse);
  const Gradients expected = by_cpu(in, fuse);
  bool converged = true;
  for (int8_t o : expected.outcome) converged = converged && Outcome(o) == Outcome::kConverged;
  for (size_t limit : {size_t(227) << 10, TileMemory<double, 8>::bytes(shape.d, shape.groups, kSlots), size_t(0)}) {
    const Gradients given = by_bodies<Kind>(in, fuse, limit, false);
    check(same(given, by_bodies<Kind>(in, fuse, limit, true)), "the order of lanes matters");
    bool all = converged;
    for (int8_t o : given.outcome) {
      solved += Outcome(o) == Outcome::kConverged;
      all = all && Outcome(o) == Outcome::kConverged;
      ++all_rows;
    }
    if (!all) continue;
    check_close(given.dx, expected.dx, "dx");
    check_close(given.dcell_sum, expected.dcell_sum, "dcell_sum");
    for (size_t i = 0; i < expected.params.size(); ++i) check_close(given.params[i], expected.params[i], "parameters");
  }
}

int main() {
  check_rows_are_written_whole<float>();
  check_rows_are_written_whole<double>();
  check_linear_solve();
  int turn = 0;
  for (auto [d, groups] : {std::pair<int, int>{4, 1}, {12, 4}, {20, 5}, {33, 1}, {50, 2}, {66, 33}})
    for (int64_t rows : {0, 1, 8, 17, 33}) {
      const Shape shape{1 + turn % 3, rows, d, groups, turn % 2 == 1, turn % 3 == 1};
      check_adjoint<CellTile>(shape, false);
      check_adjoint<FuseTile>(shape, true);
      ++turn;
    }
  check(solved > all_rows * 9 / 10, "too few rows converge");
  std::printf("bodies of the CUDA kernels: %lld checks, %lld of %lld rows converged\n", checks, solved, all_rows);
}
