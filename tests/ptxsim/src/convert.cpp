// Conversions between number types.
#include "operation.h"
#include "ops.h"

namespace ptx {

namespace {

template <class D, class S>
void cvtInt(Warp& w, const Instr& i, u32 m) {
  // The registers may be wider than the types.
  FOR_LANES(m, {
    const u64 raw = get(w, i.o[1], i.sub2, l);
    const S v = S(raw);
    D r;
    if (i.sub)
      r = v < 0 && !std::is_signed_v<D>                             ? 0
          : v > (S)0 && u64(v) > u64(std::numeric_limits<D>::max()) ? std::numeric_limits<D>::max()
          : std::is_signed_v<S> && std::is_signed_v<D> && s64(v) < s64(std::numeric_limits<D>::min())
              ? std::numeric_limits<D>::min()
              : D(v);
    else
      r = D(v);
    const u64 out = std::is_signed_v<D> ? u64(s64(r)) : u64(r);
    put(w, i.o[0], i.regWidth, l, (const u8*)&out, i.regWidth, false);
  })
}

template <class F>
F rounded(F a, int mode) {
  switch (mode) {
    case 'n':
      return std::nearbyint(a);
    case 'z':
      return std::trunc(a);
    case 'm':
      return std::floor(a);
    default:
      return std::ceil(a);
  }
}
template <class D, class F>
void cvtFloatInt(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const D r = toInt<D>(rounded(w.r<F>(i.o[1])[l], i.sub));
    const u64 out = std::is_signed_v<D> ? u64(s64(r)) : u64(r);
    put(w, i.o[0], i.regWidth, l, (const u8*)&out, i.regWidth, false);
  })
}
template <class F, class S>
void cvtIntFloat(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, { w.r<F>(i.o[0])[l] = F(S(get(w, i.o[1], i.sub2, l))); })
}
template <class F>
void cvtRound(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, w.r<F>(i.o[0])[l] = rounded(w.r<F>(i.o[1])[l], i.sub))
}
template <class D>
Exec intFrom(const std::string& s) {
  if (s == "u8" || s == "b8") return cvtInt<D, u8>;
  if (s == "s8") return cvtInt<D, s8>;
  if (s == "u16" || s == "b16") return cvtInt<D, u16>;
  if (s == "s16") return cvtInt<D, s16>;
  if (s == "u32" || s == "b32") return cvtInt<D, u32>;
  if (s == "s32") return cvtInt<D, s32>;
  if (s == "u64" || s == "b64") return cvtInt<D, u64>;
  if (s == "s64") return cvtInt<D, s64>;
  unimplemented();
}
template <class F>
Exec floatFromInt(const std::string& s) {
  if (s == "u8") return cvtIntFloat<F, u8>;
  if (s == "s8") return cvtIntFloat<F, s8>;
  if (s == "u16") return cvtIntFloat<F, u16>;
  if (s == "s16") return cvtIntFloat<F, s16>;
  if (s == "u32") return cvtIntFloat<F, u32>;
  if (s == "s32") return cvtIntFloat<F, s32>;
  if (s == "u64") return cvtIntFloat<F, u64>;
  if (s == "s64") return cvtIntFloat<F, s64>;
  unimplemented();
}
template <class F>
Exec intFromFloat(const std::string& d) {
  if (d == "u8") return cvtFloatInt<u8, F>;
  if (d == "s8") return cvtFloatInt<s8, F>;
  if (d == "u16") return cvtFloatInt<u16, F>;
  if (d == "s16") return cvtFloatInt<s16, F>;
  if (d == "u32") return cvtFloatInt<u32, F>;
  if (d == "s32") return cvtFloatInt<s32, F>;
  if (d == "u64") return cvtFloatInt<u64, F>;
  if (d == "s64") return cvtFloatInt<s64, F>;
  unimplemented();
}
void packHalves(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const float a = w.r<float>(i.o[1])[l];
    const float b = w.r<float>(i.o[2])[l];
    w.r<u32>(i.o[0])[l] = i.sub == 0 ? u32(toBf16(a)) << 16 | toBf16(b) : u32(toF16(a)) << 16 | toF16(b);
  })
}

}  // namespace

