// What an instruction set's kernel file offers to the operators: plain functions on raw pointers.
#pragma once

#include <cstdint>

namespace deqfuse {

template <class T>
struct CellProblem {
  int64_t modalities, rows, d, groups;
  bool skip;
  const T* const* x;             // N times (B, d)
  const bool* present;           // (N, B), or null where all are; the others' equilibria are zero
  const T* z0;                   // (N, B, d) or null
  const T* const* params;        // N * 10, the order of CellParams
  double tol, beta, lam;
  int max_iter, history;
  T *z, *residual;               // (N, B, d), (N, B)
  int32_t* nfe;                  // (N, B)
  int8_t* outcome;               // (N, B)
  T* trace;                      // (N, B) per step, steps trace_stride apart; or null
  int64_t trace_stride;
};

template <class T>
struct FuseProblem {
  int64_t modalities, rows, d, groups;
  bool relu_last;
  const T *x, *cell_sum, *mask, *z0;  // (B, d); mask and z0 may be null
  const T* const* params;             // 6, the order of FuseParams
  double tol, beta, lam;
  int max_iter, history;
  T *z, *copy, *residual;             // copy: z once more, or null
  int32_t* nfe;
  int8_t* outcome;
  T* trace;
  int64_t trace_stride;
};

// The whole layer: the cells, then the fuse step, whose x and cell_sum are made of those that are present.
template <class T>
struct LayerProblem {
  int64_t rows, d;
  CellProblem<T> cells;
  FuseProblem<T> fuse;
  const T *weights, *bias;  // x_fuse = sum_i weights_i x_i + bias; (N,), and (1,) or null
  const T* prepared;        // what prepare_layer made for these parameters, sizes and options, without starts; or null
};

// Modes of an adjoint: iterate to tol; and then solve the rows that are left by LU factors.
constexpr int kIterate = -1, kSolveLeft = -2;

// The backward of either block: u = (I - J^T)^-1 g per row, then one VJP.
template <class T>
struct AdjointCommon {
  int64_t modalities, rows, d, groups;
  const T* z;
  const T* const* params;
  int mode;  // k >= 0: the Neumann series cut after k applications; or one of the two above
  double tol, beta, lam;
  int max_iter, history;
  T* residual;
  int32_t* nfe;
  int8_t* outcome;
  T* const* dparams;  // one per entry of params, or null when not wanted
};

template <class T>
struct CellAdjointProblem : AdjointCommon<T> {
  bool skip;
  const T *const *g, *const *x;  // N times (B, d)
  const bool* present;           // (N, B), or null where all are; the others' gradients are zero
  T* const* dx;
};

template <class T>
struct FuseAdjointProblem : AdjointCommon<T> {
  bool relu_last;
  const T *g, *x, *cell_sum, *mask;  // (B, d)
  T *dx, *dcell_sum;
};

// The fuse step's backward, then the cells', which receive its dcell_sum.
template <class T>
struct LayerAdjointProblem {
  int64_t rows, d;
  CellAdjointProblem<T> cells;
  FuseAdjointProblem<T> fuse;
  const T *weights, *bias;
  const T* g_cells;      // (N, B, d), what else the cells receive, or null
  T *dweights, *dbias;   // null when the parameters' gradients are not wanted; dbias also without a bias
};

// The Jacobian penalty of a layer at given states: per row and block the sum over probes v of |J^T v|^2, and the gradients
// of the sum of all of these, the states held constant.
template <class T>
struct PenaltyProblem {
  int64_t modalities, rows, d, groups, probes;
  bool skip, relu_last;
  const T *states, *noise;              // (N + 1, B, d); the probes, (K, N + 1, B, d)
  const T* const* x;                    // N times (B, d)
  const bool* present;                  // (N, B), or null where all are; the others' values and gradients are zero
  const T *mask, *weights, *bias;       // (B, d) or null; (N,); (1,) or null
  const T* const* params;               // of the cells, then the fuse step's
  T* value;                             // (N + 1, B)
  T* const* dx;
  T* const* dparams;                    // one per entry of params, or null when not wanted, as the next two
  T *dweights, *dbias;                  // dbias also null without a bias
};

// Rows of N tensors (B, d), each divided by its root mean square, or the gradient of that.
template <class T>
struct UnitProblem {
  int64_t tensors, rows, d;
  const T* const* x;
  const T* const* grads;  // of the results; null where these are asked for
  T* const* out;
};

// One Anderson step of rows whose map is evaluated elsewhere; all arrays are updated in place.
template <class T>
struct StepProblem {
  int64_t rows, n, step;
  int history, max_iter;
  double tol, beta, lam;
  const T* fz;                          // (R, n)
  T *z, *best, *images, *residuals;     // (R, n), (R, n), (m, R, n), (m, R, n)
  T *gram, *best_residual, *trace;      // (R, m, m), (R,), (steps, R) or null
  int32_t *nfe, *best_at;               // (R,)
  int8_t* outcome;                      // (R,)
  bool* active;                         // (R,)
};

// Some rows of a block, to be worked on one at a time: (N * B) rows of the cells, or the B of the fuse step.
template <class T>
struct SomeRows {
  int64_t modalities, rows, d, groups;
  const T* const* params;
  const int64_t* which;
  int64_t count;
};
template <class T>
struct SomeCellRows : SomeRows<T> {
  bool skip;
  const T* const* x;  // N times (B, d)
};
template <class T>
struct SomeFuseRows : SomeRows<T> {
  bool relu_last;
  const T *x, *cell_sum, *mask;  // (B, d); mask may be null
};

// What a solve found, for all rows of the block; updated in place where a row is mended.
template <class T, class Rows>
struct RescueProblem {
  Rows rows;
  double tol;
  int most;  // Jacobians of a row
  T *z, *residual;
  int32_t* nfe;
  int8_t* outcome;
};

// Runs body(i) for i in [0, count) on torch's threads.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t i, void* context), void* context);

template <class T>
struct Kernels {
  void (*solve_cells)(const CellProblem<T>&, int threads, ParallelFor);
  void (*solve_fuse)(const FuseProblem<T>&, int threads, ParallelFor);
  void (*solve_layer)(const LayerProblem<T>&, int threads, ParallelFor);
  int64_t (*prepared_size)(const LayerProblem<T>&);  // values that prepare_layer writes, from a multiple of 64 bytes on
  void (*prepare_layer)(const LayerProblem<T>&, T* prepared, int threads, ParallelFor);
  void (*adjoint_cells)(const CellAdjointProblem<T>&, int threads, ParallelFor);
  void (*adjoint_fuse)(const FuseAdjointProblem<T>&, int threads, ParallelFor);
  void (*adjoint_layer)(const LayerAdjointProblem<T>&, int threads, ParallelFor);
  void (*penalty_layer)(const PenaltyProblem<T>&, int threads, ParallelFor);
  void (*unit_size)(const UnitProblem<T>&, int threads, ParallelFor);
  void (*anderson_step)(const StepProblem<T>&, int threads, ParallelFor);
  void (*rescue_cells)(const RescueProblem<T, SomeCellRows<T>>&, int threads, ParallelFor);
  void (*rescue_fuse)(const RescueProblem<T, SomeFuseRows<T>>&, int threads, ParallelFor);
};

// How a problem is cut: rows that iterate together, and the tiles (rows x d values) of their solver's state.
struct Plan {
  int64_t rows_per_tile, tiles_of_state;
};

struct KernelTable {
  const char* name;
  int bytes;
  Plan (*plan)(int64_t rows, int64_t d, int64_t itemsize, int history);
  Kernels<float> f32;
  Kernels<double> f64;
};

const KernelTable& kernels_base();
const KernelTable& kernels_avx2();
const KernelTable& kernels_avx512();
const KernelTable& kernels_vnni();
const KernelTable& kernels_amx();
bool may_use_amx();  // the matrix unit, which a process has to ask the kernel for

}  // namespace deqfuse
