// Every access is checked here: bounds, alignment, what was never written, races.
#include <cstdio>
#include <cstdlib>
#include <algorithm>

#include "state.h"

namespace ptx {

State state;

namespace {

std::string place(const Function& f, s64 pc) {
  if (pc < 0) return "";
  const Instr& i = f.code[pc];
  return "line " + std::to_string(i.line) + ": " + f.text[i.text];
}

}  // namespace

void report(const char* kind, Warp& w, const Instr& i, s64 otherPc, const std::string& detail) {
  const Function& f = *w.cta->f;
  const std::string key =
      std::string(kind) + "|" + f.name + "|" + std::to_string(&i - f.code.data()) + "|" + std::to_string(otherPc);
  auto at = state.reports.find(key);
  if (at != state.reports.end()) {
    ++at->second.count;
    return;
  }
  if (state.reports.size() > 5000) return;
  Report r;
  r.kind = kind;
  r.kernel = f.name;
  r.where = "line " + std::to_string(i.line) + ": " + f.text[i.text];
  r.source = f.locs[i.loc];
  if (otherPc >= 0) {
    r.other = place(f, otherPc);
    r.otherSource = f.locs[f.code[otherPc].loc];
  }
  r.detail = "CTA (" + std::to_string(w.cta->id[0]) + "," + std::to_string(w.cta->id[1]) + "," +
             std::to_string(w.cta->id[2]) + ") " + detail;
  r.count = 1;
  state.reports[key] = r;
  state.reportOrder.push_back(key);
}

void syncLanes(Warp& w, u32 part) {
  ++w.time;
  if (part == w.alive) {
    w.fullTime = w.time;
    return;
  }
  u32 joint[32];
  for (int k = 0; k < 32; ++k) joint[k] = 0;
  for (u32 q = part; q; q &= q - 1) {
    const int j = __builtin_ctz(q);
    for (int k = 0; k < 32; ++k) joint[k] = std::max(joint[k], w.known[j][k]);
  }
  for (u32 q = part; q; q &= q - 1) joint[__builtin_ctz(q)] = w.time;
  for (u32 q = part; q; q &= q - 1) memcpy(w.known[__builtin_ctz(q)], joint, sizeof joint);
}

namespace {

inline bool ordered(const Warp& w, u32 lane, u32 tid, u32 time) {
  if (tid / 32 != w.index) return false;
  return time < std::max(w.fullTime, w.known[lane][tid % 32]);
}

}  // namespace

std::string hex(u64 v) {
  char b[32];
  snprintf(b, sizeof b, "0x%llx", (unsigned long long)v);
  return b;
}

namespace {

void raceReport(Warp& w, const Instr& i, u32 otherPc, const char* space, const char* kind, bool same,
                const std::string& at, u32 tid, const std::string& other) {
  const std::string k = std::string(space) + " race " + kind + (same ? " (same value)" : "");
  report(k.c_str(), w, i, otherPc, at + " thread " + std::to_string(tid) + " against " + other);
}

// One granule. `same`: a write that changes nothing.
inline void checkCell(Warp& w, const Instr& i, Cell& c, u32 lane, int what, bool same, bool global, const char* space,
                      const Region* region, u64 offset) {
  const u32 E = w.cta->epoch, tid = w.firstTid + lane, bit = 1u << lane;
  auto at = [&] { return region ? region->name + "+" + std::to_string(offset) : "shared+" + hex(offset); };
  if (__builtin_expect(c.flags & 4, 0) && what != kAsyncDone)
    report("access to a cp.async destination in flight", w, i, c.wPc,
           at() + " thread " + std::to_string(tid) + ", copy of thread " + std::to_string(c.wTid));
  if (what == kRead) {
    if (c.wEpoch == E && c.wTid != tid && !ordered(w, lane, c.wTid, c.wTime))
      raceReport(w, i, c.wPc, space, "read after write", c.flags & 8, at(), tid, "writer " + std::to_string(c.wTid));
    if (c.rEpoch != E) {
      c.rEpoch = E;
      c.rWarp = w.index;
      c.rMask = bit;
      c.rTime = w.time;
      c.rOther = 0;
      c.rPc = w.pc;
    } else if (c.rWarp == w.index) {
      if (c.rTime != w.time) {
        bool all = true;
        for (u32 q = c.rMask; q && all; q &= q - 1)
          all = __builtin_ctz(q) == int(lane) || c.rTime < std::max(w.fullTime, w.known[lane][__builtin_ctz(q)]);
        c.rMask = all ? bit : c.rMask | bit;
        c.rTime = w.time;
        c.rPc = w.pc;
      } else
        c.rMask |= bit;
    } else if (!c.rOther)
      c.rOther = w.index + 1;
    if (global) {
      const u32 first = w.cta->l->firstCta;
      if (c.wCta >= first && c.wCta != w.cta->uid && !(c.flags & 2))
        raceReport(w, i, c.wPc, "inter-CTA", "read after write", c.flags & 8, at(), tid,
                   "CTA number " + std::to_string(c.wCta - first));
      if (c.rCta < first) {
        c.rCta = w.cta->uid;
        c.flags &= ~1;
      } else if (c.rCta != w.cta->uid)
        c.flags |= 1;
    }
    return;
  }
  if (what == kAsyncDone)
    c.flags &= ~4;
  else {
    if (c.wEpoch == E && c.wTid != tid && !(what == kAtomic && (c.flags & 2)) && !ordered(w, lane, c.wTid, c.wTime))
      raceReport(w, i, c.wPc, space, "write after write", same, at(), tid, "writer " + std::to_string(c.wTid));
    if (c.rEpoch == E && what != kAtomic) {
      bool bad = c.rWarp != w.index || (c.rOther && c.rOther - 1u != w.index);
      u32 who = c.rWarp * 32 + __builtin_ctz(c.rMask);
      if (!bad)
        for (u32 q = c.rMask & ~bit; q && !bad; q &= q - 1)
          if (!(c.rTime < std::max(w.fullTime, w.known[lane][__builtin_ctz(q)]))) {
            bad = true;
            who = c.rWarp * 32 + __builtin_ctz(q);
          }
      if (bad) raceReport(w, i, c.rPc, space, "write after read", same, at(), tid, "reader " + std::to_string(who));
    }
    if (global && what != kAtomic) {
      const u32 first = w.cta->l->firstCta;
      if (c.wCta >= first && c.wCta != w.cta->uid)
        raceReport(w, i, c.wPc, "inter-CTA", "write after write", same, at(), tid,
                   "CTA number " + std::to_string(c.wCta - first));
      if (c.rCta >= first && (c.rCta != w.cta->uid || (c.flags & 1)))
        raceReport(w, i, c.rPc, "inter-CTA", "write after read", same, at(), tid,
                   "reader in CTA number " + std::to_string(c.rCta - first));
    }
  }
  c.wEpoch = E;
  c.wTid = tid;
  c.wTime = w.time;
  c.wPc = w.pc;
  c.rEpoch = 0;
  if (global) c.wCta = w.cta->uid;
  if (what == kAtomic)
    c.flags |= 2;
  else
    c.flags &= ~2;
  if (same && what == kWrite)
    c.flags |= 8;
  else
    c.flags &= ~8;
  if (what == kAsyncIssue) c.flags |= 4;
}

Region* findRegion(u64 addr, const Instr& i) {
  if (i.lastRegion < state.regions.size()) {
    Region& r = state.regions[i.lastRegion];
    if (addr - r.base < r.size) return &r;
  }
  auto at = std::upper_bound(state.regions.begin(), state.regions.end(), addr,
                             [](u64 a, const Region& r) { return a < r.base; });
  if (at == state.regions.begin()) return nullptr;
  --at;
  if (addr - at->base >= at->size) return nullptr;
  i.lastRegion = at - state.regions.begin();
  return &*at;
}

}  // namespace

u8* access(Warp& w, const Instr& i, u32 lane, Space space, u64 addr, u32 size, int what, const u8* value) {
  Cta& cta = *w.cta;
  if (space == Space::Generic) {
    if (addr >= kParamBase) {
      space = Space::Param;
      addr -= kParamBase;
    } else if (addr >= kLocalBase) {
      space = Space::Local;
      addr -= kLocalBase;
    } else if (addr >= kSharedBase) {
      space = Space::Shared;
      addr -= kSharedBase;
    } else
      space = Space::Global;
  }
  const u32 tid = w.firstTid + lane;
  if ((size & (size - 1)) == 0 && (addr & (size - 1))) {
    report("misaligned", w, i, -1,
           "thread " + std::to_string(tid) + " address " + hex(addr) + " size " + std::to_string(size));
    return nullptr;
  }
  switch (space) {
    case Space::Shared: {
      if (addr + size > cta.shared.size() || addr + size < addr) {
        report("shared out of bounds", w, i, -1,
               "thread " + std::to_string(tid) + " address " + hex(addr) + " of " + std::to_string(cta.shared.size()));
        return nullptr;
      }
      u8* p = cta.shared.data() + addr;
      if (what == kRead) {
        bool bad = false;
        for (u32 k = 0; k < size; ++k) bad |= !cta.sharedInit[addr + k] && ((i.used >> k) & 1);
        if (bad)
          report("shared uninitialised read", w, i, -1, "thread " + std::to_string(tid) + " shared+" + hex(addr));
      } else if (what != kAsyncIssue)
        memset(cta.sharedInit.data() + addr, 1, size);
      const u32 g = cta.f->sharedGranule;
      for (u64 a = addr / g; a <= (addr + size - 1) / g; ++a) {
        const s64 from = s64(a * g) - s64(addr);
        if (what == kRead && size > 4 && !((i.used >> std::max<s64>(from, 0)) & ((1u << g) - 1))) continue;
        bool same = false;
        if (what == kWrite && from >= 0)
          same = !memcmp(p + from, value + from, std::min<u64>(g, size - from));
        else if (what == kWrite)
          same = !memcmp(p, value, size);
        checkCell(w, i, cta.sharedCells[a], lane, what, same, false, "shared", nullptr, a * g);
      }
      return p;
    }
    case Space::Global: {
      Region* r = findRegion(addr, i);
      if (!r || addr + size - r->base > r->size) {
        std::string near = "nothing";
        u64 best = ~0ull;
        for (auto& q : state.regions) {
          const u64 d = addr >= q.base + q.size ? addr - (q.base + q.size) : q.base > addr ? q.base - addr : 0;
          if (d < best) {
            best = d;
            near = q.name +
                   (addr >= q.base ? "+" + std::to_string(addr - q.base) : "-" + std::to_string(q.base - addr)) +
                   " of " + std::to_string(q.size) + " bytes";
          }
        }
        report(
            "global out of bounds", w, i, -1,
            "thread " + std::to_string(tid) + " size " + std::to_string(size) + " at " + hex(addr) + ", near " + near);
        return nullptr;
      }
      const u64 offset = addr - r->base;
      u8* p = r->host + offset;
      if (r->poison) {
        if (what == kRead) {
          bool bad = false;
          for (u32 k = 0; k < size; ++k) bad |= r->poison[offset + k] && ((i.used >> k) & 1);
          if (bad)
            report("global uninitialised read", w, i, -1,
                   "thread " + std::to_string(tid) + " " + r->name + "+" + std::to_string(offset));
        } else
          memset(r->poison + offset, 0, size);
      }
      if (!r->cells) r->cells = static_cast<Cell*>(calloc(r->size / r->granule + 2, sizeof(Cell)));
      const u32 g = r->granule;
      for (u64 a = offset / g; a <= (offset + size - 1) / g; ++a) {
        const s64 from = s64(a * g) - s64(offset);
        bool same = false;
        if (what == kWrite && from >= 0)
          same = !memcmp(p + from, value + from, std::min<u64>(g, size - from));
        else if (what == kWrite)
          same = !memcmp(p, value, size);
        checkCell(w, i, r->cells[a], lane, what, same, true, "global", r, a * g);
      }
      return p;
    }
    case Space::Param:
      if (addr + size > cta.l->params.size()) {
        report("parameter out of bounds", w, i, -1, hex(addr));
        return nullptr;
      }
      return const_cast<u8*>(cta.l->params.data()) + addr;
    case Space::Local:
      if (addr + size > cta.f->localBytes) {
        report("local out of bounds", w, i, -1, hex(addr));
        return nullptr;
      }
      return cta.local.data() + u64(tid) * cta.f->localBytes + addr;
    default:
      return nullptr;
  }
}

void finishAsync(Warp& w, const Instr& i, u32 lane, u32 keep) {
  auto& all = w.committed[lane];
  while (all.size() > keep) {
    for (const AsyncCopy& c : all.front()) {
      const u32 pc = w.pc;
      w.pc = c.pc;
      if (u8* p = access(w, i, lane, Space::Shared, c.dst, c.bytes, kAsyncDone, c.data)) memcpy(p, c.data, c.bytes);
      w.pc = pc;
    }
    all.erase(all.begin());
  }
}

}  // namespace ptx