void Builder::convert(Instr& i, const Parts& p, const Pending& s) {
  std::vector<std::string> types;
  char mode = 0;
  bool toInteger = false, sat = false, flush = false;
  std::string round;
  for (size_t k = 1; k < p.size(); ++k) {
    const std::string& a = p[k];
    if (isType(a))
      types.push_back(a);
    else if (a == "sat")
      sat = true;
    else if (a == "ftz")
      flush = true;
    else if (a == "rn" || a == "rz" || a == "rm" || a == "rp" || a == "rna")
      round = a;
    else if (a == "rni" || a == "rzi" || a == "rmi" || a == "rpi") {
      mode = a[1];
      toInteger = true;
    } else
      unimplemented("modifier ." + a);
  }
  if (types.size() != 2) unimplemented("types");
  const std::string &d = types[0], &a = types[1];
  auto isF = [](const std::string& t) { return t[0] == 'f' || t == "bf16"; };
  const Operand &to = s.operands[0], &from = s.operands[1];
  if (flush) unimplemented("ftz");
  if (d == "bf16x2" || d == "f16x2") {
    if (a != "f32" || round != "rn" || s.operands.size() != 3) unimplemented();
    i.sub = d == "f16x2";
    i.o[0] = dst(to, 4);
    i.o[1] = src(from, 4);
    i.o[2] = src(s.operands[2], 4);
    i.fn = packHalves;
    return;
  }
  if (s.operands.size() != 2) unimplemented();
  if (d == "tf32") {
    if (a != "f32") unimplemented();
    i.o[0] = dst(to, 4);
    i.o[1] = src(from, 4);
    if (round == "rna")
      i.fn = unary<u32, float, [](float x) { return tf32Rna(x); }>;
    else if (round == "rn")
      i.fn = unary<u32, float, [](float x) { return tf32Rn(x); }>;
    else if (round == "rz")
      i.fn = unary<u32, float, [](float x) { return bits(x) & ~0x1fffu; }>;
    else
      unimplemented();
    return;
  }
  if (isF(d) && isF(a)) {
    i.o[0] = dst(to, typeWidth(d));
    i.o[1] = src(from, typeWidth(a));
    if (sat) unimplemented("sat");
    if (toInteger) {
      i.sub = mode;
      if (d != a) unimplemented();
      if (d == "f32")
        i.fn = cvtRound<float>;
      else if (d == "f64")
        i.fn = cvtRound<double>;
      else
        unimplemented();
      return;
    }
    const std::string key = d + "<" + a;
    if (key == "f32<bf16")
      i.fn = unary<float, u16, [](u16 x) { return fromBf16(x); }>;
    else if (key == "f32<f16")
      i.fn = unary<float, u16, [](u16 x) { return fromF16(x); }>;
    else if (key == "bf16<f32" && round == "rn")
      i.fn = unary<u16, float, [](float x) { return toBf16(x); }>;
    else if (key == "bf16<f32" && round == "rz")
      i.fn = unary<u16, float, [](float x) { return toBf16Zero(x); }>;
    else if (key == "f16<f32" && round == "rn")
      i.fn = unary<u16, float, [](float x) { return toF16(x); }>;
    else if (key == "f64<f32")
      i.fn = unary<double, float, [](float x) { return double(x); }>;
    else if (key == "f64<f16")
      i.fn = unary<double, u16, [](u16 x) { return double(fromF16(x)); }>;
    else if (key == "f16<f64" && round == "rn")
      i.fn = unary<u16, double, [](double x) { return toF16d(x); }>;
    else if (key == "f32<f64" && round == "rn")
      i.fn = unary<float, double, [](double x) { return float(x); }>;
    else if (key == "f32<f32")
      i.fn = unary<float, float, [](float x) { return x; }>;
    else
      unimplemented("cvt " + key + " " + round);
    return;
  }
  if (isF(d)) {
    if (round != "rn") unimplemented("rounding");
    i.sub2 = isReg(from) ? widthOfReg(from) : typeWidth(a);
    if (i.sub2 < typeWidth(a)) throw Error("register too narrow");
    if (i.sub2 == 1) i.sub2 = 2;
    i.o[0] = dst(to, typeWidth(d));
    i.o[1] = src(from, i.sub2);
    if (d == "f32")
      i.fn = floatFromInt<float>(a);
    else if (d == "f64")
      i.fn = floatFromInt<double>(a);
    else
      unimplemented();
    return;
  }
  i.regWidth = widthOfReg(to);
  i.o[0] = dst(to, i.regWidth);
  if (isF(a)) {
    if (!toInteger) unimplemented("rounding");
    i.sub = mode;
    i.o[1] = src(from, typeWidth(a));
    if (a == "f32")
      i.fn = intFromFloat<float>(d);
    else if (a == "f64")
      i.fn = intFromFloat<double>(d);
    else
      unimplemented();
    return;
  }
  if (!round.empty() || toInteger) unimplemented("rounding");
  i.sub = sat;
  i.sub2 = isReg(from) ? widthOfReg(from) : typeWidth(a);
  if (i.sub2 == 1) i.sub2 = 2;
  if (i.sub2 < typeWidth(a)) throw Error("register too narrow");
  i.o[1] = src(from, i.sub2);
  if (d == "u8" || d == "b8")
    i.fn = intFrom<u8>(a);
  else if (d == "s8")
    i.fn = intFrom<s8>(a);
  else if (d == "u16" || d == "b16")
    i.fn = intFrom<u16>(a);
  else if (d == "s16")
    i.fn = intFrom<s16>(a);
  else if (d == "u32" || d == "b32")
    i.fn = intFrom<u32>(a);
  else if (d == "s32")
    i.fn = intFrom<s32>(a);
  else if (d == "u64" || d == "b64")
    i.fn = intFrom<u64>(a);
  else if (d == "s64")
    i.fn = intFrom<s64>(a);
  else
    unimplemented();
}

}  // namespace ptx
