// Tensors as kernels want them: pointers in, results allocated, sizes checked, torch's threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"

namespace deqfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline void parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, context);
  });
}
inline int threads() { return int(torch::stable::get_num_threads()); }

// Where results go.
struct Place {
  int32_t device_type = aoti_torch_device_type_cpu(), index = 0;
};

// Contiguous, uninitialised. Not through the dispatcher: a layer's backward makes dozens.
inline Tensor empty(Sizes sizes, ScalarType dtype, Place place = {}) {
  const size_t dims = sizes.size();
  std::array<int64_t, 4> strides;  // no heap: it takes 3 us for the gradients of a layer
  STD_TORCH_CHECK(dims <= strides.size(), "deqfuse: empty: expected at most 4 dimensions, got ", dims);
  if (dims > 0) strides[dims - 1] = 1;
  for (size_t i = dims; i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dims), sizes.data(), strides.data(), int32_t(dtype),
                                                  place.device_type, place.index, &handle));
  return Tensor(handle);
}
inline Tensors empty_like(const Tensors& tensors, Place place = {}) {
  Tensors out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(empty(t.sizes(), t.scalar_type(), place));
  return out;
}

// 16 bits are computed in float32.
inline ScalarType compute_dtype(const Tensor& t) {
  const ScalarType stored = t.scalar_type();
  return stored == ScalarType::Half || stored == ScalarType::BFloat16 ? ScalarType::Float : stored;
}
// Makes it contiguous and of the compute dtype, as it nearly always is. In Python a layer's tensors would take 10 us.
inline void prepare(Tensor& t, ScalarType dtype) {
  if (t.scalar_type() != dtype || !t.is_contiguous()) t = torch::stable::contiguous(torch::stable::to(t, dtype));
}
inline void prepare(std::optional<Tensor>& t, ScalarType dtype) {
  if (t.has_value()) prepare(*t, dtype);
}
inline void prepare(Tensors& tensors, ScalarType dtype) {
  for (Tensor& t : tensors) prepare(t, dtype);
}
// A gradient in the dtype of what it belongs to.
inline Tensor like(Tensor grad, const Tensor& of) {
  prepare(grad, of.scalar_type());
  return grad;
}
inline Tensors like(Tensors grads, const Tensors& of) {
  for (size_t i = 0; i < grads.size(); ++i) prepare(grads[i], of[i].scalar_type());
  return grads;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<const T>(*t) : nullptr;
}
template <class T>
std::vector<T*> pointers(const Tensors& tensors) {
  std::vector<T*> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(data<T>(t));
  return out;
}
// One pointer for each block of `size` values.
template <class T>
std::vector<T*> slices(T* first, int64_t count, int64_t size) {
  std::vector<T*> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(first + i * size);
  return out;
}

// Kernels trust their sizes. Python has said what is wrong in better words; this is the last line.
inline void expect(const Tensor& t, int64_t count, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.numel() == count && t.scalar_type() == dtype && t.is_contiguous(), "deqfuse: ", name,
                  ": expected ", count, " contiguous values of the compute dtype, got ", t.numel());
}
inline void expect(const std::optional<Tensor>& t, int64_t count, ScalarType dtype, const char* name) {
  if (t.has_value()) expect(*t, count, dtype, name);
}
// Matrices and their biases first, then vectors; `blocks` times.
inline void expect_params(const Tensors& params, int64_t begin, int64_t blocks, int64_t size, int64_t d,
                          ScalarType dtype) {
  STD_TORCH_CHECK(int64_t(params.size()) >= begin + blocks * size, "deqfuse: params: expected ", begin + blocks * size,
                  " tensors, got ", params.size());
  for (int64_t i = 0; i < blocks * size; ++i) {
    const Tensor& t = params[begin + i];
    const bool matrix = i % size == 0 || i % size == 2;
    expect(t, matrix ? d * d : d, dtype, "params");
    STD_TORCH_CHECK(t.dim() == (matrix ? 2 : 1) && t.size(0) == d, "deqfuse: params: expected shape (d, d) or (d,)");
  }
}
// All parameters of a layer: the cells', the fuse step's, modality_weights and, if there is one, injection_bias.
inline void expect_layer_params(const Tensors& params, int64_t n, int64_t d, ScalarType dtype) {
  const int64_t count = int64_t(params.size()), weights = 10 * n + 6;
  STD_TORCH_CHECK(count == weights + 1 || count == weights + 2, "deqfuse: params: expected ", weights + 1, " or ",
                  weights + 2, " tensors, got ", count);
  expect_params(params, 0, n, 10, d, dtype);
  expect_params(params, 10 * n, 1, 6, d, dtype);
  expect(params[weights], n, dtype, "modality_weights");
  if (count > weights + 1) expect(params[weights + 1], 1, dtype, "injection_bias");
}
inline void expect_sizes(ScalarType dtype, int64_t d, int64_t groups) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "deqfuse: expected float32 or float64");
  STD_TORCH_CHECK(d > 0 && groups > 0 && d % groups == 0, "deqfuse: num_groups: expected a divisor of ", d, ", got ",
                  groups);
}

template <class F>
void by_dtype(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Float) f(kernels().f32, float{});
  else f(kernels().f64, double{});
}

// How a block is solved, in either direction.
struct Options {
  double tol;
  int64_t max_iter, history;
  double beta, lam;

  // `steps`: how many a trace can hold; 0: there is none.
  void expect(int64_t steps = 0) const {
    STD_TORCH_CHECK(history >= 0 && history <= 8, "deqfuse: history: expected 0 to 8, got ", history);
    STD_TORCH_CHECK(max_iter >= 0 && (steps == 0 || steps >= max_iter),
                    "deqfuse: max_iter: expected at least 0 and at most the length of the trace, got ", max_iter);
  }
  template <class P>
  void point(P& p) const {
    p.tol = tol;
    p.max_iter = int(std::min<int64_t>(max_iter, std::numeric_limits<int32_t>::max()));
    p.history = int(history);
    p.beta = beta;
    p.lam = lam;
  }
};

constexpr int8_t kAbsent = 7;  // common/outcome.h

// Per-row statistics of blocks x rows, and where a problem of some of these blocks writes them.
struct Statistics {
  Tensor residual, nfe, outcome;
  Statistics(Sizes rows, ScalarType dtype, Place place = {})
      : residual(empty(rows, dtype, place)), nfe(empty(rows, ScalarType::Int, place)),
        outcome(empty(rows, ScalarType::Char, place)) {}
  template <class T, class P>
  void point(P& p, int64_t first_row = 0) const {
    p.residual = data<T>(residual) + first_row;
    p.nfe = data<int32_t>(nfe) + first_row;
    p.outcome = data<int8_t>(outcome) + first_row;
  }
  bool all_converged() const {
    const int8_t* first = data<int8_t>(outcome);
    return std::all_of(first, first + outcome.numel(), [](int8_t row) { return row == 0 || row == kAbsent; });
  }
};

}  // namespace deqfuse
