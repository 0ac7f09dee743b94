// Products of the tensor cores, and loads and stores of their fragments.
#include "matrix.h"

#include <cmath>

#include "ops.h"

namespace ptx {

bool truncating = false;

namespace {

// c plus the products of a row of A and a column of B: exact, and rounded once; or as published measurements have it,
// all aligned to the largest, cut off behind its 24th bit, added, and cut off again.
template <class F>
float sum(float c, int depth, F product) {
  double total = c, largest = std::fabs(c);
  for (int k = 0; k < depth; ++k) {
    total += product(k);
    largest = std::fmax(largest, std::fabs(product(k)));
  }
  if (!truncating || !(largest > 0) || !std::isfinite(largest)) return float(total);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  total = std::trunc(c / unit);
  for (int k = 0; k < depth; ++k) total += std::trunc(product(k) / unit);
  total *= unit;
  const float rounded = float(total);
  return std::fabs(double(rounded)) > std::fabs(total) ? std::nextafter(rounded, 0.0f) : rounded;
}

}  // namespace

// d: o[0..], a, b, c follow. Fragment layouts by the tables of the PTX ISA.
void mmaTf32k8(Warp& w, const Instr& i, u32) {
  float A[16][8], B[8][8], C[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = l & 3;
    A[g][t] = tf32(w.r<u32>(i.o[4])[l]);
    A[g + 8][t] = tf32(w.r<u32>(i.o[5])[l]);
    A[g][t + 4] = tf32(w.r<u32>(i.o[6])[l]);
    A[g + 8][t + 4] = tf32(w.r<u32>(i.o[7])[l]);
    B[t][g] = tf32(w.r<u32>(i.o[8])[l]);
    B[t + 4][g] = tf32(w.r<u32>(i.o[9])[l]);
    C[g][2 * t] = w.r<float>(i.o[10])[l];
    C[g][2 * t + 1] = w.r<float>(i.o[11])[l];
    C[g + 8][2 * t] = w.r<float>(i.o[12])[l];
    C[g + 8][2 * t + 1] = w.r<float>(i.o[13])[l];
  }
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) C[r][c] = sum(C[r][c], 8, [&](int k) { return double(A[r][k]) * B[k][c]; });
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = l & 3;
    w.r<float>(i.o[0])[l] = C[g][2 * t];
    w.r<float>(i.o[1])[l] = C[g][2 * t + 1];
    w.r<float>(i.o[2])[l] = C[g + 8][2 * t];
    w.r<float>(i.o[3])[l] = C[g + 8][2 * t + 1];
  }
}
void mmaTf32k4(Warp& w, const Instr& i, u32) {
  float A[16][4], B[4][8], C[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = l & 3;
    A[g][t] = tf32(w.r<u32>(i.o[4])[l]);
    A[g + 8][t] = tf32(w.r<u32>(i.o[5])[l]);
    B[t][g] = tf32(w.r<u32>(i.o[6])[l]);
    for (int k = 0; k < 4; ++k) C[g + 8 * (k / 2)][2 * t + k % 2] = w.r<float>(i.o[7 + k])[l];
  }
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      C[r][c] = sum(C[r][c], 4, [&](int k) { return double(A[r][k]) * B[k][c]; });
    }
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 4; ++k) w.r<float>(i.o[k])[l] = C[(l >> 2) + 8 * (k / 2)][2 * (l & 3) + k % 2];
}
// f16 or bf16 (sub), 16 x 8 x (8 sub2)
void mmaHalf(Warp& w, const Instr& i, u32) {
  const int K = 8 * i.sub2, na = 2 * i.sub2, nb = i.sub2;
  float A[16][16], B[16][8], C[16][8];
  auto value = [&](u32 v, int h) {
    const u16 x = h ? v >> 16 : v;
    return i.sub ? fromBf16(x) : fromF16(x);
  };
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = l & 3;
    for (int k = 0; k < na; ++k)
      for (int h = 0; h < 2; ++h) A[g + 8 * (k & 1)][2 * t + h + 8 * (k / 2)] = value(w.r<u32>(i.o[4 + k])[l], h);
    for (int k = 0; k < nb; ++k)
      for (int h = 0; h < 2; ++h) B[2 * t + h + 8 * k][g] = value(w.r<u32>(i.o[4 + na + k])[l], h);
    for (int k = 0; k < 4; ++k) C[g + 8 * (k / 2)][2 * t + k % 2] = w.r<float>(i.o[4 + na + nb + k])[l];
  }
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      C[r][c] = sum(C[r][c], K, [&](int k) { return double(A[r][k]) * B[k][c]; });
    }
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 4; ++k) w.r<float>(i.o[k])[l] = C[(l >> 2) + 8 * (k / 2)][2 * (l & 3) + k % 2];
}
void mmaF64(Warp& w, const Instr& i, u32) {
  double A[8][4], B[4][8], C[8][8];
  for (int l = 0; l < 32; ++l) {
    A[l >> 2][l & 3] = w.r<double>(i.o[2])[l];
    B[l & 3][l >> 2] = w.r<double>(i.o[3])[l];
    for (int k = 0; k < 2; ++k) C[l >> 2][2 * (l & 3) + k] = w.r<double>(i.o[4 + k])[l];
  }
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c)
      for (int k = 0; k < 4; ++k) C[r][c] = std::fma(A[r][k], B[k][c], C[r][c]);
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 2; ++k) w.r<double>(i.o[k])[l] = C[l >> 2][2 * (l & 3) + k];
}

