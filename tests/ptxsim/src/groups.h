// The lanes of a warp that go on together.
#pragma once
#include "exec.h"

namespace ptx {

// f(mask, lanes) for every member mask among some lanes and the lanes that name it.
template <class F>
void forMasks(Warp& w, const Instr& in, u32 lanes, F f) {
  const u32* masks = w.r<u32>(in.memMask);
  while (lanes) {
    const u32 mask = masks[__builtin_ctz(lanes)];
    u32 part = 0;
    for (u32 q = lanes; q; q &= q - 1)
      if (masks[__builtin_ctz(q)] == mask) part |= 1u << __builtin_ctz(q);
    lanes &= ~part;
    f(mask, part);
  }
}
// Groups at the same place become one.
void mergeGroups(Warp& w);
// Lanes of the group that may go on together: all of each member mask are here.
u32 complete(Warp& w, const Instr& in, u32 act);
// Lets lanes go on that wait for each other in bar.warp.sync at different places; false: none do.
bool resolveWarpSync(Warp& w);

}  // namespace ptx
