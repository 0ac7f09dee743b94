"""The CPU's compiled module: loading it, and what it says about itself.

It is a library that uses the stable ABI of torch and no API of Python's, so that one file serves
every version of both that deqfuse supports. Loading it registers the kernels of ``cpu_native`` as
operators; all that is not a tensor goes through the C functions of ``csrc/cpu/about.cpp``, which
trust their arguments.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_cpu.so"
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a block can have on an H100


class _Build(ctypes.Structure):
    _fields_ = (
        ("compiler", ctypes.c_char_p),
        ("instruction_set", ctypes.c_char_p),
        ("vector_bytes", ctypes.c_int64),
        ("torch_major", ctypes.c_int64),
        ("torch_minor", ctypes.c_int64),
    )


class _Cut(ctypes.Structure):
    _fields_ = (
        ("rows_per_tile", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("tile_bytes", ctypes.c_int64),
    )


class _HostPlan(ctypes.Structure):
    _fields_ = (
        ("cut", ctypes.c_char_p),
        ("rows", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


class Module:
    """The loaded library.

    Args:
        path: The library's file.

    Raises:
        ImportError: There is no such file, it does not load, or its kernels cannot run here.
    """

    def __init__(self, path: Path = LIBRARY) -> None:
        if not path.exists():
            raise ImportError(f"it was not built: there is no {path.name}")
        try:
            torch.ops.load_library(str(path))
            self._library = ctypes.CDLL(str(path))
            self._library.deqfuse_cpu_error.restype = ctypes.c_char_p
            error = self._library.deqfuse_cpu_error()
        except (OSError, AttributeError) as failure:
            raise ImportError(
                f"{path.name} does not load: {failure.__cause__ or failure}"
            ) from failure
        if error is not None:
            raise ImportError(error.decode())
        self.path = path

    def build_info(self) -> dict[str, str | int]:
        """How the module was built and what it runs on this processor.

        Returns:
            compiler; torch_target, the oldest torch that can load it; instruction_set (base, avx2,
            avx512, vnni or amx; base is NEON on aarch64); vector_bytes.
        """
        build = _Build()
        self._library.deqfuse_cpu_build(ctypes.byref(build))
        return {
            "compiler": build.compiler.decode(),
            "torch_target": f"{build.torch_major}.{build.torch_minor}",
            "instruction_set": build.instruction_set.decode(),
            "vector_bytes": build.vector_bytes,
        }

    def plan(self, rows: int, dim: int, itemsize: int = 4, history: int = 5) -> dict[str, int]:
        """How a solve of ``rows`` rows of ``dim`` values is cut up.

        Args:
            rows: Number of rows, 0 or more.
            dim: Values in a row.
            itemsize: Bytes of a number of the compute dtype, 4 or 8.
            history: Anderson's m, at most 8; 0 for Picard.

        Returns:
            rows_per_tile, the rows that are iterated together; tiles; tile_bytes, the solver's
            state per tile, which ought to fit the second-level cache.

        Raises:
            ValueError: An argument is out of range.
        """
        if rows < 0 or dim < 1 or itemsize not in (4, 8) or not 0 <= history <= 8:
            raise ValueError(
                "plan: expected rows >= 0, dim >= 1, itemsize 4 or 8 and history 0 to 8, "
                f"got {rows}, {dim}, {itemsize} and {history}"
            )
        cut = _Cut()
        sizes = map(ctypes.c_int64, (rows, dim, itemsize, history))
        self._library.deqfuse_cpu_plan(*sizes, ctypes.byref(cut))
        return {
            "rows_per_tile": cut.rows_per_tile,
            "tiles": cut.tiles,
            "tile_bytes": cut.tile_bytes,
        }

    def host_device(self, shared_limit: int = SHARED_LIMIT, reversed: bool = False) -> None:
        """Sets the GPU that ``cuda_adjoint_*`` play on CPU tensors, for tests of the CUDA kernels.

        Args:
            shared_limit: Bytes of shared memory per block, which decides how problems are cut.
            reversed: Whether lanes and rows are taken from the last to the first.

        Raises:
            ValueError: The limit is negative.
        """
        if shared_limit < 0:
            raise ValueError(f"host_device: shared_limit: expected 0 or more, got {shared_limit}")
        self._library.deqfuse_cpu_host_device(ctypes.c_int64(shared_limit), ctypes.c_bool(reversed))

    def host_plan(self, dim: int, num_groups: int, itemsize: int = 4) -> dict[str, str | int]:
        """How that GPU cuts up problems of this size.

        Args:
            dim: Values in a row.
            num_groups: Groups of a norm.
            itemsize: Bytes of a number of the compute dtype, 4 or 8.

        Returns:
            cut, one of resident, streamed and steps; rows of a tile; threads of a block; bytes of
            shared memory, for steps of global memory for each tile.

        Raises:
            ValueError: An argument is out of range.
        """
        if dim < 1 or num_groups < 1 or itemsize not in (4, 8):
            raise ValueError(
                "host_plan: expected dim >= 1, num_groups >= 1 and itemsize 4 or 8, "
                f"got {dim}, {num_groups} and {itemsize}"
            )
        plan = _HostPlan()
        sizes = map(ctypes.c_int64, (dim, num_groups, itemsize))
        self._library.deqfuse_cpu_host_plan(*sizes, ctypes.byref(plan))
        sized = {"rows": plan.rows, "threads": plan.threads, "bytes": plan.bytes}
        return {"cut": plan.cut.decode(), **sized}
