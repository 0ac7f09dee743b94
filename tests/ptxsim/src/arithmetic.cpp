// Which arithmetic an operation is.
#include "arithmetic.h"
#include "memory.h"

namespace ptx {

void Builder::decode(Instr& i, const Parts& p, const Pending& s) {
  const std::string& op = p[0];
  const auto& o = s.operands;
  const std::string type = p.back();
  auto operands = [&](u32 d, std::initializer_list<u32> widths) {
    if (o.size() != widths.size() + 1) unimplemented("operands");
    i.o[0] = dst(o[0], d);
    int k = 1;
    for (u32 w : widths) {
      i.o[k] = src(o[k], w);
      ++k;
    }
  };
  // control
  if (op == "bra") {
    only(p, {"uni"});
    i.kind = Kind::Branch;
    branches_.push_back({f->code.size(), o.at(0).name});
    return;
  }
  if (op == "ret" || op == "exit") {
    only(p, {"uni"});
    i.kind = Kind::Exit;
    return;
  }
  if (op == "trap" || op == "brkpt") {
    i.kind = Kind::Trap;
    return;
  }
  if (op == "bar" || op == "barrier") {
    if (p.size() > 1 && p[1] == "warp") return warp(i, p, s);
    only(p, {"sync", "cta", "aligned", "red", "or", "and", "popc", "pred", "u32"});
    i.kind = Kind::Barrier;
    const bool red = has(p, "red");
    const Operand& id = o.at(red ? 1 : 0);
    if (id.type != Operand::Imm) unimplemented("barrier in a register");
    i.imm = id.imm;
    if (red) {
      i.sub = has(p, "or") ? 1 : has(p, "and") ? 2 : 3;
      if (o.size() != 3) unimplemented("threads of a barrier");
      i.o[0] = i.sub == 3 ? dst(o[0], 4) : find(o[0].name).offset;
      i.o[1] = predSrc(o[2]);
      i.sub2 = o[2].negated;
    } else if (o.size() == 2) {
      if (o[1].type != Operand::Imm) unimplemented("threads of a barrier");
      i.o[2] = o[1].imm;
    }
    return;
  }
  if (op == "shfl" || op == "vote" || op == "redux" || op == "ldmatrix" || op == "stmatrix" || op == "mma" ||
      op == "elect")
    return warp(i, p, s);
  if (op == "ld" || op == "st" || op == "ldu") return memory(i, p, s);
  if (op == "cvt") return convert(i, p, s);
  if (op == "setp") return compare(i, p, s);
  if (op == "membar" || op == "fence") {
    only(p, {"sc", "acq_rel", "cta", "gl", "sys", "gpu"});
    i.fn = nop;
    return;
  }
  if (op == "nanosleep" || op == "prefetch" || op == "discard") {
    i.fn = nop;
    return;
  }
  if (op == "cp") return asyncCopy(i, p, s);
  if (op == "atom" || op == "red") return atomicAccess(i, p, s);
  if (op == "cvta") {
    const bool to = has(p, "to");
    const std::string& space = p[to ? 2 : 1];
    if (type != "u64") unimplemented();
    i.imm = space == "shared" || space == "shared::cta" ? s64(kSharedBase)
            : space == "local"                          ? s64(kLocalBase)
            : space == "param"                          ? s64(kParamBase)
            : space == "global" || space == "const"     ? 0
                                                        : (unimplemented(), 0);
    if (to) i.imm = -i.imm;
    operands(8, {8});
    i.fn = addConst64;
    return;
  }
  if (op == "mov") {
    only(p, {type.c_str()});
    if (type == "pred") {
      i.o[0] = find(o[0].name).offset;
      i.o[1] = predSrc(o.at(1));
      i.sub = 4;
      i.sub2 = o[1].negated;
      i.fn = andPred;
      return;
    }
    const u32 w = typeWidth(type);
    if (o.at(1).type == Operand::Vector || o[0].type == Operand::Vector) {
      const bool in = o[1].type == Operand::Vector;
      const auto& parts = in ? o[1].parts : o[0].parts;
      i.sub = parts.size();
      i.width = w;
      i.regWidth = w / i.sub;
      if (i.regWidth < 2) unimplemented("parts of a byte");
      i.o[0] = in ? dst(o[0], w) : src(o[1], w);
      for (int k = 0; k < i.sub; ++k)
        i.o[1 + k] = in ? src(parts[k], i.regWidth) : parts[k].type == Operand::Sink ? -1 : dst(parts[k], i.regWidth);
      i.fn = in ? pack : unpack;
      return;
    }
    operands(w, {w});
    if (w == 2)
      i.fn = unary<u16, u16, [](u16 a) { return a; }>;
    else if (w == 4)
      i.fn = unary<u32, u32, [](u32 a) { return a; }>;
    else
      i.fn = unary<u64, u64, [](u64 a) { return a; }>;
    return;
  }
  if (type == "pred" && (op == "and" || op == "or" || op == "xor" || op == "not")) {
    only(p, {"pred"});
    i.o[0] = find(o[0].name).offset;
    i.o[1] = predSrc(o.at(1));
    if (o.size() > 2) i.o[2] = predSrc(o[2]);
    i.sub = op == "and" ? 0 : op == "or" ? 1 : op == "xor" ? 2 : 3;
    i.fn = andPred;
    return;
  }
  const u32 w = isType(type) ? typeWidth(type) : 0;
  if (op == "and" || op == "or" || op == "xor") {
    only(p, {"b16", "b32", "b64"});
    operands(w, {w, w});
    i.fn = w == 2 ? logic<u16>(op) : w == 4 ? logic<u32>(op) : logic<u64>(op);
    return;
  }
  if (op == "not") {
    only(p, {"b16", "b32", "b64"});
    operands(w, {w});
    if (w == 2)
      i.fn = unary<u16, u16, [](u16 a) { return u16(~a); }>;
    else if (w == 4)
      i.fn = unary<u32, u32, [](u32 a) { return ~a; }>;
    else
      i.fn = unary<u64, u64, [](u64 a) { return ~a; }>;
    return;
  }
  if (op == "shl" || op == "shr") {
    only(p, {type.c_str()});
    operands(w, {w, 4});
    const bool left = op == "shl", sign = type[0] == 's';
    if (w == 2)
      i.fn = sign ? shift<s16>(left) : shift<u16>(left);
    else if (w == 4)
      i.fn = sign ? shift<s32>(left) : shift<u32>(left);
    else
      i.fn = sign ? shift<s64>(left) : shift<u64>(left);
    return;
  }
  if (op == "selp") {
    only(p, {type.c_str()});
    i.o[0] = dst(o[0], w);
    i.o[1] = src(o[1], w);
    i.o[2] = src(o[2], w);
    i.o[3] = predSrc(o.at(3));
    i.fn = w == 2 ? selp<u16> : w == 4 ? selp<u32> : selp<u64>;
    return;
  }
  if (op == "bfe") {
    only(p, {type.c_str()});
    operands(w, {w, 4, 4});
    i.fn = type == "u32"   ? bfe<u32, false>
           : type == "s32" ? bfe<u32, true>
           : type == "u64" ? bfe<u64, false>
                           : bfe<u64, true>;
    return;
  }
  if (op == "bfi") {
    only(p, {type.c_str()});
    operands(w, {w, w, 4, 4});
    i.fn = w == 4 ? bfi<u32> : bfi<u64>;
    return;
  }
  if (op == "prmt") {
    only(p, {"b32"});
    operands(4, {4, 4, 4});
    i.fn = prmt;
    return;
  }
  if (op == "lop3") {
    only(p, {"b32"});
    if (o.size() != 5) unimplemented();
    i.o[0] = dst(o[0], 4);
    for (int k = 1; k < 4; ++k) i.o[k] = src(o[k], 4);
    i.sub = o[4].imm;
    i.fn = lop3;
    return;
  }
  if (op == "shf") {
    only(p, {"l", "r", "wrap", "clamp", "b32"});
    operands(4, {4, 4, 4});
    i.sub = has(p, "l");
    i.sub2 = has(p, "wrap");
    i.fn = shf;
    return;
  }
  if (op == "popc" || op == "clz") {
    only(p, {"b32", "b64"});
    operands(4, {w});
    i.sub = op == "clz";
    i.fn = w == 4 ? reduceBits<u32> : reduceBits<u64>;
    return;
  }
  if (op == "brev") {
    only(p, {"b32", "b64"});
    operands(w, {w});
    i.fn = w == 4 ? brev<u32> : brev<u64>;
    return;
  }

  const bool isFloat = type == "f32" || type == "f64";
  if (isFloat) {
    // Rounding is to nearest; approximations are computed exactly.
    const bool flush = has(p, "ftz");
    std::string name = op;
    if (op == "max" || op == "min") {
      only(p, {"NaN", "ftz", type.c_str()});
      if (has(p, "NaN")) name += "NaN";
    } else if (op == "add" || op == "sub" || op == "mul")
      only(p, {"rn", type.c_str()});
    else if (op == "fma" || op == "mad")
      only(p, {"rn", type.c_str()});
    else if (op == "div")
      only(p, {"rn", "full", "approx", type.c_str()});
    else if (op == "neg" || op == "abs" || op == "copysign")
      only(p, {"ftz", type.c_str()});
    else
      only(p, {"rn", "approx", "ftz", type.c_str()});
    if (op == "fma" || op == "mad") {
      operands(w, {w, w, w});
      i.fn =
          w == 4
              ? ternary<float, float, float, [](float a, float b, float c) { return canon(__builtin_fmaf(a, b, c)); }>
              : ternary<double, double, double, [](double a, double b, double c) { return __builtin_fma(a, b, c); }>;
      return;
    }
    if (op == "add" || op == "sub" || op == "mul" || op == "div" || op == "max" || op == "min" || op == "copysign") {
      if (flush) unimplemented("ftz");
      operands(w, {w, w});
      i.fn = w == 4 ? floatBinary<float>(name) : floatBinary<double>(name);
      return;
    }
    operands(w, {w});
    if (flush && w == 4)
      i.fn = floatUnaryFtz(op);
    else if (flush)
      unimplemented("ftz");
    else
      i.fn = w == 4 ? floatUnary<float>(op) : floatUnary<double>(op);
    return;
  }
  if (type == "u16" || type == "s16" || type == "u32" || type == "s32" || type == "u64" || type == "s64") {
    if (op == "neg" || op == "abs") {
      only(p, {type.c_str()});
      operands(w, {w});
      const bool neg = op == "neg";
      if (w == 2)
        i.fn = neg ? unary<s16, s16, [](s16 a) { return s16(-a); }>
                   : unary<s16, s16, [](s16 a) { return s16(a < 0 ? -a : a); }>;
      else if (w == 4)
        i.fn = neg ? unary<u32, u32, [](u32 a) { return 0 - a; }>
                   : unary<s32, s32, [](s32 a) { return s32(a < 0 ? 0 - u32(a) : a); }>;
      else
        i.fn = neg ? unary<u64, u64, [](u64 a) { return 0 - a; }>
                   : unary<s64, s64, [](s64 a) { return s64(a < 0 ? 0 - u64(a) : a); }>;
      return;
    }
    if (op == "mul" || op == "mad") {
      if (has(p, "wide")) {
        only(p, {"wide", type.c_str()});
        if (op == "mul")
          operands(2 * w, {w, w});
        else
          operands(2 * w, {w, w, 2 * w});
        const bool mad = op == "mad";
        i.fn = type == "u16"   ? wide<u16>(mad)
               : type == "s16" ? wide<s16>(mad)
               : type == "u32" ? wide<u32>(mad)
               : type == "s32" ? wide<s32>(mad)
                               : (unimplemented(), nullptr);
        return;
      }
      only(p, {"lo", "hi", type.c_str()});
      const std::string name = op + (has(p, "hi") ? ".hi" : ".lo");
      if (op == "mad") {
        operands(w, {w, w, w});
        i.fn = type == "u16"   ? integerTernary<u16>(name)
               : type == "s16" ? integerTernary<s16>(name)
               : type == "u32" ? integerTernary<u32>(name)
               : type == "s32" ? integerTernary<s32>(name)
               : type == "u64" ? integerTernary<u64>(name)
                               : integerTernary<s64>(name);
        return;
      }
      operands(w, {w, w});
      i.fn = type == "u16"   ? integerBinary<u16>(name)
             : type == "s16" ? integerBinary<s16>(name)
             : type == "u32" ? integerBinary<u32>(name)
             : type == "s32" ? integerBinary<s32>(name)
             : type == "u64" ? integerBinary<u64>(name)
                             : integerBinary<s64>(name);
      return;
    }
    if (op == "add" || op == "sub" || op == "div" || op == "rem" || op == "min" || op == "max") {
      only(p, {type.c_str()});
      operands(w, {w, w});
      i.fn = type == "u16"   ? integerBinary<u16>(op)
             : type == "s16" ? integerBinary<s16>(op)
             : type == "u32" ? integerBinary<u32>(op)
             : type == "s32" ? integerBinary<s32>(op)
             : type == "u64" ? integerBinary<u64>(op)
                             : integerBinary<s64>(op);
      return;
    }
  }
  unimplemented("instruction " + s.op);
}

}  // namespace ptx
