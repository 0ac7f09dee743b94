// A warp and a CTA while they run.
#pragma once
#include "sim.h"

namespace ptx {

struct Group {
  s32 pc;
  u32 mask;
  u8 state;
};  // 0 runs, 1 waits for lanes of its warp, 2 waits at a barrier

struct AsyncCopy {
  u64 dst;
  u8 bytes;
  u8 lane;
  u8 data[16];
  u32 pc;
};

struct Warp {
  Cta* cta;
  std::vector<u8> file;
  u8* regs;
  u32 index, alive, firstTid;
  std::vector<Group> groups;
  u32 time = 1, fullTime = 0;
  u32 known[32][32];
  u32 pc;  // of the running instruction
  // cp.async: per lane, groups of copies
  std::vector<AsyncCopy> open[32];
  std::vector<std::vector<AsyncCopy>> committed[32];
  template <class T>
  T* r(s32 offset) const {
    return reinterpret_cast<T*>(regs + offset);
  }
};

struct Cta {
  const Launch* l;
  const Function* f;
  u32 id[3], uid, epoch;
  std::vector<Warp> warps;
  std::vector<u8> shared, sharedInit;
  std::vector<Cell> sharedCells;
  std::mt19937_64* rng;
  std::vector<u8> local;  // threads * localBytes
  u32 alive;
  bool barAny, barAll;
  u32 barCount;
  u64 steps = 0, laneSteps = 0;
};

void report(const char* kind, Warp& w, const Instr& i, s64 otherPc, const std::string& detail);
// The bytes of an access of one lane, checked; null if it must not happen.
u8* access(Warp& w, const Instr& i, u32 lane, Space space, u64 addr, u32 size, int what, const u8* value);
enum { kRead = 0, kWrite = 1, kAtomic = 2, kAsyncIssue = 3, kAsyncDone = 4 };
void finishAsync(Warp& w, const Instr& i, u32 lane, u32 keep);
void syncLanes(Warp& w, u32 part);

#define FOR_LANES(m, ...)                  \
  if ((m) == ~0u) {                        \
    for (int l = 0; l < 32; ++l) {         \
      __VA_ARGS__;                         \
    }                                      \
  } else {                                 \
    for (u32 q_ = (m); q_; q_ &= q_ - 1) { \
      const int l = __builtin_ctz(q_);     \
      __VA_ARGS__;                         \
    }                                      \
  }

}  // namespace ptx
