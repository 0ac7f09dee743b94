#include "memory.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace deqfuse {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kKept = 0;  // a sanitizer is to see every use of what was given back
#else
constexpr size_t kKept = size_t(128) << 20;
#endif
constexpr size_t kLarge = size_t(128) << 10;

struct Block {
  void* memory;
  size_t size;
};

// The blocks of nobody, the oldest first. Never destroyed: threads may outlive static objects.
struct Kept {
  std::mutex mutex;
  std::deque<Block> blocks;
  size_t total = 0;
};
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

// In steps of an eighth, so that problems of like size find each other's blocks.
size_t size_of(size_t bytes) {
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step) / step * step;
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t size = size_of(bytes);
  if (size >= kLarge) {
    Kept& all = kept();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (auto block = all.blocks.begin(); block != all.blocks.end(); ++block)
      if (block->size == size) {
        void* memory = block->memory;
        all.total -= size;
        all.blocks.erase(block);
        return memory;
      }
  }
  void* memory = std::aligned_alloc(64, size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void give_memory(void* memory, size_t bytes) noexcept {
  const size_t size = size_of(bytes);
  if (size < kLarge || size > kKept) return std::free(memory);
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.blocks.push_back({memory, size});
  for (all.total += size; all.total > kKept; all.blocks.pop_front()) {
    all.total -= all.blocks.front().size;
    std::free(all.blocks.front().memory);
  }
}

}  // namespace deqfuse
