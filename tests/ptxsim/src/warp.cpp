// Instructions of a whole warp: shuffles, votes, barriers, and which unit of matrices a product takes.
#include "operation.h"
#include "matrix.h"
#include "ops.h"

namespace ptx {

namespace {

// o[0] d, o[1] predicate or -1, o[2] a, o[3] b, o[4] c; sub: 0 up, 1 down, 2 bfly, 3 idx
void shfl(Warp& w, const Instr& i, u32 m) {
  u32 out[32];
  u32 valid = 0;
  const u32 *a = w.r<u32>(i.o[2]), *b = w.r<u32>(i.o[3]), *c = w.r<u32>(i.o[4]), *mm = w.r<u32>(i.memMask);
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    const s32 bv = b[l] & 31, cv = c[l] & 31, seg = (c[l] >> 8) & 31;
    const s32 maxLane = (l & seg) | (cv & ~seg), minLane = l & seg;
    s32 j;
    bool ok;
    switch (i.sub) {
      case 0:
        j = l - bv;
        ok = j >= maxLane;
        break;
      case 1:
        j = l + bv;
        ok = j <= maxLane;
        break;
      case 2:
        j = l ^ bv;
        ok = j <= maxLane;
        break;
      default:
        j = minLane | (bv & ~seg);
        ok = j <= maxLane;
        break;
    }
    if (!ok) j = l;
    if (ok) valid |= 1u << l;
    if (!((mm[l] >> j) & 1) || !((w.alive >> j) & 1))
      report("shfl from a lane outside its mask", w, i, -1, "lane " + std::to_string(l) + " from " + std::to_string(j));
    out[l] = a[j];
  }
  u32* d = w.r<u32>(i.o[0]);
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    d[l] = out[l];
  }
  if (i.o[1] >= 0) {
    u32* p = w.r<u32>(i.o[1]);
    *p = (*p & ~m) | (valid & m);
  }
}

// o[0] d, o[1] predicate source; sub: 0 all, 1 any, 2 uni, 3 ballot; sub2: negated
void vote(Warp& w, const Instr& i, u32 m) {
  const u32 v = i.sub2 ? ~*w.r<u32>(i.o[1]) : *w.r<u32>(i.o[1]);
  const u32* mm = w.r<u32>(i.memMask);
  u32 r[32];
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    const u32 set = mm[l] & w.alive & m;
    switch (i.sub) {
      case 0:
        r[l] = (v & set) == set;
        break;
      case 1:
        r[l] = (v & set) != 0;
        break;
      case 2:
        r[l] = (v & set) == set || (v & set) == 0;
        break;
      default:
        r[l] = v & set;
    }
  }
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    if (i.sub == 3)
      w.r<u32>(i.o[0])[l] = r[l];
    else {
      u32* p = w.r<u32>(i.o[0]);
      *p = (*p & ~(1u << l)) | (r[l] << l);
    }
  }
}

// sub: 0 add 1 min 2 max 3 and 4 or 5 xor; isSigned
void redux(Warp& w, const Instr& i, u32 m) {
  const u32 *a = w.r<u32>(i.o[1]), *mm = w.r<u32>(i.memMask);
  u32 out[32];
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    bool first = true;
    u32 v = 0;
    for (u32 k = mm[l] & m; k; k &= k - 1) {
      const u32 x = a[__builtin_ctz(k)];
      if (first)
        v = x;
      else
        switch (i.sub) {
          case 0:
            v += x;
            break;
          case 1:
            v = i.isSigned ? u32(std::min(s32(v), s32(x))) : std::min(v, x);
            break;
          case 2:
            v = i.isSigned ? u32(std::max(s32(v), s32(x))) : std::max(v, x);
            break;
          case 3:
            v &= x;
            break;
          case 4:
            v |= x;
            break;
          default:
            v ^= x;
        }
      first = false;
    }
    out[l] = v;
  }
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    w.r<u32>(i.o[0])[l] = out[l];
  }
}

void warpSync(Warp& w, const Instr& i, u32 m) {
  const u32* mm = w.r<u32>(i.memMask);
  u32 rest = m;
  while (rest) {
    const u32 mask = mm[__builtin_ctz(rest)];
    u32 part = 0;
    for (u32 q = rest; q; q &= q - 1)
      if (mm[__builtin_ctz(q)] == mask) part |= 1u << __builtin_ctz(q);
    syncLanes(w, part);
    rest &= ~part;
  }
}
}  // namespace

