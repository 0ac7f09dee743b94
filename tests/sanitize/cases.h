// Random problems of the kernels, their equations written naively in double, and what a failed check says.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/common/outcome.h"
#include "../../csrc/cpu/kernels.h"

using namespace deqfuse;
template <class T>
using Array = std::vector<T>;

inline std::string now;  // the case that is running
inline long long checks = 0;

inline void check(bool ok, const char* what, double value = 0) {
  ++checks;
  if (ok) return;
  std::printf("FAILED %s: %s (%.3g)\n", now.c_str(), what, value);
  std::exit(1);
}

inline void parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(body, i, context);
  if (count > 0) body(0, context);
  for (std::thread& t : others) t.join();
}

inline std::mt19937 random_bits(0);
inline Array<double> normal(int64_t count, double scale, double mean = 0) {
  std::normal_distribution<double> draw(mean, scale);
  Array<double> out(count);
  for (double& v : out) v = draw(random_bits);
  return out;
}

struct Shape {
  int64_t modalities, rows, d, groups;
  bool variant;  // skip in the cells, relu last in the fuse step
  bool warm, masked;
  int history, max_iter;
};

// All inputs of one block kind. `fuse` has one block, with cell_sum and perhaps a mask; cells have N.
struct Inputs {
  Shape s;
  bool fuse;
  Array<Array<double>> params;
  Array<double> x, z0, cell_sum, mask, g;

  int64_t blocks() const { return fuse ? 1 : s.modalities; }
  Inputs(const Shape& shape, bool is_fuse) : s(shape), fuse(is_fuse) {
    const int64_t d = s.d, size = blocks() * s.rows * d;
    const double n = double(s.modalities), small = 0.1 / std::sqrt(d);
    for (int64_t i = 0; i < blocks(); ++i) {
      params.push_back(normal(d * d, fuse ? 0.25 / n / std::sqrt(d) : 1 / std::sqrt(d)));
      params.push_back(normal(d, 0.3, fuse ? 1 / n : 0));
      params.push_back(normal(d * d, small));
      params.push_back(normal(d, 0.3));
      for (int k = 0; k < (fuse ? 1 : 3); ++k) {
        params.push_back(normal(d, 0.1, 1));
        params.push_back(normal(d, 0.1));
      }
    }
    x = normal(size, 1);
    g = normal(size, 1);
    if (s.warm) z0 = normal(size, 1);
    if (!fuse) return;
    cell_sum = normal(size, 1);
    if (s.masked)
      for (int64_t i = 0; i < size; ++i) mask.push_back(random_bits() % 4 ? 4. / 3 : 0);
  }
  // What the answer depends on differentiably, in the order of Gradients::all.
  Array<Array<double>*> leaves() {
    Array<Array<double>*> out;
    for (auto& p : params) out.push_back(&p);
    out.push_back(&x);
    if (fuse) out.push_back(&cell_sum);
    return out;
  }
};

inline void group_norm(Array<double>& y, const Array<double>& weight, const Array<double>& bias, int64_t groups) {
  const int64_t width = int64_t(y.size()) / groups;
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0, var = 0;
    for (int64_t k = g * width; k < (g + 1) * width; ++k) mean += y[k] / width;
    for (int64_t k = g * width; k < (g + 1) * width; ++k) var += (y[k] - mean) * (y[k] - mean) / width;
    for (int64_t k = g * width; k < (g + 1) * width; ++k)
      y[k] = (y[k] - mean) / std::sqrt(var + 1e-5) * weight[k] + bias[k];
  }
}
inline void relu(Array<double>& y) {
  for (double& v : y) v = v < 0 ? 0 : v;
}
inline Array<double> product(const Array<double>& a, const Array<double>& v) {
  Array<double> out(v.size());
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t k = 0; k < v.size(); ++k) out[i] += a[i * v.size() + k] * v[k];
  return out;
}

// f(z) of row r of block b, as the equations say it.
inline Array<double> image(const Inputs& in, int64_t b, int64_t r, const Array<double>& z) {
  const Shape& s = in.s;
  const int64_t at = (b * s.rows + r) * s.d;
  const Array<double>* p = &in.params[b * 10];
  Array<double> y = product(p[0], z);
  if (in.fuse) {
    const Array<double> sum(in.cell_sum.begin() + at, in.cell_sum.begin() + at + s.d), constant = product(p[0], sum);
    for (int64_t i = 0; i < s.d; ++i) y[i] = z[i] * (s.modalities * (y[i] + p[1][i]) + constant[i]);
    y = product(p[2], y);
    for (int64_t i = 0; i < s.d; ++i) y[i] = (y[i] + p[3][i]) * (in.mask.empty() ? 1 : in.mask[at + i]) + in.x[at + i];
    if (!s.variant) relu(y);
    group_norm(y, p[4], p[5], s.groups);
    if (s.variant) relu(y);
    return y;
  }
  for (int64_t i = 0; i < s.d; ++i) y[i] += p[1][i];
  group_norm(y, p[4], p[5], s.groups);
  relu(y);
  y = product(p[2], y);
  for (int64_t i = 0; i < s.d; ++i) y[i] += p[3][i] + in.x[at + i];
  group_norm(y, p[6], p[7], s.groups);
  for (int64_t i = 0; i < s.d && s.variant; ++i) y[i] += z[i];
  relu(y);
  group_norm(y, p[8], p[9], s.groups);
  return y;
}

template <class T, class From>
Array<T> cast(const Array<From>& a) {
  return Array<T>(a.begin(), a.end());
}
template <class T, class A>
auto pointers(A& arrays) {
  Array<T*> out;
  for (auto& a : arrays) out.push_back(a.data());
  return out;
}
// One pointer per modality.
template <class T, class A>
Array<T*> slices(A& values, const Shape& s) {
  Array<T*> out;
  for (int64_t i = 0; i < s.modalities; ++i) out.push_back(values.data() + i * s.rows * s.d);
  return out;
}
inline const Kernels<float>& of(const KernelTable& t, float) { return t.f32; }
inline const Kernels<double>& of(const KernelTable& t, double) { return t.f64; }

template <class T>
bool same(const Array<T>& a, const Array<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
Array<T> row(const Array<T>& a, int64_t r, int64_t width) {
  return a.empty() ? a : Array<T>(a.begin() + r * width, a.begin() + (r + 1) * width);
}
template <class T>
double distance(const Array<T>& a, const Array<double>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) difference += std::pow(a[i] - b[i], 2), norm += b[i] * b[i];
  return std::sqrt(difference / (norm + 1e-12));
}

// Those that run here.
inline std::vector<const KernelTable*> kernel_tables() {
  std::vector<const KernelTable*> tables{&kernels_base()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kernels_avx2());
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) tables.push_back(&kernels_avx512());
  if (__builtin_cpu_supports("avx512vnni")) tables.push_back(&kernels_vnni());
  if (may_use_amx()) tables.push_back(&kernels_amx());
#endif
  return tables;
}
