// Runs a launch: one CTA after the other, its warps in random order.
#include <algorithm>

#include "groups.h"
#include "ops.h"
#include "state.h"

namespace ptx {

constexpr u64 maxSteps = 4000000000ull;

namespace {

struct Stop {};

void releaseBarrier(Cta& cta) {
  s32 pc = -1;
  bool differ = false;
  for (Warp& w : cta.warps) {
    s32 mine = -1;
    for (Group& g : w.groups) {
      if (g.state != 2) continue;
      if (mine >= 0 && mine != g.pc) {
        w.pc = g.pc;
        report("divergent barrier: parts of one warp at different places", w, cta.f->code[g.pc], mine, "");
      }
      mine = g.pc;
      if (pc >= 0 && pc != g.pc) differ = true;
      if (pc >= 0 && cta.f->code[pc].imm != cta.f->code[g.pc].imm) {
        report("barrier numbers differ", w, cta.f->code[g.pc], pc, "");
      }
      pc = g.pc;
    }
  }
  if (differ)
    for (Warp& w : cta.warps)
      for (Group& g : w.groups)
        if (g.state == 2 && g.pc != pc) {
          report("warps wait at different barriers", w, cta.f->code[g.pc], pc, "");
        }
  for (Warp& w : cta.warps) {
    for (Group& g : w.groups) {
      if (g.state != 2) continue;
      const Instr& in = cta.f->code[g.pc];
      if (in.sub == 3) {
        for (u32 q = g.mask; q; q &= q - 1) w.r<u32>(in.o[0])[__builtin_ctz(q)] = cta.barCount;
      } else if (in.sub) {
        const bool r = in.sub == 1 ? cta.barAny : cta.barAll;
        u32* p = w.r<u32>(in.o[0]);
        *p = (*p & ~g.mask) | (r ? g.mask : 0);
      }
      ++g.pc;
      g.state = 0;
    }
    if (w.groups.size() > 1) mergeGroups(w);
  }
  cta.epoch = ++state.epochCounter;
  cta.barAny = false;
  cta.barAll = true;
  cta.barCount = 0;
}

bool runWarp(Warp& w, u32 n) {
  Cta& cta = *w.cta;
  const Instr* code = cta.f->code.data();
  const bool strict = cta.l->strict;
  for (; n; --n) {
    Group* g = nullptr;
    if (w.groups.size() == 1) {
      if (w.groups[0].state == 0) g = &w.groups[0];
    } else
      for (Group& k : w.groups)
        if (k.state == 0 && (!g || k.pc < g->pc)) g = &k;
    if (!g) return false;
    const Instr& in = code[g->pc];
    w.pc = g->pc;
    cta.f->hits[g->pc] = 1;
    const u32 m = g->mask;
    u32 act = m;
    if (in.pred >= 0) {
      const u32 p = *w.r<u32>(in.pred);
      act &= in.predNeg ? ~p : p;
    }
    ++cta.steps;
    cta.laneSteps += __builtin_popcount(act);
    switch (in.kind) {
      case Kind::Normal:
        if (act) in.fn(w, in, act);
        ++g->pc;
        break;
      case Kind::Branch:
        if (act == m)
          g->pc = in.target;
        else if (!act)
          ++g->pc;
        else {
          g->mask = m & ~act;
          ++g->pc;
          w.groups.push_back({in.target, act, 0});
        }
        break;
      case Kind::Exit:
        w.alive &= ~act;
        cta.alive -= __builtin_popcount(act);
        for (Group& k : w.groups)
          if (k.state == 1) k.state = 0;
        if (act == m) {
          w.groups.erase(w.groups.begin() + (g - w.groups.data()));
          if (w.groups.empty()) return false;
        } else {
          g->mask &= ~act;
          ++g->pc;
        }
        break;
      case Kind::WarpSync: {
        const u32 ready = complete(w, in, act);
        if (ready) {
          in.fn(w, in, ready);
          if (!strict && !(in.memMask < 0)) {
            // every .sync instruction orders the memory of its lanes
            forMasks(w, in, ready, [&](u32, u32 part) { syncLanes(w, part); });
          }
        }
        const u32 wait = act & ~ready;
        if (!wait)
          ++g->pc;
        else if (wait == m)
          g->state = 1;
        else {
          g->mask = wait;
          g->state = 1;
          w.groups.push_back({g->pc + 1, m & ~wait, 0});
        }
        break;
      }
      case Kind::Barrier: {
        if (in.o[2] >= 0 && u32(in.o[2]) != cta.l->threads)
          throw Error("unimplemented: a barrier of some threads: " + cta.f->text[in.text]);
        if (in.sub) {
          const u32 p = in.sub2 ? ~*w.r<u32>(in.o[1]) : *w.r<u32>(in.o[1]);
          if (p & act) cta.barAny = true;
          if (~p & act) cta.barAll = false;
          cta.barCount += __builtin_popcount(p & act);
        }
        if (act == m)
          g->state = 2;
        else {
          g->mask = m & ~act;
          const s32 pc = g->pc++;
          if (act) w.groups.push_back({pc, act, 2});
        }
        break;
      }
      case Kind::Trap:
        if (act) {
          report("trap", w, in, -1, "");
          throw Stop();
        }
        ++g->pc;
    }
    if (w.groups.size() > 1) mergeGroups(w);
  }
  return true;
}

void runCta(Cta& cta, std::mt19937_64& rng) {
  std::vector<u32> ready;
  const u32 slice = 1 + rng() % 96;
  for (;;) {
    if (cta.steps > maxSteps) throw Error("too many steps");
    ready.clear();
    for (u32 k = 0; k < cta.warps.size(); ++k)
      for (Group& g : cta.warps[k].groups)
        if (g.state == 0) {
          ready.push_back(k);
          break;
        }
    if (ready.empty()) {
      if (!cta.alive) return;
      u32 waiting = 0;
      for (Warp& w : cta.warps)
        for (Group& g : w.groups)
          if (g.state == 2) waiting += __builtin_popcount(g.mask);
      if (waiting == cta.alive) {
        releaseBarrier(cta);
        continue;
      }
      bool moved = false;
      for (Warp& w : cta.warps) moved |= resolveWarpSync(w);
      if (moved) continue;
      for (Warp& w : cta.warps)
        for (Group& g : w.groups) {
          w.pc = g.pc;
          report("deadlock", w, cta.f->code[g.pc], -1,
                 "warp " + std::to_string(w.index) + " lanes " + hex(g.mask) +
                     (g.state == 2 ? " at a barrier" : " wait for lanes"));
        }
      throw Stop();
    }
    // each warp that is ready, in random order, for a few instructions
    Warp& w = cta.warps[ready[rng() % ready.size()]];
    runWarp(w, 1 + rng() % slice);
  }
}

}  // namespace

void run(Launch& l) {
  const Function& f = *l.f;
  std::mt19937_64 rng(l.seed);
  const u32 ctas = l.grid[0] * l.grid[1] * l.grid[2], W = (l.threads + 31) / 32;
  l.firstCta = state.ctaCounter + 1;
  std::vector<u32> order(ctas);
  for (u32 k = 0; k < ctas; ++k) order[k] = k;
  if (l.seed) std::shuffle(order.begin(), order.end(), rng);
  Cta cta;
  cta.l = &l;
  cta.f = &f;
  cta.rng = &rng;
  const u64 bytes = (u64(f.staticShared) + 127) / 128 * 128 * (f.staticShared > 0) + l.dynShared;
  cta.warps.resize(W);
  for (u32 k = 0; k < W; ++k) cta.warps[k].file.resize(f.regBytes + 128);
  for (u32 number : order) {
    cta.id[0] = number % l.grid[0];
    cta.id[1] = number / l.grid[0] % l.grid[1];
    cta.id[2] = number / l.grid[0] / l.grid[1];
    cta.uid = ++state.ctaCounter;
    cta.epoch = ++state.epochCounter;
    cta.shared.assign(bytes, 0xff);
    cta.sharedInit.assign(bytes, 0);
    cta.sharedCells.assign(bytes / f.sharedGranule + 2, Cell());
    cta.local.assign(u64(l.threads) * f.localBytes, 0xff);
    cta.alive = l.threads;
    cta.barAny = false;
    cta.barAll = true;
    cta.barCount = 0;
    cta.steps = cta.laneSteps = 0;
    for (u32 k = 0; k < W; ++k) {
      Warp& w = cta.warps[k];
      w.cta = &cta;
      memset(w.file.data(), 0xff, w.file.size());
      w.regs = reinterpret_cast<u8*>((reinterpret_cast<u64>(w.file.data()) + 63) / 64 * 64);
      w.index = k;
      w.firstTid = 32 * k;
      const u32 lanes = std::min(32u, l.threads - 32 * k);
      w.alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
      w.groups.assign(1, {0, w.alive, 0});
      w.time = 1;
      w.fullTime = 0;
      memset(w.known, 0, sizeof w.known);
      for (int q = 0; q < 32; ++q) {
        w.open[q].clear();
        w.committed[q].clear();
      }
      for (auto& [at, c] : f.consts) {
        const u32 width = c.second & 0x7f;
        if (width == 0) *w.r<u32>(at) = u32(c.first);
        for (int q = 0; q < 32; ++q) {
          if (width == 2)
            w.r<u16>(at)[q] = c.first;
          else if (width == 4)
            w.r<u32>(at)[q] = c.first;
          else if (width == 8)
            w.r<u64>(at)[q] = c.first;
        }
      }
      for (auto& s : f.specials)
        for (u32 q = 0; q < 32; ++q) {
          const u32 t = 32 * k + q;
          u32 v = 0;
          switch (s.what) {
            case 0:
              v = t % l.block[0];
              break;
            case 1:
              v = t / l.block[0] % l.block[1];
              break;
            case 2:
              v = t / l.block[0] / l.block[1];
              break;
            case 3:
            case 4:
            case 5:
              v = l.block[s.what - 3];
              break;
            case 6:
            case 7:
            case 8:
              v = cta.id[s.what - 6];
              break;
            case 9:
            case 10:
            case 11:
              v = l.grid[s.what - 9];
              break;
            case 12:
              v = q;
              break;
            case 13:
              v = k;
              break;
            case 14:
              v = 1u << q;
              break;
            case 15:
              v = (1u << q) - 1;
              break;
            case 16:
              v = (2u << q) - 1;
              break;
            case 17:
              v = ~((2u << q) - 1);
              break;
            case 18:
              v = ~((1u << q) - 1);
              break;
            case 19:
              v = W;
              break;
            case 21:
              v = l.dynShared;
              break;
          }
          w.r<u32>(s.offset)[q] = v;
        }
    }
    try {
      runCta(cta, rng);
    } catch (Stop&) {
      state.totalSteps += cta.steps;
      state.totalLanes += cta.laneSteps;
      return;
    }
    state.totalSteps += cta.steps;
    state.totalLanes += cta.laneSteps;
  }
}

}  // namespace ptx
