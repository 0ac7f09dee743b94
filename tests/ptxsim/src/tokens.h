// PTX text as a sequence of words.
#pragma once
#include <string>
#include <vector>
#include "exec.h"

namespace ptx {

struct Token {
  enum Type { Id, Num, Punct, Str, End } type;
  std::string s;
  u32 line;
};

// Bytes of a register or variable of this type; 0: a predicate.
u32 widthOf(const std::string& type);

// The bits of a literal; those of a decimal fraction depend on the width in bytes.
u64 number(const std::string& s, u32 w);

// Goes through the words of a text.
class Reader {
 public:
  explicit Reader(const std::string& text);

  const Token& peek(int k = 0) const { return t_[std::min(p_ + k, t_.size() - 1)]; }
  Token next() { return t_[std::min(p_++, t_.size() - 1)]; }
  bool is(const char* s) const { return peek().s == s && peek().type != Token::Str; }
  bool take(const char* s) {
    if (!is(s)) return false;
    ++p_;
    return true;
  }
  void want(const char* s) {
    if (!take(s)) fail(std::string("expected ") + s + ", got '" + peek().s + "'");
  }
  void skipBraces();  // from behind a "{" to behind its "}"
  [[noreturn]] void fail(const std::string& why) const;

 protected:
  std::vector<Token> t_;
  size_t p_ = 0;
  std::vector<std::string> source_;  // lines
};

}  // namespace ptx
