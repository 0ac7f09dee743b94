// The lanes of a warp that go on together.
#pragma once
#include "exec.h"

namespace ptx {

// Groups at the same place become one.
void mergeGroups(Warp& w);
// Lanes of the group that may go on together: all of each member mask are here.
u32 complete(Warp& w, const Instr& in, u32 act);
// Lets lanes go on that wait for each other in bar.warp.sync at different places; false: none do.
bool resolveWarpSync(Warp& w);

}  // namespace ptx
