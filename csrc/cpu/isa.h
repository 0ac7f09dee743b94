// Run-time choice of the kernels.
#pragma once

#include "kernels.h"

namespace deqfuse {

const KernelTable& kernels();

}  // namespace deqfuse
