// The library's compiled host code (launch.cuh in its kernels_*.o) on a CUDA runtime that launches on the emulator, and
// the adjoint operators (ops.h) on CPU tensors whose memory the emulator knows.
#define DEQFUSE_ISA gpu
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

extern "C" {
void sim_clear_regions();
void sim_region(uint64_t base, void* host, uint64_t size, uint32_t granule, const char* name);
void sim_poison(uint64_t addr, uint64_t size);
void sim_forget(uint64_t addr);
uint64_t sim_poisoned(uint64_t addr, uint64_t size);
int sim_launch(int module, const char* kernel, const uint32_t* grid, const uint32_t* block, uint32_t shared,
               const uint8_t* params, uint32_t bytes, uint64_t seed, int strict);
const char* sim_error();
}

namespace emu {
struct Made {
  uint64_t at, bytes;
  std::string name;
};
std::vector<Made> made;
std::string unwritten, failure;
int failed = 0;  // until the last error is asked for
std::map<std::string, std::pair<int, std::vector<std::pair<uint32_t, uint32_t>>>> kernels;
std::map<std::string, int> launches;
std::map<const void*, std::string> names;
uint64_t seed = 1;
int strict = 1;
size_t shared_limit = 163 * 1024;

AOTITorchError empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                     int32_t index, AtenTensorHandle* out) {
  const AOTITorchError e = aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, out);
  void* p = nullptr;
  aoti_torch_get_data_ptr(*out, &p);
  int64_t n = 1;
  for (int64_t k = 0; k < dims; ++k) n *= sizes[k];
  const int64_t size = dtype == aoti_torch_dtype_float64()                                        ? 8
                       : dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_int32() ? 4
                                                                                                  : 1;
  if (n > 0) {
    std::string name = "allocation " + std::to_string(made.size());
    name += " [";
    for (int64_t k = 0; k < dims; ++k) name += (k ? "," : "") + std::to_string(sizes[k]);
    name += "]x" + std::to_string(size);
    sim_region(uint64_t(p), p, n * size, size > 4 ? 4 : size, name.c_str());
    sim_poison(uint64_t(p), n * size);
    made.push_back({uint64_t(p), uint64_t(n * size), name});
  }
  return e;
}
}  // namespace emu
#define aoti_torch_empty_strided emu::empty
#include "../../../csrc/cuda/ops.h"
#undef aoti_torch_empty_strided
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/stream.h"

// ---- the CUDA runtime -----------------------------------------------------------------------------------------------

struct Dim {
  unsigned x, y, z;
};
static struct {
  Dim grid, block;
  size_t shared;
  void* stream;
} pushed;
extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* h;
  return &h;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, Dim*, Dim*, int*) {
  emu::names[host] = device;
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}
static std::map<std::string, int> limits;
int __cudaLaunchKernel(void* kernel, Dim grid, Dim block, void** args, size_t shared, void*) {
  const std::string& name = emu::names[kernel];
  auto at = emu::kernels.find(name);
  if (at == emu::kernels.end()) {
    emu::failure = "no PTX of " + name;
    return emu::failed = 1;
  }
  const auto& layout = at->second.second;
  std::vector<uint8_t> params(layout.empty() ? 0 : layout.back().first + layout.back().second);
  for (size_t k = 0; k < layout.size(); ++k) memcpy(params.data() + layout[k].first, args[k], layout[k].second);
  const uint32_t g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  if (shared > 48 * 1024 && limits[name] < int(shared)) {
    emu::failure = "more shared memory than asked for";
    return 1;
  }
  ++emu::launches[name];
  if (sim_launch(at->second.first, name.c_str(), g, b, shared, params.data(), params.size(), emu::seed++,
                 emu::strict)) {
    emu::failure = sim_error();
    return emu::failed = 1;
  }
  return 0;
}
int cudaFuncSetAttribute(const void* f, int, int value) {
  limits[emu::names[f]] = value;
  return 0;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 227 * 1024;
  return 0;
}
const char* cudaGetErrorString(int) { return emu::failure.c_str(); }
int cudaGetLastError() { return std::exchange(emu::failed, 0); }

void emu_kernel(const char* name, int module, int params, const uint32_t* layout) {
  auto& k = emu::kernels[name];
  k.first = module;
  k.second.clear();
  for (int i = 0; i < params; ++i) k.second.push_back({layout[2 * i], layout[2 * i + 1]});
}
void emu_options(uint64_t shared_limit, uint64_t seed, int strict) {
  emu::shared_limit = shared_limit;
  emu::seed = seed;
  emu::strict = strict;
  emu::failure.clear();
}
const char* emu_unwritten() { return emu::unwritten.c_str(); }
const char* emu_launches() {
  static std::string s;
  s.clear();
  for (auto& [n, c] : emu::launches) s += n + " " + std::to_string(c) + "\n";
  return s.c_str();
}
}

