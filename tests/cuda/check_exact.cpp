// Products in full float32 on a unit that cuts its sums off: how far they are from the true ones. Run by
// test_cuda_host.py, which says what they may be. Prints the error of csrc/cuda/exact.h, and of a sum that stays in
// the unit, both relative to the sum of all magnitudes.
#define DEQFUSE_ISA test
#include <cstdio>
#include <random>

#include "cuda/host_policy.h"

using namespace deqfuse::test;

int main() {
  constexpr int kLength = 256, kDepth = HostUnit::kDepth;
  std::mt19937 bits(0);
  std::uniform_real_distribution<float> draw(0.5f, 1.5f);  // of one sign, so that what is cut off adds up
  double worst[2] = {};
  for (int trial = 0; trial < 1000; ++trial) {
    float ours[1] = {}, kept[1] = {};
    double truth = 0;
    for (int k = 0; k < kLength; k += kDepth) {
      float a[kDepth], b[kDepth], high[kDepth], low[kDepth], right[kDepth], rest[kDepth];
      for (int q = 0; q < kDepth; ++q) {
        a[q] = draw(bits), b[q] = draw(bits);
        truth += double(a[q]) * b[q];
        high[q] = HostUnit::rounded(a[q]), low[q] = HostUnit::rounded(a[q] - high[q]);
        right[q] = HostUnit::rounded(b[q]), rest[q] = HostUnit::rounded(b[q] - right[q]);
      }
      add_exact_product<HostUnit>(ours, a, b);
      HostUnit::multiply(kept, low, right);
      HostUnit::multiply(kept, high, rest);
      HostUnit::multiply(kept, high, right);
    }
    worst[0] = std::fmax(worst[0], std::fabs(ours[0] - truth) / truth);
    worst[1] = std::fmax(worst[1], std::fabs(kept[0] - truth) / truth);
  }
  std::printf("%g %g\n", worst[0], worst[1]);
}
