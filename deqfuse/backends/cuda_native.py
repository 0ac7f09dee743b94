"""Schemas of the CUDA adjoint operators, and the library that holds their kernels.

The library is loaded when it is first asked for: importing deqfuse touches no CUDA. On CPU tensors
the operators run the same kernel bodies through the host policy of the compiled module, for tests.
Results are those of ``cpu_native.adjoint_cells`` and ``cpu_native.adjoint_fuse``; ``nfe`` counts
applications of J^T. Gradients belong to the public operators, as those of ``cpu_native`` do.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from deqfuse.backends.empty import empty_grads, empty_statistics

_LIBRARY = Path(__file__).parents[1] / "_cuda.so"
_SOLVE = (
    "int mode, float tol, int max_iter, int history, float beta, float lam, bool allow_tf32=False"
)
_SCHEMAS = {
    "cuda_adjoint_cells": (
        "(Tensor grad_z, Tensor z, Tensor x, Tensor[] params, bool want_params, "
        f"int num_groups, bool skip, {_SOLVE}) "
        "-> (Tensor, Tensor[], Tensor, Tensor, Tensor)"
    ),
    "cuda_adjoint_fuse": (
        "(Tensor grad_z, Tensor z, Tensor x_fuse, Tensor cell_sum, Tensor[] params, "
        "bool want_params, Tensor? mask, int num_modalities, int num_groups, bool relu_last, "
        f"{_SOLVE}, Tensor? counts=None) -> (Tensor, Tensor, Tensor[], Tensor, Tensor, Tensor)"
    ),
}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"deqfuse::{_name}", _schema)


@torch.library.register_fake("deqfuse::cuda_adjoint_cells")
def _fake_adjoint_cells(grad_z, z, x, params, want, *rest):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), empty_grads(params, want), *empty_statistics(z)


@torch.library.register_fake("deqfuse::cuda_adjoint_fuse")
def _fake_adjoint_fuse(grad_z, z, x_fuse, cell_sum, params, want, *rest):  # type: ignore[no-untyped-def]
    dx, dcell_sum = z.new_empty(z.shape), z.new_empty(z.shape)
    return dx, dcell_sum, empty_grads(params, want), *empty_statistics(z)


adjoint_cells = torch.ops.deqfuse.cuda_adjoint_cells.default
adjoint_fuse = torch.ops.deqfuse.cuda_adjoint_fuse.default


@functools.cache
def load_error() -> str | None:
    """Loads the library of CUDA kernels; None, or why that cannot be done here."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not _LIBRARY.exists():
        return f"the CUDA library was not built (there is no {_LIBRARY.name})"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error.__cause__ or error}"
    return _driver_error(*versions(ctypes.CDLL(str(_LIBRARY))))


def device_error(index: int) -> str | None:
    """Why the library cannot serve the device of this number; None if it can.

    Its kernels are compiled for some architectures; asked here, so that a backward pass on another
    card need not fail.
    """
    return load_error() or _architecture_error(index)


@functools.cache
def _architecture_error(index: int) -> str | None:
    said = cannot_run(ctypes.CDLL(str(_LIBRARY)), index)
    if said is None:
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return f"{_LIBRARY.name} holds no kernel for compute capability {capability}: {said}"


def cannot_run(library: ctypes.CDLL, index: int) -> str | None:
    """What CUDA says against running the library's kernels on a device; None if nothing."""
    ask = library.deqfuse_cuda_cannot_run
    ask.restype = ctypes.c_char_p
    said: bytes | None = ask(ctypes.c_int(index))
    return None if said is None else said.decode()


def versions(library: ctypes.CDLL) -> tuple[int, int]:
    """1000 major + 10 minor of the CUDA that the driver knows (0: none) and of the library's."""
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    library.deqfuse_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value


def _driver_error(driver: int, runtime: int) -> str | None:
    """Why the driver cannot run kernels of this CUDA: it must know at least the major version."""
    if driver // 1000 >= runtime // 1000:
        return None
    known, built = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime))
    knows = f"the NVIDIA driver knows CUDA {known}" if driver else "there is no NVIDIA driver"
    return f"{_LIBRARY.name} was built with CUDA {built} and {knows}"
