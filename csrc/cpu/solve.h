// Forward: the problems of kernels.h cut into tasks, each a run of rows through RowSolver.
#pragma once

#include "anderson.h"
#include "maps.h"
#include "present_rows.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

template <class T, class P>
SolveOptions<T> options(const P& p) {
  return {T(p.tol), p.max_iter, p.history, T(p.beta), T(p.lam)};
}

// What prepare_layer makes: for every matrix the copy that StraightForm wants and the panels of a few rows, the cells'
// first; at the end every cell's at_zero.
template <class T>
struct PreparedLayout {
  StraightForm<T, 1> form;
  int64_t panels_at, stride, zero_at, size;

  explicit PreparedLayout(const LayerProblem<T>& p)
      : form(p.d, Uses{kOften, uses(options<T>(p.cells), true, 1).some}),
        panels_at(round_up(form.size(), kSlack)),
        stride(panels_at + (kFewRows<T> > 0 ? RowPanels<T>::size(p.d) : 0)),
        zero_at((2 * p.cells.modalities + 2) * stride),
        size(zero_at + p.cells.modalities * p.d) {}

 private:
  static constexpr int64_t kOften = 1000;
};

// The matrices of `blocks` blocks as their solves want them.
template <class T, int NV>
struct ForwardMatrices : Matrices<T, StraightForm<T, NV>> {
  // `ready`: where prepare_layer made those of these blocks, as `layout` has them; or null.
  ForwardMatrices(const CellProblem<T>& p, const T* ready = nullptr, const PreparedLayout<T>* layout = nullptr)
      : ForwardMatrices(p, p.modalities, 10, ready, layout) {}
  ForwardMatrices(const FuseProblem<T>& p, const T* ready = nullptr, const PreparedLayout<T>* layout = nullptr)
      : ForwardMatrices(p, 1, 6, ready, layout) {}

  bool has_panels() const { return this->ready(0, 0) != nullptr && kFewRows<T> > 0; }
  // For a few rows.
  RowsMatrix<T> of_rows(int64_t block, int which) const {
    const T* ready = this->ready(block, which);
    return {this->at(block, which), ready ? ready + panels_at_ : nullptr};
  }

 private:
  template <class P>
  ForwardMatrices(const P& p, int64_t blocks, int64_t stride, const T* ready, const PreparedLayout<T>* layout)
      : Matrices<T, StraightForm<T, NV>>(p.params, blocks, stride, p.d,
                                         uses(options<T>(p), p.z0 == nullptr, tiles<NV * kLanes<T>>(p.rows)), ready,
                                         ready ? layout->stride : 0),
        panels_at_(ready ? layout->panels_at : 0) {}
  const int64_t panels_at_;
};

// The rows of one of `blocks` blocks in tasks: two a thread, which even out, of whole tiles; or where there are fewer
// rows than that, one a thread, if these are so few that it takes clearly less than a tile.
template <class T, int NV>
Chunks chunks_of(int64_t rows, int64_t blocks, int threads) {
  const int64_t each = threads > blocks ? threads / blocks : 1;
  if (NV == 1 && rows <= each * (kFewRows<T> / 2)) return Chunks(rows, 1, each);
  return Chunks(rows, NV * kLanes<T>, (2 * threads + blocks - 1) / blocks);
}

// Threads that so many rows of so many blocks are worth. Handing work over takes some microseconds, and copies that one
// thread makes are not in the cache of another. Work is counted in weights times rows, and a matrix itself, which is
// read and copied, as four rows.
inline int threads_for(int64_t rows, int64_t blocks, int64_t d, bool prepared, int threads) {
  const int64_t worth = prepared ? 1 << 16 : 1 << 19;
  return (rows + 4) * blocks * d * d < worth ? 1 : threads;
}

