// Which products an instruction set has: those of gemm.h, or, where it has a matrix unit, for float32, those of amx.h.
//
//   StraightForm, TransposedForm   how product() wants A and A^T: a copy, where that is not how torch holds A
//   work_tiles<NV>(d)                tiles of d * R values that product() works in
//   Cotangents, Inputs             where the factors of a product over the rows of a batch are kept
//   outer_product()                that product, kGradientColumns at a time
#pragma once

#include "gemm.h"
#include "tasks.h"
#ifdef DEQFUSE_AMX
#include "amx.h"
#endif

namespace deqfuse {
namespace DEQFUSE_ISA {

#ifdef DEQFUSE_AMX

template <class T, int NV>
using StraightForm = SplitCopy<false>;
template <class T, int NV>
using TransposedForm = SplitCopy<true>;
template <class T, int NV>
using Cotangents = SplitCotangents<NV>;
template <class T, int NV>
using Inputs = SplitInputs<NV>;
template <class T, int NV>
constexpr int64_t kGradientColumns = 64;
template <int NV>
int64_t work_tiles(int64_t d) {
  return blocks_of(work_size<NV>(d), NV * 16 * d);
}

#else

template <class T, int NV>
using StraightForm = Straight<T>;
template <class T, int NV>
using TransposedForm = Transposed<T, block_rows(NV)>;
template <class T, int NV>
using Cotangents = Panels<T, NV, block_rows(NV)>;
template <class T, int NV>
using Inputs = Panels<T, NV, NV * kLanes<T> >;
template <class T, int NV>
constexpr int64_t kGradientColumns = NV* kLanes<T>;
template <int NV>
int64_t work_tiles(int64_t) {
  return 0;
}

#endif

// The matrices of `blocks` blocks, two each, in a form, for about so many products with each. params: as in kernels.h,
// `stride` per block.
template <class T, class Form>
class Matrices {
 public:
  Matrices(const T* const* params, int64_t blocks, int64_t stride, int64_t d, int64_t products)
      : params_(params),
        blocks_(blocks),
        stride_(stride),
        d_(d),
        size_(Form::size(d, products)),
        copies_(2 * blocks * size_) {}

  typename Form::Matrix at(int64_t block, int which) const {
    return Form::matrix(weight(block, which), copy(block, which), d_);
  }

  // Making the copies, before the first use: tasks of some output rows each.
  int64_t tasks() const { return size_ > 0 ? 2 * blocks_ * pieces() : 0; }
  void run(int64_t task) const {
    const int64_t block = task / pieces() / 2, begin = task % pieces() * step();
    const int which = int(task / pieces() % 2);
    Form::pack(weight(block, which), copy(block, which), d_, begin, begin + step() < d_ ? begin + step() : d_);
  }

 private:
  static int64_t step() { return round_up(64, Form::kStep); }
  int64_t pieces() const { return (d_ + step() - 1) / step(); }
  const T* weight(int64_t block, int which) const { return params_[block * stride_ + 2 * which]; }
  T* copy(int64_t block, int which) const { return size_ > 0 ? copies_.get() + (2 * block + which) * size_ : nullptr; }

  const T* const* params_;
  const int64_t blocks_, stride_, d_, size_;
  Scratch<T> copies_;
};

template <class First, class Second>
void copy_all(const First& first, const Second& second, int threads, ParallelFor parallel) {
  run_tasks(first.tasks() + second.tasks(), threads, parallel, [&](int64_t t) {
    if (t < first.tasks())
      first.run(t);
    else
      second.run(t - first.tasks());
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
