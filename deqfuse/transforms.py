"""The operators under ``torch.func``: vmap rules; the gradient rule in a form transforms follow.

Rows are independent, so a mapped call is one call with more rows. Where parameters, or their
gradients, differ from call to call, it is a loop. Forward mode is refused: the kernels know
``J^T u`` only, and torch would hand out zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deqfuse import autograd as rule
from deqfuse import eager, ops

FORWARD_MODE = (
    "deqfuse: forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual tensors, "
    "NewtonKrylov() around this layer) through an implicit gradient is not supported. "
    "Remedy: torch.func.vjp or jacrev, or backward()"
)


def active() -> bool:
    """Whether a transform of ``torch.func`` is running, or forward-mode differentiation is on."""
    inside: bool = torch._C._are_functorch_transforms_active()
    return inside or forward_ad._current_level >= 0


# ---- vmap ----------------------------------------------------------------------------------------

# Position of the parameters among the arguments (every other tensor has rows in front of its last
# dimension), and how many results come before the gradients of parameters or the statistics.
_LAYOUT = {
    "solve_cells": (1, 1),
    "solve_fuse": (2, 1),
    "solve_layer": (1, 2),
    "adjoint_cells": (3, 1),
    "adjoint_fuse": (4, 2),
    "adjoint_layer": (4, 1),
}


def _vmap(name: str, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    operator, (at, features), size = getattr(ops, name), _LAYOUT[name], info.batch_size
    backward = name.startswith("adjoint")
    if (backward and args[-1]) or any(dim is not None for dim in in_dims[at]):
        calls = [
            operator(*(_map(_select, a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
        outputs = [
            _stack(parts, _new_dim(k, features, backward))
            for k, parts in enumerate(zip(*calls, strict=True))
        ]
    else:
        joined = [
            a if k == at or not _has_rows(a) else _map(_join, a, d, size)
            for k, (a, d) in enumerate(zip(args, in_dims, strict=True))
        ]
        outputs = [
            _map(_part, out, None, size, _new_dim(k, features, backward))
            for k, out in enumerate(operator(*joined))
        ]
    dims = [
        _map(_mapped_dim, out, None, _new_dim(k, features, backward))
        for k, out in enumerate(outputs)
    ]
    return tuple(outputs), tuple(dims)


def _new_dim(k: int, features: int, backward: bool) -> int:
    """Where the mapped dimension of result k lies: before its rows; in front of parameters."""
    if k < features:
        return -3
    return 0 if backward and k == features else -2


def _has_rows(value: Any) -> bool:
    return isinstance(value, (Tensor, list, tuple))


def _map(f: Callable[..., Any], value: Any, dims: Any, *rest: Any) -> Any:
    """``f`` on a tensor or on each of a list of tensors; anything else stays."""
    if isinstance(value, (list, tuple)):
        each = [None] * len(value) if dims is None else dims
        return [_map(f, v, d, *rest) for v, d in zip(value, each, strict=True)]
    return f(value, dims, *rest) if isinstance(value, Tensor) else value


def _select(t: Tensor, dim: int | None, i: int) -> Tensor:
    return t if dim is None else t.select(dim, i)


def _join(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The calls' rows in one dimension: (..., size * B, d)."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, -3).flatten(-3, -2)


def _part(t: Tensor, _: None, size: int, new: int) -> Tensor:
    """Joined rows as (..., size, B, d) for features, (..., size, B) for statistics."""
    return t.unflatten(new + 1, (size, t.shape[new + 1] // size))


def _stack(parts: Any, new: int) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.stack(parts, new)
    return [torch.stack(each, new) for each in zip(*parts, strict=True)]


def _mapped_dim(t: Tensor, _: None, new: int) -> int:
    return new % t.dim()


for _name in _LAYOUT:
    torch.library.register_vmap(f"deqfuse::{_name}", functools.partial(_vmap, _name))


# ---- grad, vjp, jacrev ---------------------------------------------------------------------------


class _Followed(torch.autograd.Function):
    """What transforms ask of a function besides forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE)


class SolveCells(_Followed):
    """``eager.SolveCells`` under a transform."""

    backward = eager.SolveCells.backward

    @staticmethod
    def forward(x: Any, z0: Any, options: Any, *params: Tensor) -> Any:
        return ops.solve_cells(x, list(params), z0, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, z0, options, *params = inputs
        rule.cells_setup(ctx, (x, params, z0, *options), output)


class SolveFuse(_Followed):
    """``eager.SolveFuse`` under a transform."""

    backward = eager.SolveFuse.backward

    @staticmethod
    def forward(
        x_fuse: Any, cell_sum: Any, mask: Any, z0: Any, options: Any, *params: Tensor
    ) -> Any:
        return ops.solve_fuse(x_fuse, cell_sum, list(params), mask, z0, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x_fuse, cell_sum, mask, z0, options, *params = inputs
        rule.fuse_setup(ctx, (x_fuse, cell_sum, params, mask, z0, *options), output)


class SolveLayer(_Followed):
    """``eager.SolveLayer`` under a transform."""

    backward = eager.SolveLayer.backward

    @staticmethod
    def forward(
        n: int, mask: Any, z0_fuse: Any, z0_cells: Any, options: Any, *tensors: Tensor
    ) -> Any:
        x, params = list(tensors[:n]), list(tensors[n:])
        return ops.solve_layer(x, params, mask, z0_fuse, z0_cells, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        n, mask, z0_fuse, z0_cells, options, *tensors = inputs
        x, params = list(tensors[:n]), list(tensors[n:])
        rule.layer_setup(ctx, (x, params, mask, z0_fuse, z0_cells, *options), output)


def solve_cells(x: Tensor, params: Sequence[Tensor], z0: Any, *options: Any) -> Any:
    """``ops.solve_cells`` under a transform."""
    return SolveCells.apply(x, z0, options, *params)


def solve_fuse(
    x_fuse: Tensor, cell_sum: Tensor, params: Sequence[Tensor], mask: Any, z0: Any, *options: Any
) -> Any:
    """``ops.solve_fuse`` under a transform."""
    return SolveFuse.apply(x_fuse, cell_sum, mask, z0, options, *params)


def solve_layer(
    x: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Any,
    z0_fuse: Any,
    z0_cells: Any,
    *options: Any,
) -> Any:
    """``ops.solve_layer`` under a transform."""
    return SolveLayer.apply(len(x), mask, z0_fuse, z0_cells, options, *x, *params)
