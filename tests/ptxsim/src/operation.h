// What decoding the operations of PTX shares: the parts of an operation's name, and widths of types.
#pragma once
#include <algorithm>
#include <limits>
#include "decode.h"

namespace ptx {

using Parts = std::vector<std::string>;

inline bool has(const Parts& p, const char* s) { return std::find(p.begin() + 1, p.end(), s) != p.end(); }
[[noreturn]] inline void unimplemented(const std::string& why = "") { throw Error("unimplemented " + why); }
inline u32 typeWidth(const std::string& t) {
  if (t == "pred") return 0;
  if (t == "f16x2" || t == "bf16x2") return 4;
  if (t == "bf16") return 2;
  if (t == "tf32") return 4;
  if (t.size() < 2 || !strchr("busf", t[0])) unimplemented("type ." + t);
  const int n = atoi(t.c_str() + 1);
  if (n != 8 && n != 16 && n != 32 && n != 64) unimplemented("type ." + t);
  return n / 8;
}
inline bool isType(const std::string& t) {
  if (t == "pred" || t == "bf16" || t == "f16x2" || t == "bf16x2" || t == "tf32") return true;
  if (t.size() < 2 || !strchr("busf", t[0])) return false;
  for (size_t i = 1; i < t.size(); ++i)
    if (!isdigit((unsigned char)t[i])) return false;
  return true;
}
// Every modifier must be known: nothing is skipped silently.
inline void only(const Parts& p, std::initializer_list<const char*> known) {
  for (size_t i = 1; i < p.size(); ++i)
    if (std::find_if(known.begin(), known.end(), [&](const char* k) { return p[i] == k; }) == known.end())
      unimplemented("modifier ." + p[i]);
}

}  // namespace ptx
