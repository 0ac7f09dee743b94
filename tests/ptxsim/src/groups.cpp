#include "groups.h"
#include <map>
#include "state.h"

namespace ptx {

void mergeGroups(Warp& w) {
  for (size_t a = 0; a < w.groups.size(); ++a)
    for (size_t b = a + 1; b < w.groups.size();) {
      Group &x = w.groups[a], &y = w.groups[b];
      if (x.pc == y.pc && (x.state == 2) == (y.state == 2)) {
        x.mask |= y.mask;
        if (x.state != 2) x.state = 0;
        w.groups.erase(w.groups.begin() + b);
      } else
        ++b;
    }
}

u32 complete(Warp& w, const Instr& in, u32 act) {
  u32 ready = 0;
  forMasks(w, in, act, [&](u32 mask, u32 part) {
    if (part & ~mask)
      report("lane outside its own member mask", w, in, -1, "mask " + hex(mask) + " lanes " + hex(part));
    if (!((mask & w.alive) & ~part)) ready |= part;
  });
  return ready;
}

bool resolveWarpSync(Warp& w) {
  std::map<u32, u32> waiting;
  const Function& f = *w.cta->f;
  for (Group& g : w.groups) {
    if (g.state != 1) continue;
    const Instr& in = f.code[g.pc];
    if (f.text[in.text].find("bar . warp") == std::string::npos &&
        f.text[in.text].find("bar.warp") == std::string::npos)
      continue;
    const u32* mm = w.r<u32>(in.memMask);
    for (u32 q = g.mask; q; q &= q - 1) waiting[mm[__builtin_ctz(q)]] |= 1u << __builtin_ctz(q);
  }
  u32 go = 0;
  for (auto& [mask, lanes] : waiting)
    if (!((mask & w.alive) & ~lanes)) {
      go |= lanes;
      syncLanes(w, lanes);
    }
  if (!go) return false;
  std::vector<Group> next;
  for (Group& g : w.groups) {
    if (g.state != 1 || !(g.mask & go)) {
      next.push_back(g);
      continue;
    }
    if (g.mask & ~go) next.push_back({g.pc, g.mask & ~go, 1});
    next.push_back({g.pc + 1, g.mask & go, 0});
  }
  w.groups = next;
  mergeGroups(w);
  return true;
}

}  // namespace ptx
