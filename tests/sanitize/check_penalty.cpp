// The Jacobian penalty of every instruction set that runs here, on awkward shapes. What is checked, for float and
// double:
//   - values are |J^T v|^2 with J from central differences of the equations, evaluated naively in double;
//   - gradients agree with central differences of the values along a random direction of all inputs;
//   - any thread count, and a row alone, give the same bits, and so do calls without the parameters' gradients;
//   - a NaN row comes back as NaN and changes no other row;
//   - what is absent has zeros and reaches nothing, and rows that have all modalities keep their bits beside others.
#include "cases.h"

long long slopes_compared = 0, values_compared = 0;

// A layer's inputs: those of its blocks, of which `fuse.x` and `fuse.cell_sum` are made here; states need not be
// equilibria.
struct LayerInputs {
  Shape s;
  int64_t probes;
  Inputs cells, fuse;
  Array<double> weights, bias, states, noise;

  LayerInputs(const Shape& shape, int64_t count, bool biased)
      : s(shape), probes(count), cells(shape, false), fuse(shape, true), weights(normal(s.modalities, 0.3, 1)) {
    if (biased) bias = {0.3};
    states = normal((s.modalities + 1) * s.rows * s.d, 1);
    noise = normal(probes * (s.modalities + 1) * s.rows * s.d, 1);
    join();
  }
  void join() {
    const int64_t size = s.rows * s.d;
    for (int64_t k = 0; k < size; ++k) {
      fuse.x[k] = bias.empty() ? 0 : bias[0];
      fuse.cell_sum[k] = 0;
      for (int64_t i = 0; i < s.modalities; ++i)
        fuse.x[k] += weights[i] * cells.x[i * size + k], fuse.cell_sum[k] += states[i * size + k];
    }
  }
  // What has a gradient, in the order of Penalty::grads.
  Array<Array<double>*> leaves() {
    Array<Array<double>*> out;
    for (Inputs* in : {&cells, &fuse})
      for (auto& p : in->params) out.push_back(&p);
    for (Array<double>* a : {&weights, &bias, &cells.x}) out.push_back(a);
    return out;
  }
};

template <class T>
struct Penalty {
  Array<T> value;
  Array<Array<T>> grads;
};

template <class T>
Penalty<T> penalty(const KernelTable& table, LayerInputs in, int threads, bool want_params = true,
                   const bool* present = nullptr) {
  const Shape& s = in.s;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Array<Array<T>> params;
  for (const Array<double>* leaf : in.leaves()) params.push_back(cast<T>(*leaf));
  Penalty<T> out{Array<T>((s.modalities + 1) * s.rows, nan), params};
  for (auto& g : out.grads) std::fill(g.begin(), g.end(), nan);
  const size_t last = params.size() - 1;  // x
  const auto p = pointers<const T>(params), x = slices<const T>(params[last], s);
  const auto dp = pointers<T>(out.grads), dx = slices<T>(out.grads[last], s);
  const auto states = cast<T>(in.states), noise = cast<T>(in.noise), mask = cast<T>(in.fuse.mask);
  PenaltyProblem<T> problem{};
  problem.modalities = s.modalities, problem.rows = s.rows, problem.d = s.d, problem.groups = s.groups;
  problem.probes = in.probes, problem.skip = problem.relu_last = s.variant;
  problem.states = states.data(), problem.noise = noise.data(), problem.x = x.data(), problem.present = present;
  problem.mask = mask.empty() ? nullptr : mask.data(), problem.weights = p[last - 2];
  problem.bias = in.bias.empty() ? nullptr : p[last - 1], problem.params = p.data();
  problem.value = out.value.data(), problem.dx = dx.data();
  if (want_params) {
    problem.dparams = dp.data(), problem.dweights = dp[last - 2];
    problem.dbias = in.bias.empty() ? nullptr : dp[last - 1];
  }
  of(table, T{}).penalty_layer(problem, threads, parallel);
  return out;
}

template <class T>
bool same(const Penalty<T>& a, const Penalty<T>& b) {
  bool equal = same(a.value, b.value);
  for (size_t i = 0; i < a.grads.size(); ++i) equal = equal && same(a.grads[i], b.grads[i]);
  return equal;
}

// Sum over the probes of |J^T v|^2, J by central differences of the equations.
double naive_value(const LayerInputs& in, int64_t block, int64_t r) {
  const Shape& s = in.s;
  const bool fuse = block == s.modalities;
  const int64_t d = s.d, at = (block * s.rows + r) * d;
  const Inputs& own = fuse ? in.fuse : in.cells;
  double sum = 0;
  for (int64_t j = 0; j < d; ++j) {
    Array<double> column(d);
    for (double step : {1e-6, -1e-6}) {
      Array<double> z(in.states.begin() + at, in.states.begin() + at + d);
      z[j] += step;
      const Array<double> f = image(own, fuse ? 0 : block, r, z);
      for (int64_t i = 0; i < d; ++i) column[i] += f[i] / (2 * step);
    }
    for (int64_t k = 0; k < in.probes; ++k) {
      double out = 0;
      for (int64_t i = 0; i < d; ++i) out += column[i] * in.noise[k * (s.modalities + 1) * s.rows * d + at + i];
      sum += out * out;
    }
  }
  return sum;
}