void Builder::warp(Instr& i, const Parts& p, const Pending& s) {
  i.kind = Kind::WarpSync;
  const auto& o = s.operands;
  if (p[0] == "shfl") {
    only(p, {"sync", "up", "down", "bfly", "idx", "b32"});
    const std::string& mode = p[2];
    i.sub = mode == "up" ? 0 : mode == "down" ? 1 : mode == "bfly" ? 2 : mode == "idx" ? 3 : (unimplemented(), 0);
    i.o[0] = dst(Operand{.type = o[0].type, .name = o[0].name}, 4);
    if (!o[0].second.empty() && o[0].second != "_") i.o[1] = find(o[0].second).offset;
    i.o[2] = src(o[1], 4);
    i.o[3] = src(o[2], 4);
    i.o[4] = src(o[3], 4);
    i.memMask = src(o.at(4), 4);
    i.fn = shfl;
  } else if (p[0] == "vote") {
    only(p, {"sync", "all", "any", "uni", "ballot", "pred", "b32"});
    i.sub = has(p, "all") ? 0 : has(p, "any") ? 1 : has(p, "uni") ? 2 : 3;
    i.o[0] = i.sub == 3 ? dst(o[0], 4) : find(o[0].name).offset;
    i.o[1] = predSrc(o[1]);
    i.sub2 = o[1].negated;
    i.memMask = src(o.at(2), 4);
    i.fn = vote;
  } else if (p[0] == "redux") {
    only(p, {"sync", "add", "min", "max", "and", "or", "xor", "u32", "s32", "b32"});
    i.sub = has(p, "add") ? 0 : has(p, "min") ? 1 : has(p, "max") ? 2 : has(p, "and") ? 3 : has(p, "or") ? 4 : 5;
    i.isSigned = has(p, "s32");
    i.o[0] = dst(o[0], 4);
    i.o[1] = src(o[1], 4);
    i.memMask = src(o.at(2), 4);
    i.fn = redux;
  } else if (p[0] == "bar") {  // bar.warp.sync
    only(p, {"warp", "sync"});
    i.memMask = src(o.at(0), 4);
    i.fn = warpSync;
  } else if (p[0] == "elect") {
    only(p, {"sync"});
    i.o[0] = o[0].type == Operand::Sink ? -1 : dst(Operand{.type = o[0].type, .name = o[0].name}, 4);
    i.o[1] = find(o[0].second).offset;
    i.memMask = src(o.at(1), 4);
    i.fn = elect;
  } else if (p[0] == "stmatrix") {
    only(p, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"});
    i.vec = has(p, "x4") ? 4 : has(p, "x2") ? 2 : 1;
    i.sub = has(p, "trans");
    i.space = Space::Shared;
    i.width = 16;
    address(i, o[0]);
    const auto parts = o[1].type == Operand::Vector ? o[1].parts : std::vector<Operand>{o[1]};
    if (parts.size() != i.vec) unimplemented("vector");
    for (int k = 0; k < i.vec; ++k) i.o[k] = src(parts[k], 4);
    i.memMask = constant(~0u, 4);
    i.fn = stmatrix;
  } else if (p[0] == "ldmatrix") {
    only(p, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"});
    i.vec = has(p, "x4") ? 4 : has(p, "x2") ? 2 : 1;
    i.sub = has(p, "trans");
    i.space = Space::Shared;
    i.width = 16;
    const auto parts = o[0].type == Operand::Vector ? o[0].parts : std::vector<Operand>{o[0]};
    if (parts.size() != i.vec) unimplemented("vector");
    for (int k = 0; k < i.vec; ++k) i.o[k] = dst(parts[k], 4);
    address(i, o[1]);
    i.memMask = constant(~0u, 4);
    i.fn = ldmatrix;
  } else {  // mma
    if (p.size() < 6 || p[1] != "sync" || p[2] != "aligned" || p[4] != "row" || p[5] != "col") unimplemented("mma");
    std::string key = p[3];
    for (size_t k = 6; k < p.size(); ++k) key += "." + p[k];
    u32 n[4], wd = 4;
    if (key == "m16n8k8.f32.tf32.tf32.f32") {
      u32 x[4] = {4, 4, 2, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaTf32k8;
    } else if (key == "m16n8k4.f32.tf32.tf32.f32") {
      u32 x[4] = {4, 2, 1, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaTf32k4;
    } else if (key == "m16n8k16.f32.bf16.bf16.f32" || key == "m16n8k16.f32.f16.f16.f32") {
      u32 x[4] = {4, 4, 2, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaHalf;
      i.sub = has(p, "bf16");
      i.sub2 = 2;
    } else if (key == "m16n8k8.f32.bf16.bf16.f32" || key == "m16n8k8.f32.f16.f16.f32") {
      u32 x[4] = {4, 2, 1, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaHalf;
      i.sub = has(p, "bf16");
      i.sub2 = 1;
    } else if (key == "m8n8k4.f64.f64.f64.f64") {
      u32 x[4] = {2, 1, 1, 2};
      memcpy(n, x, sizeof n);
      i.fn = mmaF64;
      wd = 8;
    } else if (key == "m16n8k4.f64.f64.f64.f64") {
      u32 x[4] = {4, 2, 1, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaF64wide;
      wd = 8;
      i.sub2 = 1;
    } else if (key == "m16n8k8.f64.f64.f64.f64") {
      u32 x[4] = {4, 4, 2, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaF64wide;
      wd = 8;
      i.sub2 = 2;
    } else if (key == "m16n8k16.f64.f64.f64.f64") {
      u32 x[4] = {4, 8, 4, 4};
      memcpy(n, x, sizeof n);
      i.fn = mmaF64wide;
      wd = 8;
      i.sub2 = 4;
    } else
      unimplemented("mma " + key);
    int at = 0;
    for (int k = 0; k < 4; ++k) {
      const auto parts = o.at(k).type == Operand::Vector ? o[k].parts : std::vector<Operand>{o[k]};
      if (parts.size() != n[k]) unimplemented("mma operands");
      for (auto& q : parts) i.o[at++] = k == 0 ? dst(q, wd) : src(q, wd);
    }
    i.memMask = constant(~0u, 4);
  }
}

}  // namespace ptx
