// Arithmetic of single lanes, by type.
#pragma once
#include "operation.h"
#include "ops.h"

namespace ptx {
namespace {

template <class T>
struct Wide;
template <>
struct Wide<u16> {
  using type = u32;
};
template <>
struct Wide<s16> {
  using type = s32;
};
template <>
struct Wide<u32> {
  using type = u64;
};
template <>
struct Wide<s32> {
  using type = s64;
};
template <>
struct Wide<u64> {
  using type = unsigned __int128;
};
template <>
struct Wide<s64> {
  using type = __int128;
};

template <class T>
Exec integerBinary(const std::string& op) {
  using U = std::make_unsigned_t<T>;
  if (op == "add") return binary<T, T, [](T a, T b) { return T(U(a) + U(b)); }>;
  if (op == "sub") return binary<T, T, [](T a, T b) { return T(U(a) - U(b)); }>;
  if (op == "mul.lo") return binary<T, T, [](T a, T b) { return T(u64(a) * u64(b)); }>;
  if (op == "mul.hi")
    return binary<T, T, [](T a, T b) {
      return T((typename Wide<T>::type(a) * typename Wide<T>::type(b)) >> (8 * sizeof(T)));
    }>;
  if (op == "div")
    return binary<T, T, [](T a, T b) {
      return b == 0 ? T(-1) : (std::is_signed_v<T> && b == T(-1)) ? T(U(0) - U(a)) : T(a / b);
    }>;
  if (op == "rem")
    return binary<T, T, [](T a, T b) { return b == 0 ? a : (std::is_signed_v<T> && b == T(-1)) ? T(0) : T(a % b); }>;
  if (op == "min") return binary<T, T, [](T a, T b) { return a < b ? a : b; }>;
  if (op == "max") return binary<T, T, [](T a, T b) { return (a > b) ? a : b; }>;
  unimplemented(op);
}
template <class T>
Exec integerTernary(const std::string& op) {
  if (op == "mad.lo") return ternary<T, T, T, [](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); }>;
  if (op == "mad.hi")
    return ternary<T, T, T, [](T a, T b, T c) {
      return T(u64((typename Wide<T>::type(a) * typename Wide<T>::type(b)) >> (8 * sizeof(T))) + u64(c));
    }>;
  unimplemented(op);
}
template <class T>
Exec wide(bool mad) {
  using V = typename Wide<T>::type;
  if (mad) return ternary<V, T, V, [](T a, T b, V c) { return V(u64(V(a) * V(b)) + u64(c)); }>;
  return binary<V, T, [](T a, T b) { return V(V(a) * V(b)); }>;
}
template <class T>
Exec logic(const std::string& op) {
  if (op == "and") return binary<T, T, [](T a, T b) { return T(a & b); }>;
  if (op == "or") return binary<T, T, [](T a, T b) { return T(a | b); }>;
  if (op == "xor") return binary<T, T, [](T a, T b) { return T(a ^ b); }>;
  unimplemented(op);
}
template <class T>
Exec shift(bool left) {
  constexpr u32 N = 8 * sizeof(T);
  if (left) return binary2<T, T, u32, [](T a, u32 b) { return b >= N ? T(0) : T(std::make_unsigned_t<T>(a) << b); }>;
  return binary2<T, T, u32, [](T a, u32 b) { return b >= N ? T(a < 0 ? -1 : 0) : T(a >> b); }>;
}
template <class T>
Exec floatBinary(const std::string& op) {
  if (op == "add") return binary<T, T, [](T a, T b) { return canon(a + b); }>;
  if (op == "sub") return binary<T, T, [](T a, T b) { return canon(a - b); }>;
  if (op == "mul") return binary<T, T, [](T a, T b) { return canon(a * b); }>;
  if (op == "div") return binary<T, T, [](T a, T b) { return canon(a / b); }>;
  if (op == "max") return binary<T, T, [](T a, T b) { return canon(fmaxPtx(a, b)); }>;
  if (op == "min") return binary<T, T, [](T a, T b) { return canon(fminPtx(a, b)); }>;
  if (op == "maxNaN") return binary<T, T, [](T a, T b) { return canon(fmaxNan(a, b)); }>;
  if (op == "minNaN") return binary<T, T, [](T a, T b) { return canon(fminNan(a, b)); }>;
  if (op == "copysign") return binary<T, T, [](T a, T b) { return std::copysign(b, a); }>;
  unimplemented(op);
}
template <class T>
Exec floatUnary(const std::string& op) {
  if (op == "neg") return unary<T, T, [](T a) { return -a; }>;
  if (op == "abs") return unary<T, T, [](T a) { return std::fabs(a); }>;
  if (op == "sqrt") return unary<T, T, [](T a) { return canon(T(std::sqrt(a))); }>;
  if (op == "rcp") return unary<T, T, [](T a) { return canon(T(1) / a); }>;
  if (op == "rsqrt") return unary<T, T, [](T a) { return canon(T(1.0L / std::sqrt((long double)(a)))); }>;
  if (op == "ex2") return unary<T, T, [](T a) { return T(std::exp2(double(a))); }>;
  if (op == "lg2") return unary<T, T, [](T a) { return T(std::log2(double(a))); }>;
  if (op == "sin") return unary<T, T, [](T a) { return T(std::sin(double(a))); }>;
  if (op == "cos") return unary<T, T, [](T a) { return T(std::cos(double(a))); }>;
  if (op == "tanh") return unary<T, T, [](T a) { return T(std::tanh(double(a))); }>;
  unimplemented(op);
}
Exec floatUnaryFtz(const std::string& op) {
  if (op == "rsqrt")
    return unary<float, float, [](float a) { return canon(ftz(float(1.0 / std::sqrt(double(ftz(a)))))); }>;
  if (op == "sqrt") return unary<float, float, [](float a) { return canon(ftz(std::sqrt(ftz(a)))); }>;
  if (op == "rcp") return unary<float, float, [](float a) { return ftz(1.0f / ftz(a)); }>;
  if (op == "ex2") return unary<float, float, [](float a) { return ftz(float(std::exp2(double(ftz(a))))); }>;
  if (op == "lg2") return unary<float, float, [](float a) { return ftz(float(std::log2(double(ftz(a))))); }>;
  if (op == "abs") return unary<float, float, [](float a) { return std::fabs(ftz(a)); }>;
  if (op == "neg") return unary<float, float, [](float a) { return -ftz(a); }>;
  unimplemented(op + ".ftz");
}

void andPred(Warp& w, const Instr& i, u32 m) {
  const u32 a = *w.r<u32>(i.o[1]), b = i.o[2] >= 0 ? *w.r<u32>(i.o[2]) : 0;
  u32 r = 0;
  switch (i.sub) {
    case 0:
      r = a & b;
      break;
    case 1:
      r = a | b;
      break;
    case 2:
      r = a ^ b;
      break;
    case 3:
      r = ~a;
      break;
    default:
      r = i.sub2 ? ~a : a;
  }
  u32* d = w.r<u32>(i.o[0]);
  *d = (*d & ~m) | (r & m);
}
template <class T>
void selp(Warp& w, const Instr& i, u32 m) {
  T* d = w.r<T>(i.o[0]);
  const T *a = w.r<T>(i.o[1]), *b = w.r<T>(i.o[2]);
  const u32 p = *w.r<u32>(i.o[3]);
  FOR_LANES(m, d[l] = (p >> l) & 1 ? a[l] : b[l])
}
template <class T, bool kSigned>
void bfe(Warp& w, const Instr& i, u32 m) {
  constexpr s32 N = 8 * sizeof(T);
  FOR_LANES(m, {
    const T a = w.r<T>(i.o[1])[l];
    const s32 pos = w.r<u32>(i.o[2])[l] & 255;
    const s32 len = w.r<u32>(i.o[3])[l] & 255;
    T sign = 0;
    if (kSigned && len) sign = (a >> std::min(pos + len - 1, N - 1)) & 1;
    T d = 0;
    for (s32 k = 0; k < N; ++k) {
      const T bit = k < len && pos + k < N ? (a >> (pos + k)) & 1 : sign;
      d |= bit << k;
    }
    w.r<T>(i.o[0])[l] = d;
  })
}
template <class T>
void bfi(Warp& w, const Instr& i, u32 m) {
  constexpr s32 N = 8 * sizeof(T);
  FOR_LANES(m, {
    const T a = w.r<T>(i.o[1])[l];
    T d = w.r<T>(i.o[2])[l];
    const s32 pos = w.r<u32>(i.o[3])[l] & 255;
    const s32 len = w.r<u32>(i.o[4])[l] & 255;
    for (s32 k = 0; k < len && pos + k < N; ++k) d = (d & ~(T(1) << (pos + k))) | (((a >> k) & 1) << (pos + k));
    w.r<T>(i.o[0])[l] = d;
  })
}
void prmt(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const u64 v = u64(w.r<u32>(i.o[2])[l]) << 32 | w.r<u32>(i.o[1])[l];
    const u32 c = w.r<u32>(i.o[3])[l];
    u32 d = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 sel = c >> (4 * k);
      u32 b = (v >> (8 * (sel & 7))) & 255;
      if (sel & 8) b = b & 128 ? 255 : 0;
      d |= b << (8 * k);
    }
    w.r<u32>(i.o[0])[l] = d;
  })
}
void lop3(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const u32 a = w.r<u32>(i.o[1])[l];
    const u32 b = w.r<u32>(i.o[2])[l];
    const u32 c = w.r<u32>(i.o[3])[l];
    u32 d = 0;
    for (int k = 0; k < 8; ++k)
      if ((i.sub >> k) & 1) d |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    w.r<u32>(i.o[0])[l] = d;
  })
}
void shf(Warp& w, const Instr& i, u32 m) {  // sub: left, sub2: wrap
  FOR_LANES(m, {
    const u32 a = w.r<u32>(i.o[1])[l];
    const u32 b = w.r<u32>(i.o[2])[l];
    const u32 c = w.r<u32>(i.o[3])[l];
    const u32 n = i.sub2 ? c & 31 : std::min(c, 32u);
    const u64 v = u64(b) << 32 | a;
    w.r<u32>(i.o[0])[l] = i.sub ? u32((v << n) >> 32) : u32(v >> n);
  })
}
template <class T>
void reduceBits(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const T a = w.r<T>(i.o[1])[l];
    u32 d = 0;
    if (i.sub == 0)
      d = __builtin_popcountll(a);
    else
      d = a == 0 ? 8 * sizeof(T) : __builtin_clzll(u64(a)) - (64 - 8 * sizeof(T));
    w.r<u32>(i.o[0])[l] = d;
  })
}
template <class T>
void brev(Warp& w, const Instr& i, u32 m) {
  FOR_LANES(m, {
    const T a = w.r<T>(i.o[1])[l];
    T d = 0;
    for (u32 k = 0; k < 8 * sizeof(T); ++k) d |= ((a >> k) & 1) << (8 * sizeof(T) - 1 - k);
    w.r<T>(i.o[0])[l] = d;
  })
}
void addConst64(Warp& w, const Instr& i, u32 m){FOR_LANES(m, w.r<u64>(i.o[0])[l] = w.r<u64>(i.o[1])[l] + u64(i.imm))}

#define BY_INT(type, E)    \
  type == "s16"   ? E<s16> \
  : type == "u16" ? E<u16> \
  : type == "s32" ? E<s32> \
  : type == "u32" ? E<u32> \
  : type == "s64" ? E<s64> \
  : type == "u64" ? E<u64> \
                  : nullptr

}  // namespace

}  // namespace ptx
