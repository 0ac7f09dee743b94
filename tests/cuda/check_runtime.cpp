// What csrc/cuda/runtime.h asks of the CUDA runtime, on a stand-in for it; run by test_cuda_host.py.
#define DEQFUSE_ISA test
#include "cuda/runtime.h"
#include <cstdio>
#include <thread>
#include <vector>

cudaError_t last = cudaSuccess;
thread_local int current = 0;
int set_to = 0, sets = 0;
cudaError_t fail(cudaError_t error) { return last = error; }
extern "C" {
cudaError_t cudaGetLastError() {
  cudaError_t was = last;
  last = cudaSuccess;
  return was;
}
const char* cudaGetErrorString(cudaError_t) { return "some error"; }
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 1000 * (device + 1);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  set_to = value, ++sets;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return current == 2 ? fail(cudaErrorNoKernelImageForDevice) : cudaSuccess;
}
}

using namespace deqfuse::test;
int kernel, other;
#define EXPECT(x) \
  if (!(x)) return std::puts(#x), 1

int main() {
  // An error is told once, and does not wait for the next launch.
  bool thrown = false;
  try {
    expect_success(fail(cudaErrorInvalidValue));
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  EXPECT(thrown && last == cudaSuccess);
  // All that a device has, whatever other threads launch.
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([] {
      for (int k = 0; k < 100; ++k) allow_shared_memory(&kernel);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(sets == 1 && set_to == 1000);
  allow_shared_memory(&other);
  current = 1;
  allow_shared_memory(&kernel);
  EXPECT(sets == 3 && set_to == 2000);
  // Whether the architecture of a device is among those in here; its error stays nowhere.
  EXPECT(cannot_run(&kernel, 0) == nullptr && current == 1);
  EXPECT(cannot_run(&kernel, 2) != nullptr && current == 1 && last == cudaSuccess);
}