// The sum of all values along a direction, by the gradients and by central differences.
void check_slope(const KernelTable& table, const LayerInputs& in, const Penalty<double>& out) {
  LayerInputs way = in;
  double slope = 0, scale = 0, error = 1;
  for (size_t i = 0; i < out.grads.size(); ++i) {
    Array<double>& direction = *way.leaves()[i];
    direction = normal(int64_t(direction.size()), 1);
    for (size_t k = 0; k < direction.size(); ++k)
      slope += out.grads[i][k] * direction[k], scale += std::pow(out.grads[i][k], 2);
  }
  for (double step : {1e-5, 1e-6, 1e-7}) {  // the wider, the more signs change on the way
    double difference = 0;
    for (double sign : {step, -step}) {
      LayerInputs moved = in;
      for (size_t i = 0; i < out.grads.size(); ++i)
        for (size_t k = 0; k < way.leaves()[i]->size(); ++k) (*moved.leaves()[i])[k] += sign * (*way.leaves()[i])[k];
      for (double v : penalty<double>(table, moved, 1).value) difference += v / (2 * sign);
    }
    error = std::min(error, std::fabs(slope - difference) / std::sqrt(scale + 1e-12));
  }
  check(error < 1e-4, "gradient is not the slope of the value", error);
  ++slopes_compared;
}

template <class T>
void check_rows(const KernelTable& table, const LayerInputs& in, const Penalty<T>& out) {
  const Shape& s = in.s;
  const int64_t d = s.d, bad = s.rows / 2, blocks = s.modalities + 1;
  LayerInputs poisoned = in;
  poisoned.states[bad * d + d - 1] = std::nan("");
  const Penalty<T> with_nan = penalty<T>(table, poisoned, 2);
  for (int64_t k = 0; k < blocks * s.rows; ++k)
    if (k == bad || k == s.modalities * s.rows + bad)
      check(std::isnan(with_nan.value[k]), "NaN row comes back as numbers");
    else
      check(same(row(with_nan.value, k, 1), row(out.value, k, 1)), "NaN reached another row");
  if (s.modalities > 1) return;
  Shape alone = s;
  alone.rows = 1;
  LayerInputs one(alone, in.probes, !in.bias.empty());
  one.cells.params = in.cells.params, one.fuse.params = in.fuse.params;
  one.weights = in.weights, one.bias = in.bias;
  one.cells.x = row(in.cells.x, s.rows - 1, d), one.fuse.mask = row(in.fuse.mask, s.rows - 1, d);
  const auto part = [&](const Array<double>& all, int64_t count) {
    Array<double> rows;
    for (int64_t k = 0; k < count; ++k)
      for (double v : row(all, (k + 1) * s.rows - 1, d)) rows.push_back(v);
    return rows;
  };
  one.states = part(in.states, blocks), one.noise = part(in.noise, in.probes * blocks);
  const Penalty<T> found = penalty<T>(table, one, 1);
  check(found.value[0] == out.value[s.rows - 1] && found.value[1] == out.value[2 * s.rows - 1] &&
            same(found.grads.back(), row(out.grads.back(), s.rows - 1, d)),
        "a row alone has another penalty");
}

// With NaN wherever something is absent.
template <class T>
void check_presence(const KernelTable& table, LayerInputs in, const Penalty<T>& out) {
  const int64_t n = in.s.modalities, rows = in.s.rows, d = in.s.d, size = (n + 1) * rows * d;
  const std::unique_ptr<bool[]> present(new bool[n * rows]);
  for (int64_t k = 0; k < n * rows; ++k) {
    present[k] = (k * 7 + k / rows) % 5 > 1;
    for (int64_t i = k * d; i < (k + 1) * d && !present[k]; ++i) {
      in.cells.x[i] = in.states[i] = std::nan("");
      for (int64_t probe = 0; probe < in.probes; ++probe) in.noise[probe * size + i] = std::nan("");
    }
  }
  const Penalty<T> found = penalty<T>(table, in, 1, true, present.get());
  check(same(found, penalty<T>(table, in, 3, true, present.get())), "penalty with a mask depends on the thread count");
  const Penalty<T> inputs_only = penalty<T>(table, in, 2, false, present.get());
  check(same(inputs_only.value, found.value) && same(inputs_only.grads.back(), found.grads.back()),
        "penalty with a mask depends on whether the parameters' gradients are wanted");
  for (const auto& grad : found.grads)
    for (T v : grad) check(std::isfinite(v), "what is absent reached a gradient");
  for (int64_t r = 0; r < rows; ++r) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = i * rows + r;
      count += present[k];
      const Array<T> dx = row(found.grads.back(), k, d);
      if (present[k]) check(found.value[k] == out.value[k], "value of a cell that is present");
      else check(found.value[k] == 0 && same(dx, Array<T>(d)), "an absent cell");
    }
    const int64_t k = n * rows + r;
    if (count == 0) check(found.value[k] == 0, "a row with nothing");
    if (count < n) continue;
    check(found.value[k] == out.value[k], "a row with everything");
    for (int64_t i = 0; i < n; ++i)
      check(same(row(found.grads.back(), i * rows + r, d), row(out.grads.back(), i * rows + r, d)), "its gradient");
  }
}

