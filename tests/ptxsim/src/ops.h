// Lane-wise operations: one loop over the lanes of a mask for each.
#pragma once
#include <cmath>
#include "exec.h"

namespace ptx {

template <class D, class A, auto F>
void unary(Warp& w, const Instr& i, u32 m) {
  D* d = w.r<D>(i.o[0]);
  const A* a = w.r<A>(i.o[1]);
  FOR_LANES(m, d[l] = F(a[l]))
}
template <class D, class A, auto F>
void binary(Warp& w, const Instr& i, u32 m) {
  D* d = w.r<D>(i.o[0]);
  const A *a = w.r<A>(i.o[1]), *b = w.r<A>(i.o[2]);
  FOR_LANES(m, d[l] = F(a[l], b[l]))
}
template <class D, class A, class B, auto F>
void binary2(Warp& w, const Instr& i, u32 m) {
  D* d = w.r<D>(i.o[0]);
  const A* a = w.r<A>(i.o[1]);
  const B* b = w.r<B>(i.o[2]);
  FOR_LANES(m, d[l] = F(a[l], b[l]))
}
template <class D, class A, class C, auto F>
void ternary(Warp& w, const Instr& i, u32 m) {
  D* d = w.r<D>(i.o[0]);
  const A *a = w.r<A>(i.o[1]), *b = w.r<A>(i.o[2]);
  const C* c = w.r<C>(i.o[3]);
  FOR_LANES(m, d[l] = F(a[l], b[l], c[l]))
}

inline float bits(u32 u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline u32 bits(float f) {
  u32 u;
  memcpy(&u, &f, 4);
  return u;
}
inline double bitsd(u64 u) {
  double f;
  memcpy(&f, &u, 8);
  return f;
}
inline u64 bitsd(double f) {
  u64 u;
  memcpy(&u, &f, 8);
  return u;
}

inline float ftz(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }

// NaN results of float32 instructions are 0x7fffffff; x86 has another sign.
inline float canon(float a) { return a != a ? bits(0x7fffffffu) : a; }
inline double canon(double a) { return a; }

// 16-bit floats.
inline float fromBf16(u16 h) { return bits(u32(h) << 16); }
inline u16 toBf16(float f) {
  u32 u = bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline u16 toBf16Zero(float f) {
  u32 u = bits(f);
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : u16(u >> 16);
}
inline float fromF16(u16 h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return float(x);
}
inline u16 toF16(float f) {
  _Float16 x = _Float16(f);
  u16 h;
  memcpy(&h, &x, 2);
  if (f != f) return 0x7fff;
  return h;
}
inline u16 toF16d(double f) {
  _Float16 x = _Float16(f);
  u16 h;
  memcpy(&h, &x, 2);
  if (f != f) return 0x7fff;
  return h;
}

inline u32 tf32Rna(float f) {
  u32 u = bits(f);
  if ((u & 0x7f800000) == 0x7f800000) return (u & 0x7fffff) ? 0x7fffffff : u;
  return (u + 0x1000) & ~0x1fffu;
}
inline u32 tf32Rn(float f) {
  u32 u = bits(f);
  if ((u & 0x7f800000) == 0x7f800000) return (u & 0x7fffff) ? 0x7fffffff : u;
  return (u + 0xfff + ((u >> 13) & 1)) & ~0x1fffu;
}
inline float tf32(u32 u) { return bits(u & ~0x1fffu); }

template <class T>
T fmaxPtx(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
T fminPtx(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T fmaxNan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : fmaxPtx(a, b);
}
template <class T>
T fminNan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : fminPtx(a, b);
}

template <class I, class F>
I toInt(F a) {  // truncated already; saturates, NaN is 0
  if (a != a) return 0;
  const long double v = a;
  if (v <= (long double)std::numeric_limits<I>::min()) return std::numeric_limits<I>::min();
  if (v >= (long double)std::numeric_limits<I>::max()) return std::numeric_limits<I>::max();
  return I(a);
}

// Registers of one lane, and the address that an instruction means.
inline u64 addressOf(Warp& w, const Instr& i, int l) {
  if (i.addr < 0) return i.imm;
  return i.addrWidth == 8 ? w.r<u64>(i.addr)[l] + i.imm : u64(u32(w.r<u32>(i.addr)[l] + u32(i.imm)));
}

inline void put(Warp& w, s32 at, u32 regWidth, int l, const u8* from, u32 width, bool sign) {
  u64 v = 0;
  memcpy(&v, from, width);
  if (sign && width < 8 && (v >> (8 * width - 1))) v |= ~0ull << (8 * width);
  switch (regWidth) {
    case 2:
      w.r<u16>(at)[l] = v;
      break;
    case 4:
      w.r<u32>(at)[l] = v;
      break;
    default:
      w.r<u64>(at)[l] = v;
  }
}
inline u64 get(Warp& w, s32 at, u32 regWidth, int l) {
  switch (regWidth) {
    case 2:
      return w.r<u16>(at)[l];
    case 4:
      return w.r<u32>(at)[l];
    default:
      return w.r<u64>(at)[l];
  }
}

}  // namespace ptx
