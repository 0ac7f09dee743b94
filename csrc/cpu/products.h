// Which products an instruction set has: those of gemm.h, or for float32 where it has a matrix unit those of amx.h, and
// where it multiplies 16-bit integers those of vnni.h.
//
//   StraightForm, TransposedForm   how product() wants A and A^T: a copy, where that is not how torch holds A
//   work_tiles<NV>(d)                tiles of d * R values that product() works in
//   Cotangents, Inputs             where the factors of a product over the rows of a batch are kept
//   outer_product()                that product, kGradientColumns at a time
#pragma once

#include "gemm.h"
#include "tasks.h"
#if defined(DEQFUSE_AMX)
#include "amx.h"
#elif defined(DEQFUSE_VNNI)
#include "vnni.h"
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

#ifdef DEQFUSE_VNNI
template <class T, int NV>
using StraightForm = StraightPairs;
template <class T, int NV>
using TransposedForm = TransposedPairs<block_rows(NV)>;
#else
template <class T, int NV>
using StraightForm = Straight<T>;
template <class T, int NV>
using TransposedForm = Transposed<T, block_rows(NV)>;
#endif
template <class T, int NV>
using Cotangents = Strips<T, NV>;
template <class T, int NV>
constexpr int64_t kGradientColumns = kGradientVectors * kLanes<T>;
template <class T, int NV>
using Inputs = Panels<T, NV, kGradientColumns<T, NV>>;
template <int NV>
int64_t work_tiles(int64_t) {
#ifdef DEQFUSE_VNNI
  return 1;
#else
  return 0;
#endif
}

#endif

// The matrices of `blocks` blocks, two each, in a form, for so many products with each. params: as in kernels.h,
// `stride` per block.
template <class T, class Form>
class Matrices {
 public:
  // `ready`: copies that were made before, `ready_stride` apart, or null.
  Matrices(const T* const* params, int64_t blocks, int64_t stride, int64_t d, Uses uses, const T* ready = nullptr,
           int64_t ready_stride = 0)
      : params_(params),
        blocks_(blocks),
        stride_(stride),
        d_(d),
        form_(d, uses),
        ready_(ready),
        ready_stride_(ready_stride),
        size_(ready ? 0 : form_.size()),
        copies_(2 * blocks * size_) {}

  typename Form::Matrix at(int64_t block, int which) const {
    return form_.matrix(weight(block, which), ready_ ? ready(block, which) : copy(block, which));
  }
  const T* ready(int64_t block, int which) const {
    return ready_ ? ready_ + (2 * block + which) * ready_stride_ : nullptr;
  }

  // Making the copies, before the first use: tasks of some output rows each.
  int64_t tasks() const { return size_ > 0 ? 2 * blocks_ * pieces() : 0; }
  void run(int64_t task) const {
    const int64_t block = task / pieces() / 2, begin = task % pieces() * step();
    const int which = int(task / pieces() % 2);
    form_.pack(weight(block, which), copy(block, which), begin, begin + step() < d_ ? begin + step() : d_);
  }

 private:
  static int64_t step() { return round_up(64, Form::kStep); }
  int64_t pieces() const { return (d_ + step() - 1) / step(); }
  const T* weight(int64_t block, int which) const { return params_[block * stride_ + 2 * which]; }
  T* copy(int64_t block, int which) const { return size_ > 0 ? copies_.get() + (2 * block + which) * size_ : nullptr; }

  const T* const* params_;
  const int64_t blocks_, stride_, d_;
  const Form form_;
  const T* ready_;
  const int64_t ready_stride_, size_;
  Scratch<T> copies_;
};

template <class... All>
void copy_all(int threads, ParallelFor parallel, const All&... matrices) {
  run_tasks((matrices.tasks() + ...), threads, parallel, [&](int64_t t) {
    const auto run = [&](const auto& m) {
      if (t >= 0 && t < m.tasks()) m.run(t);
      t -= m.tasks();
    };
    (run(matrices), ...);
  });
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
