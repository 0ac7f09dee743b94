// The operator of unit-size injections: unpack tensors, allocate results, call the kernel. Schema:
// deqfuse/backends/cpu_native.py.
#include "tensors.h"

namespace deqfuse {
namespace {

// `x` N times (B, d); `grads` as many, of the results, or none where these are asked for.
Tensors unit_size(Tensors x, Tensors grads) {
  STD_TORCH_CHECK(!x.empty() && x[0].dim() == 2, "deqfuse: x: expected tensors (B, d)");
  STD_TORCH_CHECK(grads.empty() || grads.size() == x.size(), "deqfuse: grads: expected ", x.size(), " tensors, got ",
                  grads.size());
  const Tensors given = x;
  const int64_t rows = x[0].size(0), d = x[0].size(1);
  const ScalarType dtype = compute_dtype(x[0]);
  prepare(x, dtype);
  prepare(grads, dtype);
  for (const Tensor& t : x) expect(t, rows * d, dtype, "x");
  for (const Tensor& t : grads) expect(t, rows * d, dtype, "grads");
  Tensors out = empty_like(x);
  by_dtype(x[0], [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto from = pointers<const T>(x), of = pointers<const T>(grads);
    const auto to = pointers<T>(out);
    table.unit_size({int64_t(x.size()), rows, d, from.data(), grads.empty() ? nullptr : of.data(), to.data()},
                    threads(), parallel);
  });
  return like(std::move(out), given);
}

}  // namespace
}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) { m.impl("cpu_unit_size", TORCH_BOX(&deqfuse::unit_size)); }
