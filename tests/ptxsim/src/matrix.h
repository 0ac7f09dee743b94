// Products of the tensor cores, and loads and stores of their fragments.
#pragma once
#include "exec.h"

namespace ptx {

// Sums of tensor cores lose what does not fit, as published measurements have it; else they are rounded once.
extern bool truncating;

void mmaTf32k8(Warp& w, const Instr& i, u32 m);
void mmaTf32k4(Warp& w, const Instr& i, u32 m);
void mmaHalf(Warp& w, const Instr& i, u32 m);
void mmaF64(Warp& w, const Instr& i, u32 m);
void mmaF64wide(Warp& w, const Instr& i, u32 m);
void stmatrix(Warp& w, const Instr& i, u32 m);
void ldmatrix(Warp& w, const Instr& i, u32 m);
void elect(Warp& w, const Instr& i, u32 m);

}  // namespace ptx
