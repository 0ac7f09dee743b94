// The adjoint operators of either device: unpack tensors, allocate results, launch, multiply the panels of the weights'
// gradients. Schemas: deqfuse/backends/cuda_native.py.
//
// Device: place(tensor), shared_limit(), and run<Kind>(problem, plan, step_memory) on the current stream.
#pragma once

#include "../cpu/tensors.h"
#include "adjoint.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// A^T B over the rows: (rows, d) each, by the matrix product of torch, whose precision switches it follows. One for each
// matrix: slices of a batched product would share a storage, and an operator's results may not.
inline Tensor weight_gradient(const Tensor& cotangent, const Tensor& input) {
  return torch::stable::matmul(torch::stable::transpose(cotangent, 0, 1), input);
}

template <class Device>
class AdjointCall {
 public:
  AdjointCall(const Device& device, const Tensor& z, int64_t blocks, bool want_params, const Options& options,
              int64_t mode)
      : device_(device),
        place_(device.place(z)),
        dtype_(z.scalar_type()),
        blocks_(blocks),
        rows_(z.size(-2)),
        d_(z.size(-1)),
        want_(want_params),
        mode_(mode),
        options_(options) {
    options.expect();
    expect_sizes(dtype_, d_, 1);
    STD_TORCH_CHECK(rows_ <= std::numeric_limits<int32_t>::max(), "deqfuse: expected at most 2^31 - 1 rows, got ",
                    rows_);
    STD_TORCH_CHECK(d_ <= 1 << 15, "deqfuse: expected at most 32768 features, got ", d_);
  }

  Tensor matrices() const { return empty({blocks_, rows_, d_}, dtype_, place_); }
  Tensor matrices_if_wanted() const { return empty({want_ ? blocks_ : 0, rows_, d_}, dtype_, place_); }

  // Runs f on a problem of a number type, for every kMaxBlocks blocks.
  template <template <class, int> class Kind, class Fill>
  void run(int64_t groups, const Tensors& params, const Tensors& grads, const Statistics& statistics, Fill fill) const {
    if (dtype_ == ScalarType::Float)
      run_as<Kind, float>(groups, params, grads, statistics, fill);
    else
      run_as<Kind, double>(groups, params, grads, statistics, fill);
  }

 private:
  template <template <class, int> class Kind, class T, class Fill>
  void run_as(int64_t groups, const Tensors& params, const Tensors& grads, const Statistics& statistics,
              Fill fill) const {
    using Op = Kind<T, kStepRows>;
    const TilePlan plan = make_plan<T>(int(d_), int(groups), device_.shared_limit());
    const int64_t tiles = (rows_ + plan.rows - 1) / plan.rows;
    // Never empty where gradients are wanted: its address says so.
    const Tensor u = matrices(), sums = empty({want_ ? blocks_ * tiles * Op::kSums * d_ + 1 : 0}, dtype_, place_);
    const bool steps = plan.cut == Cut::kSteps;
    const Tensor memory =
        empty({steps ? int64_t(plan.shared_bytes) * tiles * std::min<int64_t>(blocks_, kMaxBlocks) : 0},
              ScalarType::Byte, place_);
    for (int64_t begin = 0; begin < blocks_; begin += kMaxBlocks) {
      const int64_t count = std::min<int64_t>(blocks_ - begin, kMaxBlocks), at = begin * rows_, size = at * d_;
      AdjointProblem<T> p{};
      p.rows = rows_;
      p.blocks = int(count);
      p.d = int(d_);
      p.groups = int(groups);
      p.options = linear_options<T>(int(mode_), options_.tol, int(std::min<int64_t>(options_.max_iter, 1 << 30)),
                                    int(options_.history), options_.beta);
      p.u = data<T>(u) + size;
      p.residual = data<T>(statistics.residual) + at;
      p.nfe = data<int32_t>(statistics.nfe) + at;
      p.outcome = data<int8_t>(statistics.outcome) + at;
      p.sums = want_ ? data<T>(sums) + begin * tiles * Op::kSums * d_ : nullptr;
      for (int64_t b = 0; b < count; ++b) {
        const int64_t first = (begin + b) * Op::kParams;
        for (int k = 0; k < Op::kParams; ++k) p.params[b][k] = data<const T>(params[first + k]);
        for (int kind = 0; want_ && kind < Op::kSums; ++kind)
          p.vector_grads[b][kind] = data<T>(grads[first + (kind < 2 ? 2 * kind + 1 : kind + 2)]);
      }
      fill(p, size);
      device_.template run<Kind>(p, plan, memory.data_ptr());
    }
  }

  const Device& device_;
  const Place place_;
  const ScalarType dtype_;
  const int64_t blocks_, rows_, d_;
  const bool want_;
  const int64_t mode_;
  const Options options_;
};

// Gradients to be filled in: vectors, and places for matrices.
inline Tensors vector_grads(const Tensors& params, int64_t size, bool want, Place place) {
  Tensors out;
  for (size_t i = 0; want && i < params.size(); ++i) {
    const bool matrix = int64_t(i) % size == 0 || int64_t(i) % size == 2;
    out.push_back(matrix ? params[i] : empty({params[i].size(0)}, params[i].scalar_type(), place));
  }
  return out;
}

// A kernel may only be given what its device can reach.
inline void expect_beside(const Tensor& z, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == z.is_cuda() && t.get_device_index() == z.get_device_index(), "deqfuse: ", name,
                  ": expected a tensor on the device of the equilibria");
}

template <class T>
T* data_or_null(const Tensor& t, bool there, int64_t at) {
  return there ? data<T>(t) + at : nullptr;
}

