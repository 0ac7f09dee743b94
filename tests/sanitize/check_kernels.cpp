// Every kernel of every instruction set that runs here, on awkward shapes, without torch or Python: for
// sanitizers and for emulators. What is checked, for float and double:
//   - answers satisfy their equation, evaluated naively in double;
//   - gradients agree with central differences of the solve along a random direction of all inputs;
//   - any thread count, and a row alone, give the same bits;
//   - a NaN row comes back as NaN and changes no other row;
//   - the whole layer is its blocks, fed by hand, bit for bit; prepared parameters change nothing.
// Arrays have their exact size, so that a sanitizer sees every access beyond them.
#include "check_blocks.h"
#include "check_layer.h"

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

// Rows of unit size against a naive norm in double; the gradient is orthogonal to the row.
template <class T>
void check_unit(const KernelTable& table, int64_t rows, int64_t d, double tol) {
  now = std::string(table.name) + " unit_size B=" + std::to_string(rows) + " d=" + std::to_string(d);
  const Array<T> x[2] = {cast<T>(normal(rows * d, 1)), cast<T>(normal(rows * d, 2))};
  const Array<T> g[2] = {cast<T>(normal(rows * d, 3)), cast<T>(normal(rows * d, 4))};
  const T *from[] = {x[0].data(), x[1].data()}, *grads[] = {g[0].data(), g[1].data()};
  Array<T> answers[2][2];
  for (int threads : {1, 3}) {
    Array<T> y[2] = {Array<T>(rows * d), Array<T>(rows * d)}, dx[2] = {y[0], y[0]};
    T *to[] = {y[0].data(), y[1].data()}, *back[] = {dx[0].data(), dx[1].data()};
    of(table, T{}).unit_size({2, rows, d, from, nullptr, to}, threads, parallel);
    of(table, T{}).unit_size({2, rows, d, from, grads, back}, threads, parallel);
    for (int i = 0; i < 2; ++i)
      for (int64_t r = 0; r < rows; ++r) {
        double squares = 0, along = 0, size = 0;
        for (int64_t k = r * d; k < (r + 1) * d; ++k) {
          squares += double(x[i][k]) * x[i][k];
          along += double(x[i][k]) * dx[i][k];
          size += std::fabs(double(x[i][k]) * dx[i][k]) + std::fabs(double(x[i][k]) * g[i][k]);
        }
        for (int64_t k = r * d; k < (r + 1) * d; ++k) {
          const double right = x[i][k] * std::sqrt(d / squares);
          check(std::fabs(y[i][k] - right) <= tol * std::fabs(right), "row is not of unit size", y[i][k] - right);
        }
        check(std::fabs(along) <= tol * size * std::sqrt(1 + d / squares), "gradient along the row", along);
      }
    answers[threads > 1][0] = y[1];
    answers[threads > 1][1] = dx[1];
  }
  for (int i = 0; i < 2; ++i) check(same(answers[0][i], answers[1][i]), "unit size depends on the thread count");
}

void check_table(const KernelTable& table) {
  for (int64_t d : {1, 15, 16, 33})
    for (int64_t rows : {0, 1, 1100}) {
      check_unit<float>(table, rows, d, 1e-5);
      check_unit<double>(table, rows, d, 1e-13);
    }
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
    for (int64_t rows : {0, 1, 2, 7, 17, 70, 150})
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
  const std::vector<const KernelTable*> tables = kernel_tables();
  for (size_t i = argc > 1 ? size_t(std::atoi(argv[1])) : 0; i < tables.size(); i += argc > 1 ? 2 : 1) {
    const KernelTable* table = tables[i];
    checks = converged = rows_solved = slopes_compared = series_compared = layers_compared = narrow = stretched = 0;
    check_table(*table);
    if (table->plan(257, 768, 4, 5).rows_per_tile == 64) check_large(*table);
    std::printf("%s: %lld checks, %lld of %lld rows converged, gradients of %lld cases compared with slopes, "
                "%lld with series, %lld layers with their blocks\n",
                table->name, checks, converged, rows_solved, slopes_compared, series_compared, layers_compared);
    const bool enough = slopes_compared > 30 && series_compared > 10 && layers_compared > 100;
    check(converged > rows_solved / 2 && enough, "too few cases say anything");
    check(narrow > 100 && stretched <= narrow / 100, "answers do not satisfy their equations", double(stretched));
  }
}
