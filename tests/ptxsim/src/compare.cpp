// Comparisons, and what they do to predicates.
#include "operation.h"
#include "ops.h"

namespace ptx {

namespace {

// o[0] p, o[1] q or -1, o[2] a, o[3] b, o[4] predicate c or -1; sub: 0 none, 1 and, 2 or, 3 xor; sub2: c negated
inline void setPredicate(Warp& w, const Instr& i, u32 m, u32 r) {
  u32 not_r = ~r;
  if (i.sub) {
    const u32 c = i.sub2 ? ~*w.r<u32>(i.o[4]) : *w.r<u32>(i.o[4]);
    if (i.sub == 1) {
      r &= c;
      not_r &= c;
    } else if (i.sub == 2) {
      r |= c;
      not_r |= c;
    } else {
      r ^= c;
      not_r ^= c;
    }
  }
  u32* p = w.r<u32>(i.o[0]);
  *p = (*p & ~m) | (r & m);
  if (i.o[1] >= 0) {
    u32* q = w.r<u32>(i.o[1]);
    *q = (*q & ~m) | (not_r & m);
  }
}
template <class T, auto F>
void setp(Warp& w, const Instr& i, u32 m) {
  const T *a = w.r<T>(i.o[2]), *b = w.r<T>(i.o[3]);
  u32 r = 0;
  for (int l = 0; l < 32; ++l) r |= u32(F(a[l], b[l])) << l;
  setPredicate(w, i, m, r);
}
template <class T>
Exec compareInt(const std::string& op) {
  if (op == "eq") return setp<T, [](T a, T b) { return a == b; }>;
  if (op == "ne") return setp<T, [](T a, T b) { return a != b; }>;
  if (op == "lt" || op == "lo") return setp<T, [](T a, T b) { return a < b; }>;
  if (op == "le" || op == "ls") return setp<T, [](T a, T b) { return a <= b; }>;
  if (op == "gt" || op == "hi") return setp<T, [](T a, T b) { return (a > b); }>;
  if (op == "ge" || op == "hs") return setp<T, [](T a, T b) { return a >= b; }>;
  unimplemented("comparison");
}
template <class T>
Exec compareFloat(const std::string& op) {
  if (op == "eq") return setp<T, [](T a, T b) { return a == b; }>;
  if (op == "ne") return setp<T, [](T a, T b) { return (a < b || a > b); }>;
  if (op == "lt") return setp<T, [](T a, T b) { return a < b; }>;
  if (op == "le") return setp<T, [](T a, T b) { return a <= b; }>;
  if (op == "gt") return setp<T, [](T a, T b) { return (a > b); }>;
  if (op == "ge") return setp<T, [](T a, T b) { return a >= b; }>;
  if (op == "equ") return setp<T, [](T a, T b) { return !(a < b || a > b); }>;
  if (op == "neu") return setp<T, [](T a, T b) { return a != b; }>;
  if (op == "ltu") return setp<T, [](T a, T b) { return !(a >= b); }>;
  if (op == "leu") return setp<T, [](T a, T b) { return !(a > b); }>;
  if (op == "gtu") return setp<T, [](T a, T b) { return !(a <= b); }>;
  if (op == "geu") return setp<T, [](T a, T b) { return !(a < b); }>;
  if (op == "num") return setp<T, [](T a, T b) { return a == a && b == b; }>;
  if (op == "nan") return setp<T, [](T a, T b) { return a != a || b != b; }>;
  unimplemented("comparison");
}

}  // namespace

void Builder::compare(Instr& i, const Parts& p, const Pending& s) {
  const std::string type = p.back(), op = p[1];
  for (size_t k = 2; k + 1 < p.size(); ++k) {
    if (p[k] == "and")
      i.sub = 1;
    else if (p[k] == "or")
      i.sub = 2;
    else if (p[k] == "xor")
      i.sub = 3;
    else
      unimplemented("modifier ." + p[k]);
  }
  const Operand& d = s.operands[0];
  i.o[0] = d.type == Operand::Sink ? allocate(64) : find(d.name).offset;
  if (!d.second.empty()) i.o[1] = d.second == "_" ? -1 : find(d.second).offset;
  const u32 n = typeWidth(type);
  i.o[2] = src(s.operands[1], n);
  i.o[3] = src(s.operands[2], n);
  if (i.sub) {
    i.o[4] = predSrc(s.operands.at(3));
    i.sub2 = s.operands[3].negated;
  }
  if (type == "f32")
    i.fn = compareFloat<float>(op);
  else if (type == "f64")
    i.fn = compareFloat<double>(op);
  else if (type == "s16")
    i.fn = compareInt<s16>(op);
  else if (type == "u16" || type == "b16")
    i.fn = compareInt<u16>(op);
  else if (type == "s32")
    i.fn = compareInt<s32>(op);
  else if (type == "u32" || type == "b32")
    i.fn = compareInt<u32>(op);
  else if (type == "s64")
    i.fn = compareInt<s64>(op);
  else if (type == "u64" || type == "b64")
    i.fn = compareInt<u64>(op);
  else
    unimplemented("type");
}

}  // namespace ptx
