// A PTX emulator for one CTA at a time: data structures shared by parser, decoder and executor.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

// Generic address windows; global addresses are host addresses.
constexpr u64 kSharedBase = 1ull << 56, kLocalBase = 1ull << 57, kParamBase = 1ull << 58, kWindow = 1ull << 40;

enum class Space : u8 { Generic, Global, Shared, Local, Param };
enum class Kind : u8 { Normal, Branch, Exit, WarpSync, Barrier, Trap };

struct Cta;
struct Warp;
struct Instr;
using Exec = void (*)(Warp&, const Instr&, u32 mask);

struct Instr {
  Exec fn = nullptr;
  Kind kind = Kind::Normal;
  Space space = Space::Generic;
  bool predNeg = false;
  u8 width = 0;     // bytes of one element
  u8 vec = 1;       // elements of a vector
  u8 regWidth = 0;  // bytes of the registers of a load or store
  bool isSigned = false;
  u8 sub = 0;  // operation-specific
  u8 sub2 = 0;
  s32 pred = -1;    // byte offset of the guard
  s32 target = -1;  // of a branch
  s64 imm = 0;      // of an address
  u32 used = ~0u;   // bytes that a vector load uses
  s32 addr = -1;    // byte offset of the address register (64 bits, or 32)
  u8 addrWidth = 8;
  s32 memMask = -1;  // operand with the member mask of a .sync
  s32 o[20];         // operands' byte offsets
  u32 line = 0, loc = 0;
  u32 text = 0;
  mutable u32 lastRegion = 0;
};

struct Param {
  u32 offset, size, align;
};
struct Function {
  std::string name;
  std::vector<Instr> code;
  std::vector<std::string> text;
  std::vector<std::string> locs;  // source lines with inlining
  std::vector<Param> params;
  u32 paramBytes = 0;
  u32 regBytes = 0;                                        // register file of a warp
  std::vector<std::pair<u32, std::pair<u64, u8>>> consts;  // offset, value, width
  struct Special {
    u32 offset;
    u8 what;
  };
  std::vector<Special> specials;
  u32 staticShared = 0, localBytes = 0;
  u32 sharedGranule = 4;
  u32 reqThreads = 0;
  mutable std::vector<u8> hits;  // instructions that ran
};

struct Module {
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::vector<std::string> files;
  std::vector<std::unique_ptr<std::vector<u8>>> globals;
  std::vector<std::string> source;
};

// Who touched some bytes last.
struct Cell {
  u32 wEpoch = 0, wTime = 0, wPc = 0, rEpoch = 0, rMask = 0, rTime = 0, rPc = 0;
  u32 wCta = 0, rCta = 0;
  u16 wTid = 0, rOther = 0, rTid = 0;  // rOther: a second reading warp, plus 1
  u8 rWarp = 0, flags = 0;             // 1: read by several CTAs, 2: atomic write, 4: cp.async in flight
};

struct Region {
  u64 base, size;  // as the kernel sees it
  u8* host;
  u32 granule;
  std::string name;
  Cell* cells = nullptr;
  u8* poison = nullptr;  // 1: never written
};

struct Report {
  std::string kind, kernel, where, source, other, otherSource, detail;
  u64 count = 0;
};

struct Launch {
  const Function* f;
  u32 grid[3], block[3], threads;
  u32 dynShared;
  std::vector<u8> params;
  u64 seed;
  bool strict;  // only bar.sync and bar.warp.sync order memory
  u32 firstCta = 0;
};

std::unique_ptr<Module> parse(const std::string& text);

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace ptx
