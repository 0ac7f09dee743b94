// PTX text to instructions.
#include <cstring>
#include "decode.h"
#include "tokens.h"

namespace ptx {
namespace {

class Parser : private Reader {
 public:
  explicit Parser(const std::string& text) : Reader(text), m_(new Module) {}

  std::unique_ptr<Module> run() {
    while (peek().type != Token::End) top();
    m_->source = std::move(source_);
    resolve();
    return std::move(m_);
  }

 private:
  // Whatever may stand outside a kernel.
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
    if (take(".file")) return file();
    if (take(".section")) {
      next();
      want("{");
      skipBraces();
      return;
    }
    if (is(".loc")) return loc();
    if (take(".visible") || take(".extern") || take(".weak") || take(".common")) return;
    if (take(".entry")) return entry();
    if (is(".shared") || is(".global") || is(".const")) return variable(nullptr);
    if (take(";")) return;
    fail("unknown directive");
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
    const std::string& whole = source_[t_[p_ - 1].line - 1];
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
    m_->functions[b.f->name] = std::move(b.f);
  }

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

  // Names of files and the extent of shared memory are known only at the end.
  void resolve() {
    for (auto& [name, f] : m_->functions) {
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
          std::string path = n < m_->files.size() ? m_->files[n] : "?";
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

  std::unique_ptr<Module> m_;
  std::map<std::string, Symbol> symbols_;
  u64 sharedBytes_ = 0;
  std::string loc_;
  std::map<std::string, std::string> inlinedAt_;
};

}  // namespace

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
