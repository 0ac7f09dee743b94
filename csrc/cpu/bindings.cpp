// The Python module: what is not a tensor. Importing it also registers the operators (ops_*.cpp).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "isa.h"
#include "ops_host.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const deqfuse::KernelTable& table = deqfuse::kernels();
  py::dict info;
  info["compiler"] = DEQFUSE_COMPILER;
  info["torch_target"] =
      std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["instruction_set"] = table.name;
  info["vector_bytes"] = table.bytes;
  return info;
}

py::dict plan(int64_t rows, int64_t dim, int64_t itemsize, int64_t history) {
  if (rows < 0 || dim < 1 || (itemsize != 4 && itemsize != 8) || history < 0 || history > 8)
    throw std::invalid_argument("plan: expected rows >= 0, dim >= 1, itemsize 4 or 8, history 0 to 8");
  const deqfuse::Plan cut = deqfuse::kernels().plan(rows, dim, itemsize, int(history));
  py::dict plan;
  plan["rows_per_tile"] = cut.rows_per_tile;
  plan["tiles"] = (rows + cut.rows_per_tile - 1) / cut.rows_per_tile;
  plan["tile_bytes"] = cut.tiles_of_state * dim * cut.rows_per_tile * itemsize;
  return plan;
}

py::dict host_plan(int64_t dim, int64_t groups, int64_t itemsize) {
  if (dim < 1 || groups < 1 || (itemsize != 4 && itemsize != 8))
    throw std::invalid_argument("host_plan: expected dim >= 1, num_groups >= 1, itemsize 4 or 8");
  const deqfuse::HostPlan cut = deqfuse::host_plan(dim, groups, itemsize);
  py::dict plan;
  plan["cut"] = cut.cut;
  plan["rows"] = cut.rows;
  plan["threads"] = cut.threads;
  plan["bytes"] = cut.bytes;
  return plan;
}

void host_device(int64_t shared_limit, bool reversed, bool tensor_cores) {
  if (shared_limit < 0) throw std::invalid_argument("host_device: expected shared_limit >= 0");
  deqfuse::set_host_device({size_t(shared_limit), reversed, tensor_cores});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of deqfuse: torch.ops.deqfuse.cpu_*, and what they were built with.";
  deqfuse::kernels();  // a wrong DEQFUSE_ISA is an ImportError here, not a failure of the first solve
  m.def("build_info", build_info,
        "How the module was built and what it runs on this processor.\n\n"
        "Keys: compiler; torch_target, the oldest torch that can load it; instruction_set (base, avx2,\n"
        "avx512, vnni or amx; base is NEON on aarch64); vector_bytes.");
  m.def("plan", plan, py::arg("rows"), py::arg("dim"), py::arg("itemsize") = 4, py::arg("history") = 5,
        "How a solve of `rows` rows of `dim` values is cut up.\n\n"
        "Args: itemsize of the compute dtype in bytes; history, Anderson's m, 0 for Picard.\n"
        "Keys: rows_per_tile, the rows that are iterated together; tiles; tile_bytes, the solver's state\n"
        "per tile, which ought to fit the second-level cache.");
  m.def("host_device", host_device, py::arg("shared_limit") = deqfuse::HostDevice().shared_limit,
        py::arg("reversed") = false, py::arg("tensor_cores") = false,
        "The device that torch.ops.deqfuse.cuda_adjoint_* play on CPU tensors, for tests of the CUDA kernels.\n\n"
        "Args: shared_limit, bytes of shared memory per block, which decides how problems are cut; reversed, whether\n"
        "lanes and rows are taken from the last to the first; tensor_cores, whether float32 products that are to be\n"
        "exact are summed up as published measurements say that tensor cores do it.");
  m.def(
      "host_plan", host_plan, py::arg("dim"), py::arg("num_groups"), py::arg("itemsize") = 4,
      "How that device cuts up problems of this size.\n\n"
      "Keys: cut, 'resident', 'streamed' or 'steps'; rows of a tile; threads of a block; bytes of shared memory, for\n"
      "steps of global memory for each tile.");
}