template <class Device>
std::tuple<Tensor, Tensors, Tensor, Tensor, Tensor> adjoint_cells_on(const Device& device, const Tensor& g,
                                                                     const Tensor& z, const Tensor& x,
                                                                     const Tensors& params, bool want_params,
                                                                     int64_t groups, bool skip, int64_t mode,
                                                                     const Options& options, bool allow_tf32) {
  const int64_t n = z.size(0), rows = z.size(1), d = z.size(2);
  const ScalarType dtype = z.scalar_type();
  const AdjointCall<Device> call(device, z, n, want_params, options, mode);
  const bool shared = n > 1 && g.dim() == 3 && g.stride(0) == 0;  // one cotangent for all modalities
  const Tensor cotangents = shared ? torch::stable::select(g, 0, 0) : g;
  expect_sizes(dtype, d, groups);
  expect(z, n * rows * d, dtype, "z");
  expect(cotangents, (shared ? 1 : n) * rows * d, dtype, "grad_z");
  expect(x, n * rows * d, dtype, "x");
  expect_params(params, 0, n, 10, d, dtype);
  for (const Tensor& t : params) expect_beside(z, t, "params");
  expect_beside(z, g, "grad_z");
  expect_beside(z, x, "x");
  const Place place = device.place(z);
  const Statistics statistics({n, rows}, dtype, place);
  const Tensor dx = call.matrices(), dy1 = call.matrices_if_wanted(), hidden = call.matrices_if_wanted();
  Tensors grads = vector_grads(params, 10, want_params, place);
  call.template run<CellTile>(groups, params, grads, statistics, [&](auto& p, int64_t at) {
    using T = std::remove_pointer_t<decltype(p.u)>;
    p.variant = skip;
    p.exact = !allow_tf32;
    p.z = data<T>(z) + at;
    p.x = data<T>(x) + at;
    p.g = data<T>(cotangents) + (shared ? 0 : at);
    p.g_stride = shared ? 0 : rows * d;
    p.dx = data<T>(dx) + at;
    p.cotangent[0] = data_or_null<T>(dy1, want_params, at);
    p.input[1] = data_or_null<T>(hidden, want_params, at);
  });
  for (int64_t i = 0; want_params && i < n; ++i) {
    auto of = [&](const Tensor& t) { return torch::stable::select(t, 0, i); };
    grads[10 * i] = weight_gradient(of(dy1), of(z));
    grads[10 * i + 2] = weight_gradient(of(dx), of(hidden));
  }
  return {dx, grads, statistics.residual, statistics.nfe, statistics.outcome};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensors, Tensor, Tensor, Tensor> adjoint_fuse_on(
    const Device& device, const Tensor& g, const Tensor& z, const Tensor& x, const Tensor& cell_sum,
    const Tensors& params, bool want_params, const std::optional<Tensor>& mask, int64_t modalities, int64_t groups,
    bool relu_last, int64_t mode, const Options& options, bool allow_tf32, const std::optional<Tensor>& counts) {
  const int64_t rows = z.size(0), d = z.size(1);
  const ScalarType dtype = z.scalar_type();
  const AdjointCall<Device> call(device, z, 1, want_params, options, mode);
  expect_sizes(dtype, d, groups);
  expect(z, rows * d, dtype, "z");
  expect(g, rows * d, dtype, "grad_z");
  expect(x, rows * d, dtype, "x_fuse");
  expect(cell_sum, rows * d, dtype, "cell_sum");
  expect(mask, rows * d, dtype, "mask");
  expect(counts, rows, dtype, "counts");
  expect_params(params, 0, 1, 6, d, dtype);
  for (const Tensor& t : params) expect_beside(z, t, "params");
  for (const Tensor* t : {&g, &x, &cell_sum}) expect_beside(z, *t, "grad_z, x_fuse, cell_sum");
  if (mask) expect_beside(z, *mask, "mask");
  if (counts) expect_beside(z, *counts, "counts");
  const Place place = device.place(z);
  const Statistics statistics({rows}, dtype, place);
  const Shape shape{rows, d}, wanted{want_params ? rows : 0, d}, masked{want_params && mask ? rows : 0, d};
  const Tensor dx = empty(shape, dtype, place), dcell_sum = empty(shape, dtype, place);
  const Tensor dgate = empty(wanted, dtype, place), gate_input = empty(wanted, dtype, place);
  const Tensor q = empty(wanted, dtype, place), dcombined = empty(masked, dtype, place);
  Tensors grads = vector_grads(params, 6, want_params, place);
  call.template run<FuseTile>(groups, params, grads, statistics, [&](auto& p, int64_t) {
    using T = std::remove_pointer_t<decltype(p.u)>;
    p.variant = relu_last;
    p.exact = !allow_tf32;
    p.modalities = counts ? T(1) : T(modalities);
    p.counts = data<T>(counts);
    p.z = data<T>(z);
    p.x = data<T>(x);
    p.g = data<T>(g);
    p.cell_sum = data<T>(cell_sum);
    p.mask = data<T>(mask);
    p.dx = data<T>(dx);
    p.dcell_sum = data<T>(dcell_sum);
    p.cotangent[0] = data_or_null<T>(dgate, want_params, 0);
    p.input[0] = data_or_null<T>(gate_input, want_params, 0);
    p.input[1] = data_or_null<T>(q, want_params, 0);
    p.cotangent[1] = data_or_null<T>(dcombined, want_params && mask, 0);
  });
  if (want_params) {
    grads[0] = weight_gradient(dgate, gate_input);
    grads[2] = weight_gradient(mask ? dcombined : dx, q);
  }
  return {dx, dcell_sum, grads, statistics.residual, statistics.nfe, statistics.outcome};
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
