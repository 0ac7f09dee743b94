"""The operators under ``torch.func``: vmap rules; the gradient rule in a form transforms follow.

Rows are independent, so a mapped call is one call with more rows. Where parameters, or their
gradients, differ from call to call, it is a loop. Forward mode is refused: the kernels know
``J^T u`` only, and torch would return zeros for J v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse.operators import eager, rule
from deqfuse.operators.blocks import BLOCKS, Block

FORWARD_MODE = (
    "deqfuse: forward-mode differentiation (torch.func.jvp, jacfwd, hessian, dual tensors, "
    "NewtonKrylov() around this layer) through an implicit gradient is not supported. "
    "Remedy: torch.func.vjp or jacrev, or backward()"
)

# ---- vmap ----------------------------------------------------------------------------------------


def _vmap(
    block: Block, backward: bool, operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    size = info.batch_size
    at = block.num_rows or 1  # where the parameters are; rows lie in front of all others' last dim
    at += block.num_equilibria + 1 if backward else 0
    new_dim = functools.partial(_new_dim, block, backward)
    if (backward and args[-1]) or any(dim is not None for dim in in_dims[at]):
        calls = [operator(*select(args, in_dims, i)) for i in range(size)]
        outputs = [_stack(parts, new_dim(k)) for k, parts in enumerate(zip(*calls, strict=True))]
    else:
        joined = [
            a if k == at or not _has_rows(a) else _map(_join, a, d, size)
            for k, (a, d) in enumerate(zip(args, in_dims, strict=True))
        ]
        results = operator(*joined)
        outputs = [_map(_part, out, None, size, new_dim(k)) for k, out in enumerate(results)]
    dims = [_map(_mapped_dim, out, None, new_dim(k)) for k, out in enumerate(outputs)]
    return tuple(outputs), tuple(dims)


def _new_dim(block: Block, backward: bool, k: int) -> int:
    """Where the mapped dimension of result k lies: before its rows; in front of parameters."""
    features = (block.num_rows or 1) if backward else block.num_equilibria
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


def select(args: Sequence[Any], in_dims: Sequence[Any], i: int) -> list[Any]:
    """The arguments of the i-th of some mapped calls."""
    return [_map(_select, a, d, i) for a, d in zip(args, in_dims, strict=True)]


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


for _block in BLOCKS:
    for _backward, _operators in enumerate((_block.solve, _block.adjoint)):
        for _operator in _operators:
            _rule = functools.partial(_vmap, _block, bool(_backward), _operator)
            torch.library.register_vmap(_operator.name(), _rule)


# ---- grad, vjp, jacrev ---------------------------------------------------------------------------


class Solve(torch.autograd.Function):
    """``eager.Solve`` under a transform: the operator, and what transforms ask of a function."""

    generate_vmap_rule = True
    backward = eager.Solve.backward

    @staticmethod
    def forward(block: Block, num_rows: int, options: Any, *operands: Any) -> Any:
        return block.solve.captured(*block.join(*eager.split(block, num_rows, operands)), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        block, num_rows, options, *operands = inputs
        rule.remember(block, ctx, *eager.split(block, num_rows, operands), options, output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE)


def solve(
    block: Block,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Any],
    options: tuple[Any, ...],
) -> Any:
    """Results of the operator of the solve under a transform, with gradients."""
    return Solve.apply(block, len(rows), options, *rows, *params, *others)
