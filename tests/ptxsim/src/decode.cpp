// From parsed statements to instructions: registers, constants, addresses, labels.
#include "operation.h"
#include "ops.h"

namespace ptx {

namespace {
Parts split(const std::string& op) {
  Parts p;
  size_t i = 0;
  while (i <= op.size()) {
    size_t j = op.find('.', i);
    if (j == std::string::npos) j = op.size();
    p.push_back(op.substr(i, j - i));
    i = j + 1;
  }
  return p;
}
}  // namespace

void Builder::declare(const std::string& name, u32 width) {
  const u32 bytes = width == 0 ? 64 : (width == 1 ? 2 : width) * 32;
  scopes.back()[name] = {allocate(bytes), width == 1 ? 2 : width};
}

Reg Builder::find(const std::string& name) {
  for (size_t k = scopes.size(); k-- > 0;) {
    auto at = scopes[k].find(name);
    if (at != scopes[k].end()) return at->second;
  }
  if (name[0] == '%' && name.size() > 1) return {special(name), name == "%globaltimer" || name == "%clock64" ? 8u : 4u};
  throw Error("unknown name " + name);
}

s32 Builder::special(const std::string& name) {
  static const std::map<std::string, u8> known = {{"%tid.x", 0},
                                                  {"%tid.y", 1},
                                                  {"%tid.z", 2},
                                                  {"%ntid.x", 3},
                                                  {"%ntid.y", 4},
                                                  {"%ntid.z", 5},
                                                  {"%ctaid.x", 6},
                                                  {"%ctaid.y", 7},
                                                  {"%ctaid.z", 8},
                                                  {"%nctaid.x", 9},
                                                  {"%nctaid.y", 10},
                                                  {"%nctaid.z", 11},
                                                  {"%laneid", 12},
                                                  {"%warpid", 13},
                                                  {"%lanemask_eq", 14},
                                                  {"%lanemask_lt", 15},
                                                  {"%lanemask_le", 16},
                                                  {"%lanemask_gt", 17},
                                                  {"%lanemask_ge", 18},
                                                  {"%nwarpid", 19},
                                                  {"%cluster_ctaid.x", 20},
                                                  {"%cluster_ctarank", 20},
                                                  {"%dynamic_smem_size", 21}};
  auto k = known.find(name);
  if (k == known.end()) unimplemented("register " + name);
  auto at = specials_.find(name);
  if (at != specials_.end()) return at->second;
  const s32 o = allocate(128);
  f->specials.push_back({u32(o), k->second});
  return specials_[name] = o;
}

s32 Builder::constant(u64 value, u32 width, bool dynamic) {
  if (width == 1) width = 2;
  if (width < 8 && !dynamic && width > 0) value &= (1ull << (8 * width)) - 1;
  auto key = std::make_pair(value, width);
  auto at = constants_.find(key);
  if (at != constants_.end()) return at->second;
  const s32 o = allocate(width == 0 ? 64 : width * 32);
  f->consts.push_back({u32(o), {value, u8(width | (dynamic ? 0x80 : 0))}});
  return constants_[key] = o;
}

bool Builder::isReg(const Operand& o) {
  return o.type == Operand::Name && !symbols.count(o.name) && !labels.count(o.name);
}
u32 Builder::widthOfReg(const Operand& o) { return find(o.name).width; }

s32 Builder::src(const Operand& o, u32 width) {
  if (o.address || o.negated || !o.second.empty()) unimplemented("operand");
  if (o.type == Operand::Imm) return constant(o.imm, width);
  if (o.type != Operand::Name) unimplemented("operand");
  auto s = symbols.find(o.name);
  if (s != symbols.end()) {
    const u64 v = s->second.value + o.offset;
    switch (s->second.kind) {
      case SymbolKind::DynShared:
        return constant(kDynamicMark + v, width, true);
      default:
        return constant(v, width);
    }
  }
  if (o.offset) unimplemented("operand with an offset");
  const Reg r = find(o.name);
  if (r.width != width)
    throw Error("operand " + o.name + " is " + std::to_string(r.width) + " bytes wide, not " + std::to_string(width));
  return r.offset;
}
s32 Builder::dst(const Operand& o, u32 width) {
  if (o.type == Operand::Sink) return allocate(std::max(width, 2u) * 32);
  if (o.type != Operand::Name || o.address) unimplemented("destination");
  const Reg r = find(o.name);
  if (r.width != width)
    throw Error("destination " + o.name + " is " + std::to_string(r.width) + " bytes wide, not " +
                std::to_string(width));
  return r.offset;
}
s32 Builder::predSrc(const Operand& o) {
  if (o.type == Operand::Imm) return constant(o.imm ? ~0u : 0u, 0);
  const Reg r = find(o.name);
  if (r.width != 0) throw Error("not a predicate: " + o.name);
  return r.offset;
}

void Builder::address(Instr& i, const Operand& o) {
  if (!o.address) unimplemented("address");
  i.imm = o.offset;
  if (o.type == Operand::Imm) {
    i.imm = o.imm + o.offset;
    i.addr = -1;
    return;
  }
  auto s = symbols.find(o.name);
  if (s != symbols.end()) {
    i.addr = -1;
    i.imm += s->second.value;
    if (s->second.kind == SymbolKind::DynShared) i.addrWidth |= 0x80;
    return;
  }
  const Reg r = find(o.name);
  if (r.width != 4 && r.width != 8) throw Error("address register");
  i.addr = r.offset;
  i.addrWidth = r.width;
}

void Builder::add(const Pending& s) {
  Instr i;
  for (auto& o : i.o) o = -1;
  i.line = s.line;
  i.used = s.used;
  if (!s.pred.empty()) {
    const Reg r = find(s.pred);
    if (r.width != 0) throw Error("guard is not a predicate");
    i.pred = r.offset;
    i.predNeg = s.predNeg;
  }
  if (f->locs.empty() || s.loc != lastLoc_) {
    f->locs.push_back(s.loc);
    lastLoc_ = s.loc;
  }
  i.loc = f->locs.size() - 1;
  i.text = f->text.size();
  f->text.push_back(s.text);
  decode(i, split(s.op), s);
  f->code.push_back(i);
}

void Builder::finish() {
  for (auto& [at, label] : branches_) {
    auto l = labels.find(label);
    if (l == labels.end()) throw Error("no label " + label);
    f->code[at].target = l->second;
  }
  Instr end;
  end.kind = Kind::Exit;
  for (auto& o : end.o) o = -1;
  end.loc = f->locs.empty() ? 0 : f->locs.size() - 1;
  if (f->locs.empty()) f->locs.push_back("");
  end.text = f->text.size();
  f->text.push_back("(end)");
  f->code.push_back(end);
  f->sharedGranule = minShared_;
}

}  // namespace ptx
