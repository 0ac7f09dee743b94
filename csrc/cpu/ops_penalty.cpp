// The operator of the Jacobian penalty: unpack tensors, allocate results, call the kernel. Schema:
// deqfuse/backends/cpu_native.py.
#include "tensors.h"

namespace deqfuse {
namespace {

using Penalty = std::tuple<Tensor, Tensors, Tensors>;

// `probes` (K, N + 1, B, d); the rest as in adjoint_layer. Gradients come in the compute dtype: they belong to a sum
// over all rows, which 16 bits may not hold before it is scaled.
Penalty penalty_layer(Tensor probes, Tensor states, Tensors x, Tensors params, bool want_params,
                      std::optional<Tensor> mask, std::optional<Tensor> present, int64_t groups, bool skip,
                      bool relu_last) {
  STD_TORCH_CHECK(states.dim() == 3 && probes.dim() == 4,
                  "deqfuse: expected states (N + 1, B, d) and probes "
                  "(K, N + 1, B, d), got ",
                  states.dim(), " and ", probes.dim(), " dimensions");
  const int64_t n = int64_t(x.size()), rows = states.size(1), d = states.size(2), weights = 10 * n + 6;
  const ScalarType dtype = states.scalar_type();
  const bool biased = int64_t(params.size()) > weights + 1;
  const int64_t count = probes.size(0);
  expect_sizes(dtype, d, groups);
  prepare(states, dtype);
  prepare(probes, dtype);
  prepare(x, dtype);
  prepare(params, dtype);
  prepare(mask, dtype);
  expect(states, (n + 1) * rows * d, dtype, "states");
  expect(probes, count * (n + 1) * rows * d, dtype, "probes");
  for (const Tensor& t : x) expect(t, rows * d, dtype, "x");
  expect(mask, rows * d, dtype, "mask");
  expect(present, n * rows, ScalarType::Bool, "present");
  expect_layer_params(params, n, d, dtype);
  STD_TORCH_CHECK(count > 0, "deqfuse: probes: expected at least one, got none");
  const Tensor value = empty({n + 1, rows}, dtype);
  Tensors dx = empty_like(x), dparams = want_params ? empty_like(params) : Tensors();
  by_dtype(states, [&](const auto& table, auto zero) {
    using T = decltype(zero);
    const auto in = pointers<const T>(params), from = pointers<const T>(x);
    const auto out = pointers<T>(dparams), to = pointers<T>(dx);
    PenaltyProblem<T> p{};
    p.modalities = n;
    p.rows = rows;
    p.d = d;
    p.groups = groups;
    p.probes = count;
    p.skip = skip;
    p.relu_last = relu_last;
    p.states = data<T>(states);
    p.noise = data<T>(probes);
    p.x = from.data();
    p.present = data<bool>(present);
    p.mask = data<T>(mask);
    p.weights = in[weights];
    p.bias = biased ? in[weights + 1] : nullptr;
    p.params = in.data();
    p.value = data<T>(value);
    p.dx = to.data();
    p.dparams = want_params ? out.data() : nullptr;
    p.dweights = want_params ? out[weights] : nullptr;
    p.dbias = want_params && biased ? out[weights + 1] : nullptr;
    table.penalty_layer(p, threads(), parallel);
  });
  return {value, std::move(dx), std::move(dparams)};
}

}  // namespace
}  // namespace deqfuse

STABLE_TORCH_LIBRARY_IMPL(deqfuse, CPU, m) { m.impl("cpu_penalty_layer", TORCH_BOX(&deqfuse::penalty_layer)); }
