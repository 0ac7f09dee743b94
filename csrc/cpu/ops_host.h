// The device that the host policy plays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deqfuse {

struct HostDevice {
  size_t shared_limit = 227 * 1024;  // bytes of shared memory for a block; an H100's
  bool reversed = false;             // lanes and rows from the last to the first
  bool tensor_cores = false;         // float32 products lose what a tensor core's sums lose
};

void set_host_device(const HostDevice& device);

// How it cuts up problems of this size: "resident", "streamed" or "steps"; a tile's rows, the threads of a block, the
// bytes of shared memory, or of global memory for each tile of steps.
struct HostPlan {
  const char* cut;
  int64_t rows, threads, bytes;
};
HostPlan host_plan(int64_t d, int64_t groups, int64_t itemsize);

}  // namespace deqfuse
