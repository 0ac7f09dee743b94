// From a parsed statement to an instruction that can be run.
#pragma once
#include "exec.h"

namespace ptx {

enum class SymbolKind { Shared, DynShared, Global, Param, Local };
struct Symbol {
  SymbolKind kind;
  u64 value;
};
constexpr u64 kDynamicMark = 0x7ead000000000000ull;

struct Operand {
  enum Type { Name, Imm, Vector, Sink } type = Imm;
  bool address = false, negated = false, isFloat = false;
  u64 imm = 0;
  s64 offset = 0;
  std::string name, second;
  std::vector<Operand> parts;
};

struct Pending {
  std::string pred, op, text, loc;
  bool predNeg = false;
  std::vector<Operand> operands;
  u32 line = 0, used = ~0u;
};

struct Reg {
  s32 offset;
  u32 width;
};  // width 0: a predicate

class Builder {
 public:
  std::unique_ptr<Function> f;
  std::map<std::string, Symbol> symbols;
  std::vector<std::unordered_map<std::string, Reg>> scopes;
  std::unordered_map<std::string, size_t> labels;

  void declare(const std::string& name, u32 width);
  void add(const Pending& s);
  void finish();

 private:
  Reg find(const std::string& name);
  s32 constant(u64 value, u32 width, bool dynamic = false);
  s32 special(const std::string& name);
  bool isReg(const Operand& o);
  u32 widthOfReg(const Operand& o);
  s32 src(const Operand& o, u32 width);
  s32 dst(const Operand& o, u32 width);
  s32 predSrc(const Operand& o);
  void address(Instr& i, const Operand& o);
  s32 allocate(u32 bytes) {
    const s32 at = f->regBytes;
    f->regBytes += (bytes + 63) / 64 * 64;
    return at;
  }

  void decode(Instr& i, const std::vector<std::string>& p, const Pending& s);
  void memory(Instr& i, const std::vector<std::string>& p, const Pending& s);
  void asyncCopy(Instr& i, const std::vector<std::string>& p, const Pending& s);
  void atomicAccess(Instr& i, const std::vector<std::string>& p, const Pending& s);
  void convert(Instr& i, const std::vector<std::string>& p, const Pending& s);
  void compare(Instr& i, const std::vector<std::string>& p, const Pending& s);
  void warp(Instr& i, const std::vector<std::string>& p, const Pending& s);

  std::map<std::pair<u64, u32>, s32> constants_;
  std::map<std::string, s32> specials_;
  std::vector<std::pair<size_t, std::string>> branches_;
  std::string lastLoc_;
  u32 minShared_ = 4;
  friend struct Fill;
};

}  // namespace ptx
