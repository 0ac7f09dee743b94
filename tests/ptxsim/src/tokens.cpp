#include "tokens.h"
#include <cctype>
#include <cstdlib>
#include <cstring>

namespace ptx {
namespace {

std::vector<Token> tokenize(const std::string& t) {
  std::vector<Token> out;
  out.reserve(t.size() / 4);
  u32 line = 1;
  size_t i = 0, n = t.size();
  auto idStart = [](char c) { return isalpha((unsigned char)c) || c == '_' || c == '$' || c == '%'; };
  auto idChar = [](char c) { return isalnum((unsigned char)c) || c == '_' || c == '$'; };
  while (i < n) {
    char c = t[i];
    if (c == '\n') {
      ++line;
      ++i;
      continue;
    }
    if (isspace((unsigned char)c)) {
      ++i;
      continue;
    }
    if (c == '/' && i + 1 < n && t[i + 1] == '/') {
      while (i < n && t[i] != '\n') ++i;
      continue;
    }
    if (c == '/' && i + 1 < n && t[i + 1] == '*') {
      i += 2;
      while (i + 1 < n && !(t[i] == '*' && t[i + 1] == '/')) {
        if (t[i] == '\n') ++line;
        ++i;
      }
      i += 2;
      continue;
    }
    if (c == '"') {
      size_t j = i + 1;
      while (j < n && t[j] != '"') ++j;
      out.push_back({Token::Str, t.substr(i + 1, j - i - 1), line});
      i = j + 1;
      continue;
    }
    if (c == '.' || idStart(c)) {
      size_t j = i + 1;
      // dots and "::" inside opcodes and special registers belong to the word
      while (j < n &&
             (idChar(t[j]) || (t[j] == '.' && j + 1 < n && (isalnum((unsigned char)t[j + 1]) || t[j + 1] == '_')) ||
              (t[j] == ':' && j + 1 < n && t[j + 1] == ':') || (t[j] == ':' && t[j - 1] == ':')))
        ++j;
      out.push_back({Token::Id, t.substr(i, j - i), line});
      i = j;
      continue;
    }
    if (isdigit((unsigned char)c)) {
      size_t j = i + 1;
      while (j < n && (isalnum((unsigned char)t[j]) || t[j] == '.')) ++j;
      out.push_back({Token::Num, t.substr(i, j - i), line});
      i = j;
      continue;
    }
    out.push_back({Token::Punct, std::string(1, c), line});
    ++i;
  }
  out.push_back({Token::End, "", line});
  return out;
}

}  // namespace

u32 widthOf(const std::string& type) {
  if (type == "pred") return 0;
  const char* p = type.c_str();
  while (*p && !isdigit((unsigned char)*p)) ++p;
  const int bits = atoi(p);
  if (bits == 16 && type.find("x2") != std::string::npos) return 4;
  if (bits < 8) throw Error("type ." + type);
  return bits / 8;
}

u64 number(const std::string& s, u32 w) {
  if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) return std::stoull(s.substr(2), nullptr, 16);
  if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) return std::stoull(s.substr(2), nullptr, 16);
  std::string t = s;
  while (!t.empty() && (t.back() == 'U' || t.back() == 'u')) t.pop_back();
  if (t.find('.') != std::string::npos) {
    if (w == 8) {
      double d = std::stod(t);
      u64 u;
      memcpy(&u, &d, 8);
      return u;
    }
    float d = std::stof(t);
    u32 u;
    memcpy(&u, &d, 4);
    return u;
  }
  return std::stoull(t, nullptr, 0);
}

Reader::Reader(const std::string& text) : t_(tokenize(text)) {
  size_t at = 0;
  while (at <= text.size()) {
    size_t end = text.find('\n', at);
    if (end == std::string::npos) end = text.size();
    source_.push_back(text.substr(at, end - at));
    at = end + 1;
  }
}

void Reader::skipBraces() {
  int depth = 1;
  while (depth) {
    if (is("{")) ++depth;
    if (is("}")) --depth;
    if (peek().type == Token::End) fail("no }");
    next();
  }
}

void Reader::fail(const std::string& why) const {
  const u32 line = peek().line;
  throw Error("PTX line " + std::to_string(line) + ": " + why + ": " +
              (line <= source_.size() ? source_[line - 1] : ""));
}

}  // namespace ptx
