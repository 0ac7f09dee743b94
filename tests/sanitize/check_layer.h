// The whole layer is its blocks, fed by hand, bit for bit.
#pragma once
#include "calls.h"

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

  // `present`: (N, rows), or null. `prepare`: with the matrices brought into form before, which starts rule out.
  Solution<T> solve(const KernelTable& table, double tol, int threads, const bool* present = nullptr,
                    bool prepare = false) const {
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
    problem.cells.present = present;
    problem.cells.x = from.data(), problem.cells.params = p.data(), problem.fuse.params = p.data() + 10 * n;
    problem.cells.z0 = maybe(z0_cells), problem.fuse.z0 = maybe(z0_fuse), problem.fuse.mask = maybe(mask);
    const Kernels<T>& kernels = of(table, T{});
    const std::unique_ptr<T, decltype(&std::free)> prepared(
        prepare ? static_cast<T*>(std::aligned_alloc(64, (kernels.prepared_size(problem) * sizeof(T) + 63) / 64 * 64))
                : nullptr,
        std::free);
    if (prepare) kernels.prepare_layer(problem, prepared.get(), threads, parallel);
    problem.prepared = prepared.get();
    kernels.solve_layer(problem, threads, parallel);
    return out;
  }

  // all: the parameters', weights', bias's (as it came where there is none), and N times dx.
  Gradients<T> adjoint(const KernelTable& table, const Array<T>& z, bool use_cells, double tol, int threads,
                       bool want_params = true, const bool* present = nullptr) const {
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
    problem.cells.present = present;
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

// The adjoint of rows that lack modalities, at their solution `out`: rows that have all have the bits of that at `full`,
// and what is not there reaches nothing.
template <class T>
void check_adjoint_of_presence(const KernelTable& table, const Layer<T>& layer, double tol, const bool* present,
                               const Array<T>& out, const Gradients<T>& full) {
  const int64_t n = layer.n, rows = layer.rows, d = layer.s.d;
  const Gradients<T> u = layer.adjoint(table, out, true, tol, 1, true, present);
  check(same(u, layer.adjoint(table, out, true, tol, 3, true, present)), "adjoint with a mask depends on the thread count");
  const Gradients<T> inputs_only = layer.adjoint(table, out, true, tol, 2, false, present);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const size_t at = layer.params.size() + 2 + i;
    check(same(u.all[at], inputs_only.all[at]), "adjoint with a mask: dx alone");
    for (int64_t r = 0; r < rows; ++r) {
      const Array<T> dx = row(u.all[at], r, d);
      int64_t count = 0;
      for (int64_t j = 0; j < n; ++j) count += present[j * rows + r];
      if (!present[i * rows + r])
        check(same(dx, Array<T>(d)) && u.nfe[i * rows + r] == 0 && u.residual[i * rows + r] == 0 &&
                  Outcome(u.outcome[i * rows + r]) == Outcome::kConverged, "adjoint of an absent cell");
      if (count == 0)
        check(u.nfe[n * rows + r] == 0 && Outcome(u.outcome[n * rows + r]) == Outcome::kConverged, "of an empty row");
      if (count == n) check(same(dx, row(full.all[at], r, d)), "adjoint of a row with everything");
      for (T v : dx) finite = finite && std::isfinite(v);
    }
  }
  for (size_t i = 0; finite && i < layer.params.size() + (layer.biased ? 2 : 1); ++i)
    for (T v : u.all[i]) check(std::isfinite(v), "what is absent reached a parameter");
}

// Rows that lack modalities: cells that are present have the bits of `full`, a solve of all of them.
template <class T>
void check_presence(const KernelTable& table, Layer<T> layer, double tol, const Solution<T>& full) {
  const int64_t n = layer.n, rows = layer.rows, d = layer.s.d;
  const Gradients<T> with_all = layer.adjoint(table, full.z, true, tol, 2);
  const std::unique_ptr<bool[]> present(new bool[n * rows]);
  for (int64_t k = 0; k < n * rows; ++k) {
    present[k] = (k * 7 + k / rows) % 5 > 1;
    for (int64_t i = 0; i < d && !present[k]; ++i) layer.x[k / rows][k % rows * d + i] = nan<T>();
  }
  const Solution<T> out = layer.solve(table, tol, 1, present.get()), other = layer.solve(table, tol, 3, present.get());
  check(same(out.z, other.z) && same(out.nfe, other.nfe) && same(out.outcome, other.outcome),
        "layer with a mask depends on the thread count");
  for (int64_t r = 0; r < rows; ++r) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = i * rows + r;
      count += present[k];
      const Array<T> z = row(out.z, k, d);
      if (present[k]) check(same(z, row(full.z, k, d)) && out.nfe[k] == full.nfe[k], "a cell that is present");
      else
        check(same(z, Array<T>(d)) && out.nfe[k] == 0 && Outcome(out.outcome[k]) == Outcome::kAbsent, "an absent cell");
    }
    const int64_t k = n * rows + r;
    if (count == n) check(same(row(out.z, k, d), row(full.z, k, d)), "a row with everything");
    if (count == 0) check(Outcome(out.outcome[k]) == Outcome::kEmpty && std::isnan(out.z[k * d]), "a row with nothing");
    else check(out.nfe[k] > 0 && Outcome(out.outcome[k]) != Outcome::kEmpty, "a row with something");
  }
  check_adjoint_of_presence(table, layer, tol, present.get(), out.z, with_all);
}

// Prepared parameters give the same bits.
template <class T>
void check_prepared(const KernelTable& table, Layer<T> layer, double tol) {
  layer.z0_cells.clear(), layer.z0_fuse.clear();
  const Solution<T> out = layer.solve(table, tol, 1);
  for (int threads : {1, 3}) {
    const Solution<T> other = layer.solve(table, tol, threads, nullptr, true);
    check(same(out.z, other.z) && same(out.residual, other.residual) && same(out.nfe, other.nfe) &&
              same(out.outcome, other.outcome) && same(out.trace, other.trace), "a prepared layer");
  }
}

template <class T>
void check_layer(const KernelTable& table, const Inputs& cells, Inputs fuse, bool biased, bool use_cells, double tol) {
  const Layer<T> layer(cells, fuse, biased);
  const int64_t n = layer.n, size = layer.size;
  const Solution<T> out = layer.solve(table, tol, 1), other = layer.solve(table, tol, 3);
  check(same(out.z, other.z) && same(out.residual, other.residual) && same(out.nfe, other.nfe) &&
            same(out.outcome, other.outcome) && same(out.trace, other.trace), "layer depends on the thread count");
  check_presence(table, layer, tol, out);
  check_prepared(table, layer, tol);
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

inline void check_layers(const KernelTable& table, const Shape& s, bool biased, bool use_cells) {
  now = std::string(table.name) + " layer N=" + std::to_string(s.modalities) + " B=" + std::to_string(s.rows) +
        " d=" + std::to_string(s.d) + " bias=" + std::to_string(biased) + " g_cells=" + std::to_string(use_cells);
  const std::mt19937 before = random_bits;  // the blocks' problems stay the ones they are without the layers'
  const Inputs cells(s, false), fuse(s, true);
  check_layer<float>(table, cells, fuse, biased, use_cells, 1e-4);
  check_layer<double>(table, cells, fuse, biased, use_cells, 1e-10);
  random_bits = before;
}
