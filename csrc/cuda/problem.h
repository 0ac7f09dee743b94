// What an adjoint is asked, as a kernel receives it; where a tile of rows keeps its vectors; how a problem is cut.
#pragma once

#include <cstddef>

#include "../common/bicgstab.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kMaxBlocks = 16;  // blocks (modalities) of one launch: their pointers travel as kernel arguments

// The backward of `blocks` blocks of one kind: u = (I - J^T)^-1 g for each row, then one VJP. Matrices are row-major,
// (rows, d) for each block, one block after the other.
template <class T>
struct AdjointProblem {
  int64_t rows;
  int blocks, d, groups;
  bool variant;  // cells: the skip; fuse step: relu last
  bool exact;    // products in full float32 rather than TF32
  T modalities;
  const T* counts;  // fuse step: each row's own number of modalities, where `modalities` is 1; or null
  LinearOptions<T> options;
  const T *z, *x, *cell_sum, *mask;  // mask may be null
  const T* g;
  int64_t g_stride;  // from one block's cotangents to the next one's: 0 where they share them
  T* u;              // answers, of the scaled problem
  T *dx, *dcell_sum;
  T* residual;
  int32_t* nfe;
  int8_t* outcome;
  // What the parameters' gradients are made of, or null. Matrix k: cotangent[k]^T input[k] over all rows; vectors: the
  // sums over each tile's rows, (blocks, tiles, kinds, d), in the order of the parameters.
  T *cotangent[2], *input[2], *sums;
  const T* params[kMaxBlocks][10];
  T* vector_grads[kMaxBlocks][8];
};

// A tile's vectors. The fuse step keeps z, its gate and its normalised values in the first three.
enum Slot { kXHat1, kXHat2, kXHat3, kX, kResidual, kShadow, kDirection, kV, kWork, kExtra, kSlots };
// Where products are launches of their own, they cannot overwrite what they read.
constexpr int kStepSlots = kSlots + 1;

DEQFUSE_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Row stride of a vector slot: rows four banks apart feed a product without conflicts.
DEQFUSE_INLINE int slot_stride(int d) { return round_up(d, 8) + 4; }
// Row stride of weights in shared memory: eight banks apart, as the transposed product wants them.
DEQFUSE_INLINE int weight_stride(int d) { return round_up(d, 16) + 8; }

template <class T, int kRows>
class TileMemory {
 public:
  static DEQFUSE_INLINE size_t bytes(int d, int groups, int slots) {
    const size_t values = size_t(slots) * kRows * slot_stride(d) + 3 * size_t(kRows) * groups;
    return (values * sizeof(T) + kRows * (sizeof(LinearRow<T>) + size_t(d)) + sizeof(int) + 15) / 16 * 16;
  }
  DEQFUSE_INLINE TileMemory(void* base, int d, int groups, int slots) : stride(slot_stride(d)), d_(d), groups_(groups) {
    values_ = static_cast<T*>(base);
    rstd_ = values_ + slots * kRows * stride;
    rows_ = reinterpret_cast<LinearRow<T>*>(rstd_ + 3 * kRows * groups);
    signs_ = reinterpret_cast<int8_t*>(rows_ + kRows);
  }
  DEQFUSE_INLINE T* slot(int which, int row = 0) const { return values_ + (which * kRows + row) * stride; }
  // Inverse standard deviations of norm 0 .. 2.
  DEQFUSE_INLINE T* rstd(int norm, int row) const { return rstd_ + (norm * kRows + row) * groups_; }
  DEQFUSE_INLINE LinearRow<T>& row(int r) const { return rows_[r]; }
  // Relu signs: bit 0 of the cell's inner relu, bit 1 of its last (and of the fuse step's).
  DEQFUSE_INLINE int8_t* signs(int row) const { return signs_ + row * d_; }

  const int stride;

 private:
  const int d_, groups_;
  T *values_, *rstd_;
  LinearRow<T>* rows_;
  int8_t* signs_;
};

// Whole solves with the weights in shared memory; whole solves that read them through L2; a launch per stage.
enum class Cut { kResident, kStreamed, kSteps };

constexpr int kStepRows = 16;
constexpr int kWholeMax = 256;  // above, one block's reading of all weights takes longer than launches do

struct TilePlan {
  Cut cut;
  int rows, threads;
  size_t shared_bytes;  // steps: bytes of global memory for each tile
};

// The widest tile that fits. Never decided by the number of rows: answers do not depend on the batch.
template <class T>
TilePlan make_plan(int d, int groups, size_t shared_limit) {
  const size_t weights = 2 * size_t(round_up(d, 8)) * weight_stride(d) * sizeof(T);
  constexpr int kWide = sizeof(T) == 4 ? 16 : 8;
  const size_t wide = TileMemory<T, kWide>::bytes(d, groups, kSlots),
               narrow = TileMemory<T, 8>::bytes(d, groups, kSlots);
  if (d <= 128 && weights + wide <= shared_limit) return {Cut::kResident, kWide, 256, weights + wide};
  if (d <= kWholeMax && wide <= shared_limit) return {Cut::kStreamed, kWide, 512, wide};
  if (d <= kWholeMax && narrow <= shared_limit) return {Cut::kStreamed, 8, 512, narrow};
  return {Cut::kSteps, kStepRows, 512, TileMemory<T, kStepRows>::bytes(d, groups, kStepSlots)};
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