// Runs body(group, rows of the group, begin, end) for all of them; `blocks`: of how many at once.
template <class T, int NV, class Body>
void run_groups(const RowGroups& groups, int64_t count, int64_t blocks, int threads, ParallelFor parallel, Body body) {
  int64_t tasks = 0;
  for (int64_t g = 0; g < count; ++g) tasks += chunks_of<T, NV>(groups.size(g), blocks, threads).count;
  run_tasks(tasks, threads, parallel, [&](int64_t t) {
    int64_t g = 0;
    for (int64_t own; t >= (own = chunks_of<T, NV>(groups.size(g), blocks, threads).count); ++g) t -= own;
    const Chunks chunks = chunks_of<T, NV>(groups.size(g), blocks, threads);
    const int64_t begin = t * chunks.rows;
    body(g, groups.rows(g), begin, chunks.end(begin));
  });
}

// What is said of rows that are not solved.
template <class T, class P>
void leave_out(const P& p, int64_t k, T value, Outcome outcome) {
  for (int64_t i = 0; i < p.d; ++i) p.z[k * p.d + i] = value;
  p.residual[k] = value;
  p.nfe[k] = 0;
  p.outcome[k] = int8_t(outcome);
}

// How the rows of a task lie: f(lanes).
template <class T, int NV, class F>
DEQFUSE_INLINE void with_lanes(const ForwardMatrices<T, NV>& weights, int64_t d, int64_t rows, F f) {
  if constexpr (NV == 1 && kFewRows<T> > 0)
    if (rows <= few_rows<T>(d, weights.has_panels())) return f(FeaturesAsLanes<T>(d, int(rows)));
  f(RowsAsLanes<T, NV>(d));
}
// How a single row lies.
template <class T>
auto one_row(int64_t d) {
  if constexpr (kFewRows<T> > 0) return FeaturesAsLanes<T>(d, 1);
  else return RowsAsLanes<T, 1>(d);
}

template <class T, int NV, int NT>
auto matrix(const RowsAsLanes<T, NT>&, const ForwardMatrices<T, NV>& weights, int64_t block, int which) {
  return weights.at(block, which);
}
template <class T, int NV>
auto matrix(const FeaturesAsLanes<T>&, const ForwardMatrices<T, NV>& weights, int64_t block, int which) {
  return weights.of_rows(block, which);
}

// Solves rows [begin, end) of a problem; map(memory) is their map.
template <class T, int NV, class Map, class P, class Lanes, class Make>
DEQFUSE_INLINE void solve_rows(const P& p, const Lanes& lanes, const RowResults<T>& out, int64_t begin, int64_t end,
                               Make make) {
  using Solver = RowSolver<T, NV, Map, Lanes>;
  const int64_t of_map = Map::tiles(p.d) * lanes.size();
  Scratch<T> memory(of_map + Solver::tiles(p.history) * lanes.size() + kSlack);
  Map map = make(memory.get());
  Solver(map, lanes, options<T>(p), out, memory.get() + of_map).run(begin, end);
}

template <class T, int NV, class Lanes>
auto cell_weights(const CellProblem<T>& p, const ForwardMatrices<T, NV>& weights, const Lanes& lanes, int64_t i,
                  const T* at_zero) {
  const T* const* q = p.params + 10 * i;
  return CellWeights<T, typename Lanes::Matrix>{
      matrix(lanes, weights, i, 0), matrix(lanes, weights, i, 1), q[1], q[3], q[4], q[5], q[6], q[7], q[8], q[9],
      at_zero + i * p.d, p.skip};
}

// Every cell's at_zero, (N, d).
template <class T, int NV>
void cells_at_zero(const CellProblem<T>& p, const ForwardMatrices<T, NV>& weights, T* out, int threads,
                   ParallelFor parallel) {
  run_tasks(p.modalities, threads, parallel, [&](int64_t i) {
    const auto lanes = one_row<T>(p.d);
    Scratch<T> memory((2 + work_tiles<1>(p.d)) * lanes.size() + kSlack);
    cell_at_zero(cell_weights(p, weights, lanes, i, out), lanes, p.groups, memory.get(), out + i * p.d);
  });
}

