// The rows of a block as maps of one row, and the fixed vectors that iterations begin with.
#pragma once

#include "kernels.h"
#include "row_cell.h"
#include "row_fuse.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

// One row of a block's map, or its Jacobian, whose values are double precision whatever the storage.
template <class T>
auto row_jacobian(const SomeCellRows<T>& p, int64_t row, Arena<double>& memory, int32_t* indices) {
  const int64_t i = row / p.rows;
  const T* x = p.x[i] + row % p.rows * p.d;
  return CellJacobian<double, T>(p.params + 10 * i, x, p.skip, p.d, p.groups, memory, indices);
}
template <class T>
auto row_map(const SomeCellRows<T>& p, int64_t row, Arena<T>& memory) {
  const int64_t i = row / p.rows;
  return CellRow<T, T>(p.params + 10 * i, p.x[i] + row % p.rows * p.d, p.skip, p.d, p.groups, memory);
}
template <class T>
FuseInputs<T> row_inputs(const SomeFuseRows<T>& p, int64_t row) {
  const int64_t at = row * p.d;
  return {p.x + at, p.cell_sum + at, p.mask ? p.mask + at : nullptr, p.modalities, p.relu_last};
}
template <class T>
auto row_jacobian(const SomeFuseRows<T>& p, int64_t row, Arena<double>& memory, int32_t* indices) {
  return FuseJacobian<double, T>(p.params, row_inputs(p, row), p.d, p.groups, memory, indices);
}
template <class T>
auto row_map(const SomeFuseRows<T>& p, int64_t row, Arena<T>& memory) {
  return FuseRow<T, T>(p.params, row_inputs(p, row), p.d, p.groups, memory);
}
template <class T, class Rows>
using JacobianOf = decltype(row_jacobian(std::declval<Rows>(), 0, std::declval<Arena<double>&>(), nullptr));

// A random number of mean 0 and variance 1, about normal: the i-th of start k. SplitMix64, four draws added.
inline double start_value(int64_t k, int64_t i) {
  double sum = 0;
  for (int64_t q = 0; q < 4; ++q) {
    uint64_t x = (uint64_t(k) << 40 | uint64_t(4 * i + q)) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    sum += double((x ^ (x >> 31)) >> 11) / double(int64_t(1) << 53) - 0.5;
  }
  return sum * 1.7320508;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