template <class T>
Penalty<T> check_case(const KernelTable& table, const LayerInputs& in) {
  const Penalty<T> out = penalty<T>(table, in, 1);
  check(same(out, penalty<T>(table, in, 3)), "penalty depends on the thread count");
  const Penalty<T> inputs_only = penalty<T>(table, in, 2, false);
  check(same(inputs_only.value, out.value) && same(inputs_only.grads.back(), out.grads.back()),
        "penalty depends on whether the parameters' gradients are wanted");
  for (size_t i = 0; i < out.grads.size(); ++i)
    for (T v : out.grads[i]) check(in.s.rows > 0 ? std::isfinite(v) : v == 0, "gradient", v);
  check_presence(table, in, out);
  if (in.s.rows > 0) check_rows(table, in, out);
  return out;
}

void check_penalty(const KernelTable& table, const Shape& s, int64_t probes, bool biased) {
  now = std::string(table.name) + " penalty N=" + std::to_string(s.modalities) + " B=" + std::to_string(s.rows) +
        " d=" + std::to_string(s.d) + " groups=" + std::to_string(s.groups) + " variant=" + std::to_string(s.variant) +
        " mask=" + std::to_string(s.masked) + " probes=" + std::to_string(probes);
  const LayerInputs in(s, probes, biased);
  const Penalty<float> low = check_case<float>(table, in);
  const Penalty<double> out = check_case<double>(table, in);
  // In groups of two a norm cancels so many digits that differences of it say little.
  if (s.d / s.groups < 3) return;
  check(distance(low.value, out.value) < 1e-3, "value in float differs from double", distance(low.value, out.value));
  for (size_t i = 0; i < out.grads.size(); ++i) {
    if (s.variant && i + 2 == out.grads.size()) continue;  // the bias: a norm in front of the relu makes it vanish
    const double error = distance(low.grads[i], out.grads[i]);
    check(error < 1e-2, "gradient in float differs from double", error);
  }
  if (s.d > 40) return;
  for (int64_t k = 0; k < (s.modalities + 1) * s.rows && k < 40; ++k) {
    const double wanted = naive_value(in, k / s.rows, k % s.rows),
                 error = std::fabs(out.value[k] - wanted) / (wanted + 1e-9);
    check(error < 1e-4, "value is not |J^T v|^2", error);
    ++values_compared;
  }
  if (s.rows > 0) check_slope(table, in, out);
}

// Every other instruction set, from number argv[1] on; without it all.
int main(int argc, char** argv) {
  const std::vector<const KernelTable*> tables = kernel_tables();
  for (size_t i = argc > 1 ? size_t(std::atoi(argv[1])) : 0; i < tables.size(); i += argc > 1 ? 2 : 1) {
    checks = slopes_compared = values_compared = 0;
    int turn = 0;
    for (auto [d, groups] : {std::pair<int64_t, int64_t>{4, 2}, {12, 1}, {20, 4}, {33, 3}, {35, 7}, {66, 2}})
      for (int64_t rows : {0, 1, 15, 17, 33, 70}) {
        ++turn;
        check_penalty(*tables[i], {1 + turn % 3, rows, d, groups, turn % 2 == 0, false, turn % 4 > 1, 0, 0},
                      1 + turn % 5 % 3, turn % 5 < 2);
      }
    check_penalty(*tables[i], {1, 600, 12, 2, true, false, true, 0, 0}, 2, true);  // rows in parts
    for (int64_t rows : {17, 70})  // products in fewer digits: an odd rest of a segment
      check_penalty(*tables[i], {1, rows, 259, 7, rows == 17, false, true, 0, 0}, 2, false);
    if (tables[i]->plan(257, 768, 4, 5).rows_per_tile == 64) {                     // tiles of four vectors
      now = std::string(tables[i]->name) + " penalty of 257 rows, d=768";
      check_case<float>(*tables[i], LayerInputs({1, 257, 768, 4, false, false, true, 0, 0}, 1, false));
    }
    std::printf(
        "%s: penalty, %lld checks, gradients of %lld cases compared with slopes, %lld values with differences\n",
        tables[i]->name, checks, slopes_compared, values_compared);
    check(slopes_compared > 15 && values_compared > 300, "too few cases say anything");
  }
}
