"""The schemas of the CPU's kernels, and the compiled module that holds them, or why there is none.

The kernels are called inside the public operators only, below autograd; those own the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse.backends.cpu_module import Module
from deqfuse.backends.empty import empty_grads, empty_solved, empty_states, empty_statistics
from deqfuse.backends.problem import compute_dtype

_SOLVE = "float tol, int max_iter, int history, float beta, float lam"
_SCHEMAS = {
    "cpu_solve_cells": (
        f"(Tensor x, Tensor[] params, Tensor? z0, int num_groups, bool skip, {_SOLVE}, int steps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "cpu_solve_fuse": (
        "(Tensor x_fuse, Tensor cell_sum, Tensor[] params, Tensor? mask, Tensor? z0, "
        f"int num_modalities, int num_groups, bool relu_last, {_SOLVE}, int steps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "cpu_solve_layer": (
        "(Tensor[] x, Tensor[] params, Tensor? mask, Tensor? z0_fuse, Tensor? z0_cells, "
        f"Tensor? present, int num_groups, bool skip, bool relu_last, {_SOLVE}, int steps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool)"
    ),
    "cpu_prepare_layer": (
        f"(Tensor[] params, int num_groups, bool skip, bool relu_last, {_SOLVE}) "
        "-> (Tensor, Tensor)"
    ),
    "cpu_solve_prepared": (
        "(Tensor[] x, Tensor prepared, Tensor addresses, Tensor? present, int num_groups, "
        f"bool skip, bool relu_last, {_SOLVE}, int steps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool)"
    ),
    "cpu_adjoint_cells": (
        "(Tensor grad_z, Tensor z, Tensor x, Tensor[] params, bool want_params, "
        f"int num_groups, bool skip, int mode, {_SOLVE}) "
        "-> (Tensor, Tensor[], Tensor, Tensor, Tensor)"
    ),
    "cpu_adjoint_fuse": (
        "(Tensor grad_z, Tensor z, Tensor x_fuse, Tensor cell_sum, Tensor[] params, "
        "bool want_params, Tensor? mask, int num_modalities, int num_groups, bool relu_last, "
        f"int mode, {_SOLVE}) -> (Tensor, Tensor, Tensor[], Tensor, Tensor, Tensor)"
    ),
    "cpu_adjoint_layer": (
        "(Tensor grad_z, Tensor? grad_cells, Tensor states, Tensor[] x, Tensor[] params, "
        "bool want_params, Tensor? mask, Tensor? present, int num_groups, bool skip, "
        f"bool relu_last, int mode, {_SOLVE}) "
        "-> (Tensor[], Tensor[], Tensor, Tensor, Tensor, bool)"
    ),
    "cpu_penalty_layer": (
        "(Tensor probes, Tensor states, Tensor[] x, Tensor[] params, bool want_params, "
        "Tensor? mask, Tensor? present, int num_groups, bool skip, bool relu_last) "
        "-> (Tensor, Tensor[], Tensor[])"
    ),
    "cpu_unit_size": "(Tensor[] x, Tensor[] grads) -> Tensor[]",
    "cpu_rescue_cells": (
        "(Tensor x, Tensor[] params, Tensor z, Tensor residual, Tensor nfe, Tensor outcome, "
        "Tensor which, int num_groups, bool skip, float tol, int max_jacobians) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "cpu_rescue_fuse": (
        "(Tensor x_fuse, Tensor cell_sum, Tensor[] params, Tensor? mask, Tensor z, "
        "Tensor residual, Tensor nfe, Tensor outcome, Tensor which, int num_modalities, "
        "int num_groups, bool relu_last, float tol, int max_jacobians) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "cpu_anderson_step": (
        "(Tensor fz, Tensor(a!) z, Tensor(b!) best, Tensor(c!) images, Tensor(d!) residuals, "
        "Tensor(e!) gram, Tensor(f!) best_residual, Tensor(g!) nfe, Tensor(h!) best_at, "
        "Tensor(i!) outcome, Tensor(j!) active, Tensor(k!) trace, int step, float tol, "
        "int max_iter, float beta, float lam) -> bool"
    ),
}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"deqfuse::{_name}", _schema)


def _fake_solve_block(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if type(x) is Tensor and not x.is_meta:  # torch comes here when any of the tensors is on meta
        raise TypeError(f"expected every tensor on {x.device}, got some on meta")
    return empty_solved(x, rest[-1], compute_dtype(x.dtype))


def _fake_solve_layer(x: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    states, *statistics = _fake_solve_block(empty_states(x), *rest)
    return states.new_empty(x[0].shape), states, *statistics, False


# Shapes for fake tensors that meet these kernels outside torch.compile.
torch.library.register_fake("deqfuse::cpu_solve_cells")(_fake_solve_block)
torch.library.register_fake("deqfuse::cpu_solve_fuse")(_fake_solve_block)
torch.library.register_fake("deqfuse::cpu_solve_layer")(_fake_solve_layer)


@torch.library.register_fake("deqfuse::cpu_adjoint_cells")
def _fake_adjoint_cells(grad_z, z, x, params, want, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), empty_grads(params, want), *empty_statistics(z)


@torch.library.register_fake("deqfuse::cpu_adjoint_fuse")
def _fake_adjoint_fuse(grad_z, z, x_fuse, cell_sum, params, want, *rest):  # type: ignore[no-untyped-def]
    dx, dcell_sum = x_fuse.new_empty(x_fuse.shape), cell_sum.new_empty(cell_sum.shape)
    return dx, dcell_sum, empty_grads(params, want), *empty_statistics(z)


@torch.library.register_fake("deqfuse::cpu_adjoint_layer")
def _fake_adjoint_layer(grad_z, grad_cells, states, x, params, want, *rest):  # type: ignore[no-untyped-def]
    dx = [t.new_empty(t.shape) for t in x]
    return dx, empty_grads(params, want), *empty_statistics(states), False


@torch.library.register_fake("deqfuse::cpu_penalty_layer")
def _fake_penalty_layer(probes, states, x, params, want, *rest):  # type: ignore[no-untyped-def]
    dtype = states.dtype
    grads = empty_grads(x, True, dtype), empty_grads(params, want, dtype)
    return states.new_empty(states.shape[:-1]), *grads


@torch.library.register_fake("deqfuse::cpu_unit_size")
def _fake_unit_size(x, grads):  # type: ignore[no-untyped-def]
    return [t.new_empty(t.shape) for t in x]


def _fake_rescue(*args):  # type: ignore[no-untyped-def]
    found = args[2:6] if isinstance(args[1], list) else args[4:8]
    return tuple(t.new_empty(t.shape) for t in found)


torch.library.register_fake("deqfuse::cpu_rescue_cells")(_fake_rescue)
torch.library.register_fake("deqfuse::cpu_rescue_fuse")(_fake_rescue)

module: Module | None = None
load_error = ""
try:
    module = Module()
except ImportError as error:
    load_error = str(error)

solve_cells = torch.ops.deqfuse.cpu_solve_cells.default
solve_fuse = torch.ops.deqfuse.cpu_solve_fuse.default
solve_layer = torch.ops.deqfuse.cpu_solve_layer.default
prepare_layer = torch.ops.deqfuse.cpu_prepare_layer.default
solve_prepared = torch.ops.deqfuse.cpu_solve_prepared.default
adjoint_cells = torch.ops.deqfuse.cpu_adjoint_cells.default
adjoint_fuse = torch.ops.deqfuse.cpu_adjoint_fuse.default
adjoint_layer = torch.ops.deqfuse.cpu_adjoint_layer.default
penalty_layer = torch.ops.deqfuse.cpu_penalty_layer.default
unit_size = torch.ops.deqfuse.cpu_unit_size.default
rescue_cells = torch.ops.deqfuse.cpu_rescue_cells.default
rescue_fuse = torch.ops.deqfuse.cpu_rescue_fuse.default
anderson_step = torch.ops.deqfuse.cpu_anderson_step.default
