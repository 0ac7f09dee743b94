// How the 32 lanes of a warp share out a row: the arithmetic that the device and the host policy have in common.
#pragma once

#include "../common/lane.h"

namespace deqfuse {
namespace DEQFUSE_ISA {

constexpr int kWarp = 32;

template <class T>
struct Two {
  T a, b;
};

// Lanes that work on one group of a row that has so many: all groups at once if there are no more than 32.
DEQFUSE_INLINE int lanes_per_group(int groups) {
  int lanes = kWarp;
  while (lanes > 1 && lanes * groups > kWarp) lanes /= 2;
  return lanes;
}

// The k-th value of group `g` that its lanes take, of n. Groups start in different places, or groups of 32 values would
// all begin in the same bank.
DEQFUSE_INLINE int rotation(int g, int lanes, int n) { return g * lanes % n; }
DEQFUSE_INLINE int rotated(int k, int rotation, int n) {
  const int i = k + rotation;
  return i < n ? i : i - n;
}

}  // namespace DEQFUSE_ISA
}  // namespace deqfuse