// ---- the operators --------------------------------------------------------------------------------------------------

namespace deqfuse {
namespace DEQFUSE_ISA {
namespace {

struct Emulated {
  static Place place(const Tensor&) { return {}; }
  static size_t shared_limit() { return emu::shared_limit; }
  template <template <class, int> class Kind, class T>
  static void run(const AdjointProblem<T>& p, const TilePlan& plan, void* step_memory) {
    run_on_stream<Kind>(p, plan, step_memory, nullptr);
  }
};

void known(const Tensor& t, const char* name) {
  int64_t span = 1, n = 1;
  for (int64_t k = 0; k < t.dim(); ++k) {
    span += (t.size(k) - 1) * t.stride(k);
    n *= t.size(k);
  }
  if (!n) return;
  const int size = t.scalar_type() == ScalarType::Double ? 8 : 4;
  sim_region(uint64_t(t.data_ptr()), t.data_ptr(), span * size, 4, name);
}
struct Call {
  Call() {
    sim_clear_regions();
    emu::made.clear();
    emu::unwritten.clear();
  }
  ~Call() {
    for (auto& m : emu::made) {
      if (const uint64_t n = sim_poisoned(m.at, m.bytes))
        emu::unwritten += m.name + ": " + std::to_string(n) + " of " + std::to_string(m.bytes) + " bytes; ";
      sim_forget(m.at);
    }
    sim_clear_regions();
  }
};

auto adjoint_cells(Tensor g, Tensor z, Tensor x, Tensors params, bool want_params, int64_t groups, bool skip,
                   int64_t mode, double tol, int64_t max_iter, int64_t history, double beta, double lam,
                   bool allow_tf32) {
  const Call call;
  known(g, "grad_z");
  known(z, "z");
  known(x, "x");
  for (size_t k = 0; k < params.size(); ++k) known(params[k], ("params[" + std::to_string(k) + "]").c_str());
  return adjoint_cells_on(Emulated{}, g, z, x, params, want_params, groups, skip, mode,
                          {tol, max_iter, history, beta, lam}, allow_tf32);
}
auto adjoint_fuse(Tensor g, Tensor z, Tensor x, Tensor cell_sum, Tensors params, bool want_params,
                  std::optional<Tensor> mask, int64_t modalities, int64_t groups, bool relu_last, int64_t mode,
                  double tol, int64_t max_iter, int64_t history, double beta, double lam, bool allow_tf32,
                  std::optional<Tensor> counts) {
  const Call call;
  known(g, "grad_z");
  known(z, "z");
  known(x, "x_fuse");
  known(cell_sum, "cell_sum");
  if (mask) known(*mask, "mask");
  if (counts) known(*counts, "counts");
  for (size_t k = 0; k < params.size(); ++k) known(params[k], ("params[" + std::to_string(k) + "]").c_str());
  return adjoint_fuse_on(Emulated{}, g, z, x, cell_sum, params, want_params, mask, modalities, groups, relu_last, mode,
                         {tol, max_iter, history, beta, lam}, allow_tf32, counts);
}

}  // namespace
}  // namespace DEQFUSE_ISA
}  // namespace deqfuse

STABLE_TORCH_LIBRARY(ptxsim, m) {
  m.def(
      "cuda_adjoint_cells(Tensor grad_z, Tensor z, Tensor x, Tensor[] params, bool want_params, int num_groups, bool "
      "skip, int mode, float tol, int max_iter, int history, float beta, float lam, bool allow_tf32=False) -> (Tensor, "
      "Tensor[], Tensor, Tensor, Tensor)");
  m.def(
      "cuda_adjoint_fuse(Tensor grad_z, Tensor z, Tensor x_fuse, Tensor cell_sum, Tensor[] params, bool want_params, "
      "Tensor? mask, int num_modalities, int num_groups, bool relu_last, int mode, float tol, int max_iter, int "
      "history, float beta, float lam, bool allow_tf32=False, Tensor? counts=None) -> (Tensor, Tensor, Tensor[], "
      "Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(ptxsim, CPU, m) {
  m.impl("cuda_adjoint_cells", TORCH_BOX(&deqfuse::gpu::adjoint_cells));
  m.impl("cuda_adjoint_fuse", TORCH_BOX(&deqfuse::gpu::adjoint_fuse));
}
