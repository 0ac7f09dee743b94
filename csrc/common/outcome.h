// How the solve of a row can end; the values of deqfuse.Outcome.
#pragma once

#include <cstdint>

namespace deqfuse {

enum class Outcome : int8_t { kConverged = 0, kMaxIter = 1, kStalled = 2, kNonFinite = 3 };

constexpr int kStallSteps = 20;

}  // namespace deqfuse
