// Scratch memory that outlives a call.
#pragma once

#include <cstddef>

namespace deqfuse {

// Memory for `bytes`, aligned for vectors; throws std::bad_alloc. Large blocks that are given back are kept for the
// next call, 128 MB of them in the process at most: fresh pages cost more than what most calls do in them.
void* take_memory(size_t bytes);
void give_memory(void* memory, size_t bytes) noexcept;

}  // namespace deqfuse
