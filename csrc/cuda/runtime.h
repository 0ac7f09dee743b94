// What the library asks of the CUDA runtime besides launches, and how its errors are told.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace deqfuse {
namespace DEQFUSE_ISA {

// The runtime keeps the last error until somebody reads it: left there, it would fail the next good launch.
inline void expect_success(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("deqfuse: CUDA: ") + cudaGetErrorString(status));
}

// Lets a kernel have all the shared memory of the current device's blocks, once for both. A limit set anew for every
// launch could be lowered by another thread's before the launch comes.
inline void allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  expect_success(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  expect_success(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  expect_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  allowed.insert({kernel, device});
}

// Whether this library holds the kernel in a form that the device runs; null, or what the runtime says.
inline const char* cannot_run(const void* kernel, int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  cudaSetDevice(before);
  cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
