// PTX text to instructions.
#include <cctype>
#include "decode.h"

namespace ptx {
namespace {

struct Token {
  enum Type { Id, Num, Punct, Str, End } type;
  std::string s;
  u32 line;
};

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

u32 widthOf(const std::string& type) {
  if (type == "pred") return 0;
  const char* p = type.c_str();
  while (*p && !isdigit((unsigned char)*p)) ++p;
  const int bits = atoi(p);
  if (bits == 16 && type.find("x2") != std::string::npos) return 4;
  if (bits < 8) throw Error("type ." + type);
  return bits / 8;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : t_(tokenize(text)), m_(new Module) {
    size_t at = 0;
    while (at <= text.size()) {
      size_t end = text.find('\n', at);
      if (end == std::string::npos) end = text.size();
      m_->source.push_back(text.substr(at, end - at));
      at = end + 1;
    }
  }

  std::unique_ptr<Module> run() {
    while (peek().type != Token::End) top();
    return std::move(m_);
  }

 private:
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
  [[noreturn]] void fail(const std::string& why) const {
    const u32 line = peek().line;
    throw Error("PTX line " + std::to_string(line) + ": " + why + ": " +
                (line <= m_->source.size() ? m_->source[line - 1] : ""));
  }

  void top() {
    if (take(".version") || take(".target")) {
      const u32 line = peek().line;
      while (peek().line == line && peek().type != Token::End) next();
      return;
    }
    if (take(".address_size")) {
      next();
      return;
    }
    if (take(".file")) {
      file();
      return;
    }
    if (take(".section")) {
      next();
      want("{");
      skipBraces();
      return;
    }
    if (is(".loc")) {
      loc();
      return;
    }
    if (take(".visible") || take(".extern") || take(".weak") || take(".common")) return;
    if (take(".entry")) {
      entry();
      return;
    }
    if (is(".shared") || is(".global") || is(".const")) {
      variable(nullptr);
      return;
    }
    if (take(";")) return;
    fail("unknown directive");
  }
  void skipBraces() {
    int depth = 1;
    while (depth) {
      if (is("{")) ++depth;
      if (is("}")) --depth;
      if (peek().type == Token::End) fail("no }");
      next();
    }
  }
  void file() {
    const size_t n = std::stoul(next().s);
    const std::string path = next().s;
    if (m_->files.size() <= n) m_->files.resize(n + 1);
    m_->files[n] = path;
    while (take(",")) next();
  }
  void loc() {
    next();
    // .file lines of nvcc come at the end of the text: remember numbers, resolve later
    const size_t f = std::stoul(peek().s), line = std::stoul(peek(1).s);
    next();
    next();
    next();
    loc_ = "\x01" + std::to_string(f) + ":" + std::to_string(line);
    // Triton says it all in a comment
    const std::string& whole = m_->source[t_[p_ - 1].line - 1];
    const size_t comment = whole.find("// ");
    if (comment != std::string::npos) loc_ = whole.substr(comment + 3);
    while (take(",")) {
      const Token w = next();
      if (w.s == "function_name") {
        next();
        if (take("+")) next();
      } else if (w.s == "inlined_at") {
        const std::string a = next().s, b = next().s;
        next();
        loc_ += " @ \x01" + a + ":" + b;
        // the chain: where the inlined call itself was
        auto up = inlinedAt_.find(a + ":" + b);
        if (up != inlinedAt_.end()) loc_ += up->second;
        inlinedAt_[std::to_string(f) + ":" + std::to_string(line)] =
            " @ \x01" + a + ":" + b + (up != inlinedAt_.end() && up->second.size() < 200 ? up->second : "");
      } else {
        next();
      }
    }
  }

  u64 initAddress(Module&, const std::string&) { return 0; }

  void variable(Builder* b) {
    const std::string space = next().s;
    u32 align = 1;
    std::string type;
    for (;;) {
      if (take(".align")) {
        align = std::stoul(next().s);
        continue;
      }
      if (peek().s[0] == '.') {
        const std::string s = next().s.substr(1);
        if (s == "v2" || s == "v4" || s == "attribute") fail("variable");
        type = s;
        continue;
      }
      break;
    }
    const u32 w = widthOf(type);
    const std::string name = next().s;
    u64 count = 1;
    bool extent = true;
    while (take("[")) {
      if (take("]")) {
        extent = false;
        continue;
      }
      count *= std::stoull(next().s, nullptr, 0);
      want("]");
    }
    if (align < w) align = w;
    if (space == ".shared") {
      if (!extent) {
        dynamicShared_.push_back(name);
        symbols_[name] = {SymbolKind::DynShared, 0};
      } else {
        sharedBytes_ = (sharedBytes_ + align - 1) / align * align;
        symbols_[name] = {SymbolKind::Shared, sharedBytes_};
        sharedBytes_ += count * w;
      }
    } else if (space == ".local") {
      if (!b) fail("local");
      b->f->localBytes = (b->f->localBytes + align - 1) / align * align;
      b->symbols[name] = {SymbolKind::Local, b->f->localBytes};
      b->f->localBytes += count * w;
    } else {
      auto data = std::make_unique<std::vector<u8>>(std::max<u64>(count * w, 16), 0);
      if (take("=")) {
        size_t at = 0;
        auto one = [&] {
          const bool neg = take("-");
          const Token v = next();
          u64 value = number(v.s, w);
          if (neg) value = -value;
          memcpy(data->data() + at, &value, std::min<u32>(w, 8));
          at += w;
        };
        if (take("{")) {
          while (!take("}")) {
            one();
            take(",");
          }
        } else
          one();
      }
      symbols_[name] = {SymbolKind::Global, u64(data->data())};
      m_->globals.push_back(std::move(data));
    }
    want(";");
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

  void entry() {
    Builder b;
    b.f = std::make_unique<Function>();
    b.symbols = symbols_;
    b.f->name = next().s;
    if (take("(")) {
      while (!take(")")) {
        want(".param");
        u32 align = 1, w = 0;
        for (;;) {
          if (take(".align")) {
            align = std::stoul(next().s);
            continue;
          }
          if (take(".ptr")) continue;
          if (take(".global") || take(".shared") || take(".const") || take(".local")) continue;
          if (peek().s[0] == '.') {
            w = widthOf(next().s.substr(1));
            if (!align_seen(w, align)) {
            }
            continue;
          }
          break;
        }
        const std::string name = next().s;
        u32 size = w, al = std::max(w, 1u);
        if (take("[")) {
          size = w * std::stoul(next().s);
          want("]");
          al = align;
        }
        b.f->paramBytes = (b.f->paramBytes + al - 1) / al * al;
        b.symbols[name] = {SymbolKind::Param, b.f->paramBytes};
        b.f->params.push_back({b.f->paramBytes, size, al});
        b.f->paramBytes += size;
        take(",");
      }
    }
    while (!is("{")) {
      if (take(".reqntid") || take(".maxntid")) {
        u32 n = std::stoul(next().s);
        while (take(",")) n *= std::stoul(next().s);
        b.f->reqThreads = n;
        continue;
      }
      if (take(".maxnreg") || take(".minnctapersm")) {
        next();
        continue;
      }
      fail("entry directive");
    }
    next();
    body(b);
    b.finish();
    b.f->staticShared = 0;
    pending_.push_back(b.f.get());
    m_->functions[b.f->name] = std::move(b.f);
  }
  bool align_seen(u32, u32) { return true; }

  void body(Builder& b) {
    b.scopes.emplace_back();
    int depth = 1;
    u32 used = ~0u;
    while (depth) {
      const Token& k = peek();
      if (k.type == Token::End) fail("no }");
      if (take("{")) {
        ++depth;
        b.scopes.emplace_back();
        continue;
      }
      if (take("}")) {
        --depth;
        b.scopes.pop_back();
        continue;
      }
      if (take(";")) continue;
      if (is(".loc")) {
        loc();
        continue;
      }
      if (take(".reg")) {
        regs(b);
        continue;
      }
      if (is(".shared") || is(".local")) {
        auto before = symbols_;
        variable(&b);
        for (auto& s : symbols_) b.symbols[s.first] = s.second;
        continue;
      }
      if (take(".pragma")) {
        const std::string s = next().s;
        want(";");
        if (s.rfind("used_bytes_mask", 0) == 0)
          used = std::stoul(s.substr(15), nullptr, 0);
        else if (s != "nounroll")
          fail("pragma");
        continue;
      }
      if (k.type == Token::Id && peek(1).s == ":" && peek(1).type == Token::Punct) {
        b.labels[k.s] = b.f->code.size();
        p_ += 2;
        continue;
      }
      if (k.s[0] == '.') fail("directive in a body");
      instruction(b, used);
      used = ~0u;
    }
  }

  void regs(Builder& b) {
    const std::string type = next().s.substr(1);
    const u32 w = widthOf(type);
    do {
      const std::string name = next().s;
      if (take("<")) {
        const u32 n = std::stoul(next().s);
        want(">");
        for (u32 i = 0; i < n; ++i) b.declare(name + std::to_string(i), w);
      } else
        b.declare(name, w);
    } while (take(","));
    want(";");
  }

  Operand operand(Builder& b) {
    Operand o;
    if (take("{")) {
      o.type = Operand::Vector;
      while (!take("}")) {
        o.parts.push_back(operand(b));
        take(",");
      }
      return o;
    }
    if (take("[")) {
      o = operand(b);
      o.address = true;
      want("]");
      return o;
    }
    if (take("!")) {
      o = operand(b);
      o.negated = true;
      return o;
    }
    const bool neg = take("-");
    const Token k = next();
    if (k.type == Token::Num) {
      o.type = Operand::Imm;
      o.isFloat = k.s.size() > 2 && k.s[0] == '0' && strchr("fFdD", k.s[1]) && k.s[1] != 0;
      if (k.s.size() > 1 && (k.s[1] == 'd' || k.s[1] == 'D')) o.isFloat = true;
      o.imm = number(k.s, 4);
      if (neg) o.imm = -o.imm;
    } else if (k.type == Token::Id) {
      if (neg) fail("negated name");
      o.type = Operand::Name;
      o.name = k.s;
      if (k.s == "_") o.type = Operand::Sink;
    } else
      fail("operand");
    if (is("+") || is("-")) {
      const bool minus = next().s == "-";
      const bool again = take("-");
      const u64 v = number(next().s, 8);
      o.offset = (minus != again) ? -s64(v) : s64(v);
    }
    if (take("|")) {
      o.second = next().s;
    }
    return o;
  }

  void instruction(Builder& b, u32 used) {
    const u32 line = peek().line;
    const size_t from = p_;
    Pending s;
    s.line = line;
    s.used = used;
    if (take("@")) {
      s.predNeg = take("!");
      s.pred = next().s;
    }
    s.op = next().s;
    if (!is(";")) {
      do s.operands.push_back(operand(b));
      while (take(","));
    }
    want(";");
    std::string text;
    for (size_t i = from; i + 1 < p_; ++i) text += (text.empty() ? "" : " ") + t_[i].s;
    s.text = text;
    s.loc = loc_;
    try {
      b.add(s);
    } catch (const Error& e) {
      throw Error("PTX line " + std::to_string(line) + ": " + e.what() + ": " + text);
    }
  }

 public:
  // Names of files and the extent of shared memory are known only now.
  void resolve(Module& m) {
    for (auto& [name, f] : m.functions) {
      f->staticShared = sharedBytes_;
      for (auto& l : f->locs) {
        std::string out;
        for (size_t i = 0; i < l.size(); ++i) {
          if (l[i] != '\x01') {
            out += l[i];
            continue;
          }
          size_t j = l.find(':', i);
          const size_t n = std::stoul(l.substr(i + 1, j - i - 1));
          std::string path = n < m.files.size() ? m.files[n] : "?";
          const size_t slash = path.rfind('/');
          out += slash == std::string::npos ? path : path.substr(slash + 1);
          i = j - 1;
        }
        l = out;
      }
      // dynamic shared memory begins behind the static one
      const u64 at = (sharedBytes_ + 127) / 128 * 128;
      for (auto& c : f->consts)
        if (c.second.first >= kDynamicMark && c.second.first < kDynamicMark + (1ull << 32) && c.second.second & 0x80)
          c.second.first = at + (c.second.first - kDynamicMark);
      for (auto& i : f->code)
        if (i.addrWidth & 0x80) {
          i.imm += at;
          i.addrWidth &= 0x7f;
        }
    }
  }

 private:
  std::vector<Token> t_;
  size_t p_ = 0;
  std::unique_ptr<Module> m_;
  std::map<std::string, Symbol> symbols_;
  std::vector<std::string> dynamicShared_;
  std::vector<Function*> pending_;
  u64 sharedBytes_ = 0;
  std::string loc_;
  std::map<std::string, std::string> inlinedAt_;
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) {
  Parser p(text);
  auto m = p.run();
  p.resolve(*m);
  return m;
}

}  // namespace ptx
