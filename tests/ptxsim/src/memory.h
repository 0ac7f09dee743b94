// Loads, stores, atomics, cp.async: one instruction each.
#pragma once
#include "exec.h"

namespace ptx {

enum { kAdd, kExch, kCas, kMax, kMin, kAnd, kOr, kXor, kFAdd };
void load(Warp& w, const Instr& i, u32 m);
void store(Warp& w, const Instr& i, u32 m);
void atomic(Warp& w, const Instr& i, u32 m);
void cpAsync(Warp& w, const Instr& i, u32 m);
void cpCommit(Warp& w, const Instr& i, u32 m);
void cpWait(Warp& w, const Instr& i, u32 m);
void nop(Warp& w, const Instr& i, u32 m);
void pack(Warp& w, const Instr& i, u32 m);
void unpack(Warp& w, const Instr& i, u32 m);

}  // namespace ptx
