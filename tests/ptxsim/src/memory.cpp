// Loads, stores, atomics, cp.async.
#include "memory.h"
#include <map>
#include "operation.h"
#include "ops.h"

namespace ptx {

void load(Warp& w, const Instr& i, u32 m) {
  const u32 size = i.width * i.vec;
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    const u8* p = access(w, i, l, i.space, addressOf(w, i, l), size, kRead, nullptr);
    static const u8 zeros[64] = {};
    if (!p) p = zeros;
    u8 copy[64];
    memcpy(copy, p, size);
    for (int k = 0; k < i.vec; ++k)
      if (i.o[k] >= 0) put(w, i.o[k], i.regWidth, l, copy + k * i.width, i.width, i.isSigned);
  }
}

void store(Warp& w, const Instr& i, u32 m) {
  const u32 size = i.width * i.vec;
  const bool down = w.cta->l->seed & 1;  // which lane's store comes last is not defined
  for (u32 q = m; q;) {
    const int l = down ? 31 - __builtin_clz(q) : __builtin_ctz(q);
    q &= ~(1u << l);
    u8 value[64];
    for (int k = 0; k < i.vec; ++k) {
      const u64 v = get(w, i.o[k], i.regWidth, l);
      memcpy(value + k * i.width, &v, i.width);
    }
    if (u8* p = access(w, i, l, i.space, addressOf(w, i, l), size, kWrite, value)) memcpy(p, value, size);
  }
}

// o[0] destination (or -1), o[1] operand, o[2] second operand of cas; sub: which
void atomic(Warp& w, const Instr& i, u32 m) {
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    u8* p = access(w, i, l, i.space, addressOf(w, i, l), i.width, kAtomic, nullptr);
    u64 old = 0;
    if (p) memcpy(&old, p, i.width);
    const u64 b = get(w, i.o[1], i.width, l);
    u64 now = old;
    auto sign = [&](u64 v) { return i.width == 4 ? s64(s32(v)) : s64(v); };
    switch (i.sub) {
      case kAdd:
        now = old + b;
        break;
      case kExch:
        now = b;
        break;
      case kCas:
        now = old == b ? get(w, i.o[2], i.width, l) : old;
        break;
      case kMax:
        now = i.isSigned ? (sign(old) > sign(b) ? old : b) : std::max(old, b);
        break;
      case kMin:
        now = i.isSigned ? (sign(old) < sign(b) ? old : b) : std::min(old, b);
        break;
      case kAnd:
        now = old & b;
        break;
      case kOr:
        now = old | b;
        break;
      case kXor:
        now = old ^ b;
        break;
      case kFAdd:
        now = i.width == 4 ? bits(bits(u32(old)) + bits(u32(b))) : bitsd(bitsd(old) + bitsd(b));
        break;
    }
    if (p) memcpy(p, &now, i.width);
    if (i.o[0] >= 0) put(w, i.o[0], i.width, l, (const u8*)&old, i.width, false);
  }
}

// o[0] shared address reg (or imm), o[1] global address, sub: bytes; o[2] source size or -1
void cpAsync(Warp& w, const Instr& i, u32 m) {
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    AsyncCopy c;
    c.bytes = i.sub;
    c.lane = l;
    c.pc = w.pc;
    c.dst = addressOf(w, i, l);
    memset(c.data, 0, 16);
    u32 n = i.sub;
    if (i.o[2] >= 0) n = std::min<u32>(n, w.r<u32>(i.o[2])[l]);
    if (n) {
      // The source must be aligned for the whole copy even if only a part is read.
      const u64 from = w.r<u64>(i.o[1])[l] + (s64(i.o[3]));
      if (const u8* p = access(w, i, l, Space::Global, from, n, kRead, nullptr)) memcpy(c.data, p, n);
    }
    if (access(w, i, l, Space::Shared, c.dst, c.bytes, kAsyncIssue, c.data)) w.open[l].push_back(c);
  }
}
void cpCommit(Warp& w, const Instr&, u32 m) {
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    w.committed[l].push_back(std::move(w.open[l]));
    w.open[l].clear();
  }
}
void cpWait(Warp& w, const Instr& i, u32 m) {
  for (u32 q = m; q; q &= q - 1) {
    const int l = __builtin_ctz(q);
    if (i.sub2) cpCommit(w, i, 1u << l);
    finishAsync(w, i, l, i.sub2 ? 0 : u32(i.imm));
  }
}

void nop(Warp&, const Instr&, u32) {}

// {a, b, ..} -> d: sub parts of regWidth bytes
void pack(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    u64 v = 0;
    for (int k = 0; k < i.sub; ++k) v |= get(w, i.o[1 + k], i.regWidth, l) << (8 * i.regWidth * k);
    put(w, i.o[0], i.width, l, (const u8*)&v, i.width, false);
  })
}
void unpack(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const u64 v = get(w, i.o[0], i.width, l);
    for (int k = 0; k < i.sub; ++k) {
      const u64 part = v >> (8 * i.regWidth * k);
      if (i.o[1 + k] >= 0) put(w, i.o[1 + k], i.regWidth, l, (const u8*)&part, i.regWidth, false);
    }
  })
}

