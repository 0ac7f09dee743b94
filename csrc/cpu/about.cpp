// What the library says about itself, as C functions that Python calls through ctypes
// (deqfuse/backends/cpu_module.py has the other half of every struct). Nothing here is of Python's API, so one library
// serves every version of Python; what is a tensor goes through the operators (ops_*.cpp).
#include <exception>
#include <string>

#include "isa.h"
#include "ops_host.h"

#define DEQFUSE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Build {
  const char* compiler;
  const char* instruction_set;
  int64_t vector_bytes, torch_major, torch_minor;
};

struct Cut {
  int64_t rows_per_tile, tiles, tile_bytes;
};

}  // namespace

// Why its kernels cannot run here, such as a wrong DEQFUSE_ISA; null if they can. Asked before anything else.
DEQFUSE_EXPORT const char* deqfuse_cpu_error() {
  static std::string message;
  try {
    deqfuse::kernels();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

DEQFUSE_EXPORT void deqfuse_cpu_build(Build* out) {
  const deqfuse::KernelTable& table = deqfuse::kernels();
  *out = {DEQFUSE_COMPILER, table.name, table.bytes, TORCH_TARGET_VERSION >> 56, TORCH_TARGET_VERSION >> 48 & 0xff};
}

DEQFUSE_EXPORT void deqfuse_cpu_plan(int64_t rows, int64_t dim, int64_t itemsize, int64_t history, Cut* out) {
  const deqfuse::Plan plan = deqfuse::kernels().plan(rows, dim, itemsize, int(history));
  const int64_t tile = plan.rows_per_tile;
  *out = {tile, (rows + tile - 1) / tile, plan.tiles_of_state * dim * tile * itemsize};
}

DEQFUSE_EXPORT void deqfuse_cpu_host_device(int64_t shared_limit, bool reversed) {
  deqfuse::set_host_device({size_t(shared_limit), reversed});
}

DEQFUSE_EXPORT void deqfuse_cpu_host_plan(int64_t dim, int64_t groups, int64_t itemsize, deqfuse::HostPlan* out) {
  *out = deqfuse::host_plan(dim, groups, itemsize);
}
