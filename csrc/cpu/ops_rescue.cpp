// Operators that mend the rows which a solve left behind: unpack tensors, call the kernels. Schemas:
// deqfuse/backends/cpu_native.py.
#include "tensors.h"

namespace deqfuse {
namespace {

using Mended = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// A block whose rows are chosen; everything in the compute dtype.
struct Block {
  Tensor x;
  Tensors params;
  Tensor which;
  int64_t modalities, rows, d, groups;
  ScalarType dtype;

  // `blocks`: how many maps there are, `size`: of so many parameters each.
  Block(Tensor injections, Tensors weights, Tensor chosen, int64_t n, int64_t num_groups, int64_t blocks, int64_t size)
      : x(injections), params(weights), which(chosen), modalities(n), rows(x.size(-2)), d(x.size(-1)),
        groups(num_groups), dtype(compute_dtype(x)) {
    expect_sizes(dtype, d, groups);
    prepare(x, dtype);
    prepare(params, dtype);
    expect(x, blocks * rows * d, dtype, "x");
    expect_params(params, 0, blocks, size, d, dtype);
    expect(which, which.numel(), ScalarType::Long, "which");
    const int64_t* chosen_rows = data<int64_t>(which);
    for (int64_t i = 0; i < which.numel(); ++i)
      STD_TORCH_CHECK(chosen_rows[i] >= 0 && chosen_rows[i] < blocks * rows, "deqfuse: which: expected rows below ",
                      blocks * rows, ", got ", chosen_rows[i]);
  }
  template <class T, class Rows>
  void point(Rows& p, const std::vector<const T*>& from) const {
    p.modalities = modalities;
    p.rows = rows;
    p.d = d;
    p.groups = groups;
    p.params = from.data();
    p.which = data<int64_t>(which);
    p.count = which.numel();
  }
};

Tensor copy_of(const Tensor& t, int64_t count, ScalarType dtype, const char* name) {
  expect(t, count, dtype, name);
  return torch::stable::clone(t);
}

// What a solve found, copied: rows that are not mended stay as they are.
struct Found {
  Tensor z, residual, nfe, outcome;
  template <class T, class P>
  void point(P& p) const {
    p.z = data<T>(z);
    p.residual = data<T>(residual);
    p.nfe = data<int32_t>(nfe);
    p.outcome = data<int8_t>(outcome);
  }
};
Found copies(const Block& block, int64_t rows, const Tensor& z, const Tensor& residual, const Tensor& nfe,
             const Tensor& outcome, int64_t most) {
  STD_TORCH_CHECK(most >= 0 && most <= std::numeric_limits<int32_t>::max(),
                  "deqfuse: max_jacobians: expected at least 0, got ", most);
  return {copy_of(z, rows * block.d, block.dtype, "z"), copy_of(residual, rows, block.dtype, "residual"),
          copy_of(nfe, rows, ScalarType::Int, "nfe"), copy_of(outcome, rows, ScalarType::Char, "outcome")};
}

Mended rescue_cells(Tensor x, Tensors params, Tensor z, Tensor residual, Tensor nfe, Tensor outcome, Tensor which,
                    int64_t groups, bool skip, double tol, int64_t most) {
  const int64_t n = x.size(0);
  const Block block(x, params, which, n, groups, n, 10);
  const Found found = copies(block, n * block.rows, z, residual, nfe, outcome, most);
  by_dtype(block.x, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(block.params), from = slices<const T>(data<T>(block.x), n, block.rows * block.d);
    RescueProblem<T, SomeCellRows<T>> p{};
    block.point<T>(p.rows, in);
    found.point<T>(p);
    p.rows.skip = skip;
    p.rows.x = from.data();
    p.tol = tol;
    p.most = int(most);
    table.rescue_cells(p, threads(), parallel);
  });
  return {found.z, found.residual, found.nfe, found.outcome};
}

Mended rescue_fuse(Tensor x, Tensor cell_sum, Tensors params, std::optional<Tensor> mask, Tensor z, Tensor residual,
                   Tensor nfe, Tensor outcome, Tensor which, int64_t modalities, int64_t groups, bool relu_last,
                   double tol, int64_t most) {
  const Block block(x, params, which, modalities, groups, 1, 6);
  const Found found = copies(block, block.rows, z, residual, nfe, outcome, most);
  prepare(cell_sum, block.dtype);
  prepare(mask, block.dtype);
  expect(cell_sum, block.rows * block.d, block.dtype, "cell_sum");
  expect(mask, block.rows * block.d, block.dtype, "mask");
  by_dtype(block.x, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(block.params);
    RescueProblem<T, SomeFuseRows<T>> p{};
    block.point<T>(p.rows, in);
    found.point<T>(p);
    p.rows.relu_last = relu_last;
    p.rows.x = data<T>(block.x);
    p.rows.cell_sum = data<T>(cell_sum);
    p.rows.mask = data<T>(mask);
    p.tol = tol;
    p.most = int(most);
    table.rescue_fuse(p, threads(), parallel);
  });
  return {found.z, found.residual, found.nfe, found.outcome};
}

}  // namespace
}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) {
  m.impl("cpu_rescue_cells", TORCH_BOX(&deqfuse::rescue_cells));
  m.impl("cpu_rescue_fuse", TORCH_BOX(&deqfuse::rescue_fuse));
}