void Builder::memory(Instr& i, const Parts& p, const Pending& s) {
  const bool ld = p[0] == "ld" || p[0] == "ldu";
  std::string type;
  for (size_t k = 1; k < p.size(); ++k) {
    const std::string& a = p[k];
    if (a == "global")
      i.space = Space::Global;
    else if (a == "shared" || a == "shared::cta")
      i.space = Space::Shared;
    else if (a == "local")
      i.space = Space::Local;
    else if (a == "param")
      i.space = Space::Param;
    else if (a == "v2")
      i.vec = 2;
    else if (a == "v4")
      i.vec = 4;
    else if (a == "v8")
      i.vec = 8;
    else if (isType(a))
      type = a;
    else if (a == "nc" || a == "ca" || a == "cg" || a == "cs" || a == "lu" || a == "cv" || a == "wb" || a == "wt" ||
             a == "weak" || a == "relaxed" || a == "acquire" || a == "release" || a == "volatile" || a == "gpu" ||
             a == "cta" || a == "sys" || a.rfind("L1::", 0) == 0 || a.rfind("L2::", 0) == 0) {
      if (a == "L2::cache_hint") i.sub2 = 1;
    } else
      unimplemented("modifier ." + a);
  }
  i.width = typeWidth(type);
  i.isSigned = type[0] == 's';
  if (i.space == Space::Param && !ld) unimplemented("st.param");
  const Operand &value = s.operands[ld ? 0 : 1], &at = s.operands[ld ? 1 : 0];
  address(i, at);
  if (s.operands.size() != 2u + i.sub2) unimplemented("operands");
  if (i.space == Space::Shared) minShared_ = std::min<u32>(minShared_, i.width);
  std::vector<Operand> parts = value.type == Operand::Vector ? value.parts : std::vector<Operand>{value};
  if (parts.size() != i.vec) unimplemented("vector");
  u32 rw = 0;
  for (auto& o : parts)
    if (isReg(o)) rw = std::max(rw, widthOfReg(o));
  if (!rw) rw = std::max<u32>(i.width, 2);
  if (rw < i.width) throw Error("register too narrow");
  i.regWidth = rw;
  for (int k = 0; k < i.vec; ++k) {
    if (ld && parts[k].type == Operand::Sink) continue;
    i.o[k] = ld ? dst(parts[k], rw) : src(parts[k], rw);
  }
  i.fn = ld ? load : store;
}

void Builder::asyncCopy(Instr& i, const Parts& p, const Pending& s) {
  const auto& o = s.operands;
  if (p.size() < 3 || p[1] != "async") unimplemented();
  if (p[2] == "commit_group") {
    only(p, {"async", "commit_group"});
    i.fn = cpCommit;
    return;
  }
  if (p[2] == "wait_group") {
    only(p, {"async", "wait_group"});
    i.imm = o.at(0).imm;
    i.fn = cpWait;
    return;
  }
  if (p[2] == "wait_all") {
    only(p, {"async", "wait_all"});
    i.sub2 = 1;
    i.fn = cpWait;
    return;
  }
  only(p, {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::256B", "L2::64B"});
  i.space = Space::Shared;
  address(i, o.at(0));
  const Operand& g = o.at(1);
  if (!g.address || g.type != Operand::Name || widthOfReg(g) != 8) unimplemented("address");
  i.o[1] = find(g.name).offset;
  i.o[3] = g.offset;
  i.sub = o.at(2).imm;
  if (i.sub != 4 && i.sub != 8 && i.sub != 16) unimplemented("size");
  if (o.size() > 3) i.o[2] = src(o[3], 4);
  if (o.size() > 4) unimplemented("operands");
  i.width = 4;
  i.fn = cpAsync;
}

void Builder::atomicAccess(Instr& i, const Parts& p, const Pending& s) {
  const auto& o = s.operands;
  const std::string type = p.back();
  const bool atom = p[0] == "atom";
  static const std::map<std::string, int> operations = {{"add", kAdd}, {"exch", kExch}, {"cas", kCas}, {"max", kMax},
                                                        {"min", kMin}, {"and", kAnd},   {"or", kOr},   {"xor", kXor}};
  for (size_t k = 1; k < p.size(); ++k) {
    const std::string& a = p[k];
    if (a == "global")
      i.space = Space::Global;
    else if (a == "shared" || a == "shared::cta")
      i.space = Space::Shared;
    else if (auto found = operations.find(a); found != operations.end())
      i.sub = found->second;
    else if (a == "relaxed" || a == "acquire" || a == "release" || a == "acq_rel" || a == "gpu" || a == "cta" ||
             a == "sys" || k + 1 == p.size()) {
    } else
      unimplemented("modifier ." + a);
  }
  if (type[0] == 'f') {
    if (i.sub != kAdd) unimplemented();
    i.sub = kFAdd;
  }
  i.isSigned = type[0] == 's';
  i.width = typeWidth(type);
  if (i.width < 4) unimplemented("type");
  address(i, o.at(atom ? 1 : 0));
  if (atom) i.o[0] = o[0].type == Operand::Sink ? -1 : dst(o[0], i.width);
  i.o[1] = src(o.at(atom ? 2 : 1), i.width);
  if (i.sub == kCas) i.o[2] = src(o.at(atom ? 3 : 2), i.width);
  i.fn = atomic;
}

}  // namespace ptx