// With `weights` in place, and perhaps with every cell's at_zero.
template <class T, int NV>
void solve_cells(const CellProblem<T>& p, const ForwardMatrices<T, NV>& weights, const T* at_zero, int threads,
                 ParallelFor parallel) {
  const int64_t d = p.d;
  Scratch<T> made(at_zero == nullptr && p.z0 == nullptr ? p.modalities * d : 0);
  if (at_zero == nullptr && p.z0 == nullptr) cells_at_zero(p, weights, made.get(), threads, parallel);
  if (at_zero == nullptr) at_zero = made.get();
  auto solve = [&](int64_t i, const int64_t* rows, int64_t begin, int64_t end) {
    const int64_t first = i * p.rows;
    T* const trace = p.trace ? p.trace + first : nullptr;
    const RowResults<T> out{p.z + first * d, p.residual + first, p.nfe + first, p.outcome + first,
                            trace,           p.trace_stride,     rows};
    with_lanes<T, NV>(weights, d, end - begin, [&](auto lanes) {
      using Map = CellMap<T, NV, decltype(lanes)>;
      solve_rows<T, NV, Map>(p, lanes, out, begin, end, [&](T* memory) {
        const T* z0 = p.z0 ? p.z0 + first * d : nullptr;
        return Map(cell_weights(p, weights, lanes, i, at_zero), p.x[i], z0, lanes, p.groups, memory);
      });
    });
  };
  if (p.present == nullptr) {
    const Chunks chunks = chunks_of<T, NV>(p.rows, p.modalities, threads);
    run_tasks(p.modalities * chunks.count, threads, parallel, [&](int64_t t) {
      const int64_t begin = t % chunks.count * chunks.rows;
      solve(t / chunks.count, nullptr, begin, chunks.end(begin));
    });
    return;
  }
  const int64_t n = p.modalities, all = n * p.rows;
  for_rows(all, threads, parallel, [&](int64_t k) {
    if (!p.present[k]) leave_out(p, k, T(0), Outcome::kAbsent);
  });
  // The last group: what is absent.
  const RowGroups groups(
      n + 1, all, [&](int64_t k) { return p.present[k] ? k / p.rows : n; },
      [&](int64_t k, int64_t) { return k % p.rows; });
  run_groups<T, NV>(groups, n, n, threads, parallel, solve);
}

template <class T, int NV>
void solve_fuse(const FuseProblem<T>& p, const FuseRows<T>& from, const ForwardMatrices<T, NV>& weights, int threads,
                ParallelFor parallel) {
  const int64_t d = p.d;
  const T* const* q = p.params;
  auto solve = [&](int64_t modalities, const int64_t* rows, int64_t begin, int64_t end) {
    const RowResults<T> out{p.z, p.residual, p.nfe, p.outcome, p.trace, p.trace_stride, rows};
    with_lanes<T, NV>(weights, d, end - begin, [&](auto lanes) {
      using Map = FuseMap<T, NV, decltype(lanes)>;
      const typename Map::Weights fuse{matrix(lanes, weights, 0, 0), matrix(lanes, weights, 0, 1), q[1], q[3], q[4],
                                       q[5], p.relu_last};
      solve_rows<T, NV, Map>(p, lanes, out, begin, end, [&](T* memory) {
        return Map(fuse, T(modalities), from, p.mask, p.z0, lanes, p.groups, memory);
      });
    });
    if (p.copy == nullptr) return;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t at = (rows ? rows[k] : k) * d;
      std::memcpy(p.copy + at, p.z + at, sizeof(T) * d);
    }
  };
  if (from.present == nullptr) {
    const Chunks chunks = chunks_of<T, NV>(p.rows, 1, threads);
    run_tasks(chunks.count, threads, parallel, [&](int64_t t) {
      const int64_t begin = t * chunks.rows;
      solve(p.modalities, nullptr, begin, chunks.end(begin));
    });
    return;
  }
  // Rows with the same number of modalities make a group.
  const RowGroups groups(
      p.modalities + 1, p.rows, [&](int64_t r) { return from.count(r); }, [](int64_t r, int64_t) { return r; });
  for (int64_t k = 0; k < groups.size(0); ++k) {
    const int64_t r = groups.rows(0)[k];
    leave_out(p, r, std::numeric_limits<T>::quiet_NaN(), Outcome::kEmpty);
    if (p.copy) std::memcpy(p.copy + r * d, p.z + r * d, sizeof(T) * d);
  }
  run_groups<T, NV>(groups, p.modalities + 1, 1, threads, parallel,
                    [&](int64_t n, const int64_t* rows, int64_t begin, int64_t end) {
                      if (n > 0) solve(n, rows, begin, end);
                    });
}

