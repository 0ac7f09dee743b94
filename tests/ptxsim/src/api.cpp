// The C interface; emulator.py is its other side.
#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "matrix.h"
#include "state.h"

namespace ptx {
namespace {

std::string quoted(const std::string& s) {
  std::string o = "\"";
  for (char c : s) {
    if (c == '"' || c == '\\') {
      o += '\\';
      o += c;
    } else if ((unsigned char)c < 32)
      o += ' ';
    else
      o += c;
  }
  return o + "\"";
}

std::string lastError, lastJson;
std::vector<std::unique_ptr<Module>> modules;

Poison* poisonAt(u64 addr, u64 size, u64& offset) {
  auto at = state.poisons.upper_bound(addr);
  if (at == state.poisons.begin()) return nullptr;
  --at;
  if (addr + size > at->first + at->second.size) return nullptr;
  offset = addr - at->first;
  return &at->second;
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

const char* sim_error() { return lastError.c_str(); }

int sim_load(const char* text) {
  try {
    modules.push_back(parse(text));
    return int(modules.size()) - 1;
  } catch (const std::exception& e) {
    lastError = e.what();
    return -1;
  }
}

// "name offset size offset size ..\n" for each kernel
const char* sim_kernels(int module) {
  lastJson.clear();
  for (auto& [name, f] : modules[module]->functions) {
    lastJson += name;
    for (auto& p : f->params) lastJson += " " + std::to_string(p.offset) + " " + std::to_string(p.size);
    lastJson += "\n";
  }
  return lastJson.c_str();
}

// PTX lines that ran
const char* sim_hits(int module, const char* kernel) {
  lastJson.clear();
  auto& f = *modules[module]->functions.at(kernel);
  for (size_t k = 0; k < f.hits.size(); ++k)
    if (f.hits[k]) lastJson += std::to_string(f.code[k].line) + " ";
  return lastJson.c_str();
}

void sim_clear_regions() {
  for (auto& r : state.regions) free(r.cells);
  state.regions.clear();
}
// As the kernel sees it from `base` on; memory at `host`.
void sim_region(u64 base, void* host, u64 size, u32 granule, const char* name) {
  if (!size) return;
  Region r{base, size, static_cast<u8*>(host), granule, name, nullptr, nullptr};
  auto at = std::upper_bound(state.regions.begin(), state.regions.end(), base,
                             [](u64 a, const Region& q) { return a < q.base; });
  state.regions.insert(at, r);
}
// Memory that holds nothing yet; forgotten by sim_clean.
void sim_poison(u64 addr, u64 size) {
  if (!size) return;
  auto at = state.poisons.lower_bound(addr);
  if (at != state.poisons.begin()) {
    auto before = std::prev(at);
    if (before->first + before->second.size > addr) at = before;
  }
  while (at != state.poisons.end() && at->first < addr + size) at = state.poisons.erase(at);
  Poison p{size, std::make_unique<u8[]>(size)};
  memset(p.bytes.get(), 1, size);
  state.poisons[addr] = std::move(p);
}
void sim_clean(u64 addr, u64 size) {
  if (!size) return;
  auto at = state.poisons.upper_bound(addr);
  if (at != state.poisons.begin()) --at;
  for (; at != state.poisons.end() && at->first < addr + size; ++at) {
    const u64 from = std::max(addr, at->first), to = std::min(addr + size, at->first + at->second.size);
    if (from < to) memset(at->second.bytes.get() + (from - at->first), 0, to - from);
  }
}
void sim_forget(u64 addr) { state.poisons.erase(addr); }
u64 sim_poisoned(u64 addr, u64 size) {  // bytes never written
  u64 offset, n = 0;
  Poison* p = poisonAt(addr, size, offset);
  if (p)
    for (u64 k = 0; k < size; ++k) n += p->bytes[offset + k];
  return n;
}

int sim_launch(int module, const char* kernel, const u32* grid, const u32* block, u32 shared, const u8* params,
               u32 bytes, u64 seed, int strict) {
  try {
    auto at = modules.at(module)->functions.find(kernel);
    if (at == modules[module]->functions.end()) throw Error(std::string("no kernel ") + kernel);
    Launch l;
    l.f = at->second.get();
    for (int k = 0; k < 3; ++k) {
      l.grid[k] = grid[k];
      l.block[k] = block[k];
    }
    l.threads = block[0] * block[1] * block[2];
    if (l.f->reqThreads && l.threads > l.f->reqThreads) throw Error("more threads than the kernel was compiled for");
    l.f->hits.resize(l.f->code.size());
    l.dynShared = shared;
    l.params.assign(params, params + bytes);
    l.params.resize(std::max<size_t>(l.f->paramBytes, bytes) + 16);
    l.seed = seed;
    l.strict = strict;
    for (auto& i : l.f->code) i.lastRegion = 0;
    for (auto& r : state.regions) {
      u64 offset;
      Poison* p = poisonAt(u64(r.host), r.size, offset);
      r.poison = p ? p->bytes.get() + offset : nullptr;
    }
    // module variables
    for (auto& g : modules[module]->globals) {
      bool there = false;
      for (auto& r : state.regions) there |= r.base == u64(g->data());
      if (!there) sim_region(u64(g->data()), g->data(), g->size(), 1, "module variable");
    }
    const auto begin = std::chrono::steady_clock::now();
    run(l);
    state.totalSeconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return 0;
  } catch (const std::exception& e) {
    lastError = e.what();
    return -1;
  }
}

const char* sim_reports(int clear) {
  lastJson = "[";
  for (auto& key : state.reportOrder) {
    const Report& r = state.reports[key];
    if (lastJson.size() > 1) lastJson += ",\n";
    lastJson += "{\"kind\":" + quoted(r.kind) + ",\"kernel\":" + quoted(r.kernel) + ",\"where\":" + quoted(r.where) +
                ",\"source\":" + quoted(r.source) + ",\"other\":" + quoted(r.other) +
                ",\"other_source\":" + quoted(r.otherSource) + ",\"detail\":" + quoted(r.detail) +
                ",\"count\":" + std::to_string(r.count) + "}";
  }
  lastJson += "]";
  if (clear) {
    state.reports.clear();
    state.reportOrder.clear();
  }
  return lastJson.c_str();
}

// Whether sums of tensor cores are cut off, as measurements have it.
void sim_truncate(int on) { truncating = on; }

void sim_statistics(double* out) {
  out[0] = double(state.totalSteps);
  out[1] = double(state.totalLanes);
  out[2] = state.totalSeconds;
}

}  // extern "C"