// 16 x 8 x (4 sub2), sm_90
void mmaF64wide(Warp& w, const Instr& i, u32) {
  const int K = 4 * i.sub2, na = 2 * i.sub2, nb = i.sub2;
  double A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = l & 3;
    for (int k = 0; k < na; ++k) A[g + 8 * (k % 2)][t + 4 * (k / 2)] = w.r<double>(i.o[4 + k])[l];
    for (int k = 0; k < nb; ++k) B[t + 4 * k][g] = w.r<double>(i.o[4 + na + k])[l];
    for (int k = 0; k < 4; ++k) C[g + 8 * (k / 2)][2 * t + k % 2] = w.r<double>(i.o[4 + na + nb + k])[l];
  }
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c)
      for (int k = 0; k < K; ++k) C[r][c] = std::fma(A[r][k], B[k][c], C[r][c]);
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 4; ++k) w.r<double>(i.o[k])[l] = C[(l >> 2) + 8 * (k / 2)][2 * (l & 3) + k % 2];
}

// vec matrices; sub: transposed
void stmatrix(Warp& w, const Instr& i, u32) {
  for (int k = 0; k < i.vec; ++k) {
    u16 rows[8][8];
    for (int l = 0; l < 32; ++l) {
      const u32 v = w.r<u32>(i.o[k])[l];
      for (int h = 0; h < 2; ++h) {
        const int a = l / 4, b = 2 * (l % 4) + h;
        (i.sub ? rows[b][a] : rows[a][b]) = u16(v >> (16 * h));
      }
    }
    for (int r = 0; r < 8; ++r)
      if (u8* p = access(w, i, 8 * k + r, Space::Shared, addressOf(w, i, 8 * k + r), 16, kWrite, (const u8*)rows[r]))
        memcpy(p, rows[r], 16);
  }
}

// vec matrices; sub: transposed
void ldmatrix(Warp& w, const Instr& i, u32) {
  u8 rows[4][8][16];
  memset(rows, 0, sizeof rows);
  for (int l = 0; l < 8 * i.vec; ++l)
    if (const u8* p = access(w, i, l, Space::Shared, addressOf(w, i, l), 16, kRead, nullptr))
      memcpy(rows[l / 8][l % 8], p, 16);
  for (int k = 0; k < i.vec; ++k)
    for (int l = 0; l < 32; ++l) {
      u32 v;
      if (!i.sub)
        memcpy(&v, rows[k][l / 4] + 4 * (l % 4), 4);
      else {
        u16 lo, hi;
        memcpy(&lo, rows[k][2 * (l % 4)] + 2 * (l / 4), 2);
        memcpy(&hi, rows[k][2 * (l % 4) + 1] + 2 * (l / 4), 2);
        v = u32(hi) << 16 | lo;
      }
      w.r<u32>(i.o[k])[l] = v;
    }
}
void elect(Warp& w, const Instr& i, u32 m) {
  const u32 first = m & -m;
  u32* p = w.r<u32>(i.o[1]);
  *p = (*p & ~m) | first;
  if (i.o[0] >= 0) FOR_LANES(m, w.r<u32>(i.o[0])[l] = __builtin_ctz(first))
}

}  // namespace ptx
