#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define DEQFUSE_SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DEQFUSE_SANITIZED
#endif

namespace deqfuse {
namespace {

#ifdef DEQFUSE_SANITIZED
constexpr size_t kKept = 0;  // a sanitizer is to see every use of what was given back
#else
constexpr size_t kKept = size_t(128) << 20;
#endif
constexpr size_t kLarge = size_t(128) << 10;
constexpr int kBlocks = 64;

struct Block {
  void* memory;
  size_t size;
};

// The blocks of nobody, the oldest first. Whoever does not get the lock at once goes without: a child of fork may never.
struct Kept {
  std::mutex mutex;
  Block blocks[kBlocks];
  int count = 0;
  size_t total = 0;

  void remove(int i) {
    total -= blocks[i].size;
    std::copy(blocks + i + 1, blocks + count--, blocks + i);
  }
  void free_oldest() {
    std::free(blocks[0].memory);
    remove(0);
  }
};
Kept kept;

// In steps of an eighth, so that problems of like size find each other's blocks.
size_t size_of(size_t bytes) {
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return std::max((bytes + step - 1) / step * step, step);
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t size = size_of(bytes);
  std::unique_lock<std::mutex> lock(kept.mutex, std::defer_lock);
  if (size >= kLarge && lock.try_lock())
    for (int i = kept.count - 1; i >= 0; --i)
      if (kept.blocks[i].size == size) {
        void* memory = kept.blocks[i].memory;
        kept.remove(i);
        return memory;
      }
  void* memory = std::aligned_alloc(64, size);
  if (memory == nullptr && lock.owns_lock()) {
    while (kept.count > 0) kept.free_oldest();
    memory = std::aligned_alloc(64, size);
  }
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void give_memory(void* memory, size_t bytes) noexcept {
  const size_t size = size_of(bytes);
  std::unique_lock<std::mutex> lock(kept.mutex, std::defer_lock);
  if (size < kLarge || size > kKept || !lock.try_lock()) return std::free(memory);
  while (kept.count == kBlocks || kept.total + size > kKept) kept.free_oldest();
  kept.blocks[kept.count++] = {memory, size};
  kept.total += size;
}

}  // namespace deqfuse
