"""The compiled module and the schemas of its kernels. A module that does not load explains itself.

The kernels are called inside the public operators only, below autograd; those own the gradient.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

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
        f"int num_groups, bool skip, bool relu_last, {_SOLVE}, int steps) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
        "bool want_params, Tensor? mask, int num_groups, bool skip, bool relu_last, "
        f"int mode, {_SOLVE}) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor)"
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

module: ModuleType | None = None
load_error = ""
try:
    module = importlib.import_module("deqfuse._C")
except ImportError as error:
    load_error = str(error)

solve_cells = torch.ops.deqfuse.cpu_solve_cells.default
solve_fuse = torch.ops.deqfuse.cpu_solve_fuse.default
solve_layer = torch.ops.deqfuse.cpu_solve_layer.default
adjoint_cells = torch.ops.deqfuse.cpu_adjoint_cells.default
adjoint_fuse = torch.ops.deqfuse.cpu_adjoint_fuse.default
adjoint_layer = torch.ops.deqfuse.cpu_adjoint_layer.default
anderson_step = torch.ops.deqfuse.cpu_anderson_step.default