template <class T, int NV>
void solve_cells(const CellProblem<T>& p, int threads, ParallelFor parallel) {
  threads = threads_for(p.rows, p.modalities, p.d, false, threads);
  const ForwardMatrices<T, NV> weights(p);
  copy_all(threads, parallel, weights);
  solve_cells<T, NV>(p, weights, nullptr, threads, parallel);
}

template <class T, int NV>
void solve_fuse(const FuseProblem<T>& p, int threads, ParallelFor parallel) {
  threads = threads_for(p.rows, 1, p.d, false, threads);
  const ForwardMatrices<T, NV> weights(p);
  copy_all(threads, parallel, weights);
  solve_fuse<T, NV>(p, {p.x, p.cell_sum}, weights, threads, parallel);
}

// What the fuse step of a layer is made of: the cells' inputs and their equilibria.
template <class T, class P>
FuseRows<T> rows_of_layer(const P& p) {
  return {nullptr, nullptr, p.cells.modalities, p.rows, p.cells.x, p.cells.z, p.weights, p.bias, p.cells.present};
}

template <class T, int NV>
void solve_layer(const LayerProblem<T>& p, int threads, ParallelFor parallel) {
  threads = threads_for(p.rows, p.cells.modalities + 1, p.d, p.prepared != nullptr, threads);
  const PreparedLayout<T> layout(p);
  const T* ready = p.prepared;
  const int64_t own = 2 * p.cells.modalities * layout.stride;
  const ForwardMatrices<T, NV> cells(p.cells, ready, &layout), fuse(p.fuse, ready ? ready + own : nullptr, &layout);
  copy_all(threads, parallel, cells, fuse);
  solve_cells<T, NV>(p.cells, cells, ready ? ready + layout.zero_at : nullptr, threads, parallel);
  solve_fuse<T, NV>(p.fuse, rows_of_layer<T>(p), fuse, threads, parallel);
}

template <class T>
int64_t prepared_size(const LayerProblem<T>& p) {
  return PreparedLayout<T>(p).size;
}

template <class T>
void prepare_layer(const LayerProblem<T>& p, T* prepared, int threads, ParallelFor parallel) {
  const PreparedLayout<T> layout(p);
  const int64_t of_cells = 2 * p.cells.modalities;
  run_tasks(of_cells + 2, threads, parallel, [&](int64_t i) {
    const T* a = i < of_cells ? p.cells.params[i / 2 * 10 + i % 2 * 2] : p.fuse.params[i % 2 * 2];
    layout.form.pack(a, prepared + i * layout.stride, 0, p.d);
    if constexpr (kFewRows<T> > 0) RowPanels<T>::pack(a, prepared + i * layout.stride + layout.panels_at, p.d);
  });
  const ForwardMatrices<T, 1> cells(p.cells, prepared, &layout);
  cells_at_zero(p.cells, cells, prepared + layout.zero_at, threads, parallel);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
