"""The operators in eager mode, with gradients: the bodies, without the dispatcher's detours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import unwrap_if_dead

from deqfuse import autograd as rule
from deqfuse import ops


def solve_cells(x: Tensor, params: Sequence[Tensor], z0: Tensor | None, *options: Any) -> Any:
    """``ops.solve_cells`` in eager mode, with gradients."""
    return _apply(SolveCells, x, z0, options, *params)


def solve_fuse(
    x_fuse: Tensor,
    cell_sum: Tensor,
    params: Sequence[Tensor],
    mask: Tensor | None,
    z0: Tensor | None,
    *options: Any,
) -> Any:
    """``ops.solve_fuse`` in eager mode, with gradients."""
    return _apply(SolveFuse, x_fuse, cell_sum, mask, z0, options, *params)


def solve_layer(
    x: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    z0_fuse: Tensor | None,
    z0_cells: Tensor | None,
    *options: Any,
) -> Any:
    """``ops.solve_layer`` in eager mode, with gradients."""
    return _apply(SolveLayer, len(x), mask, z0_fuse, z0_cells, options, *x, *params)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply`` outside transforms.

    It asks of every tensor whether it is left over from a transform that has ended: 11 us for those
    of a layer. Its parameters, nearly all of them, are not asked.
    """
    plain = [
        unwrap_if_dead(t) if type(t) is not nn.Parameter and isinstance(t, Tensor) else t
        for t in inputs
    ]
    return super(torch.autograd.Function, function).apply(*plain)  # type: ignore[misc]


# ---- the rule as torch.autograd.Function ---------------------------------------------------------


class SolveCells(torch.autograd.Function):
    """``ops.solve_cells`` in eager mode: the same rule, the parameters as arguments of their own.

    The registered rule packs and unpacks the parameter list at every call, and a separate
    ``setup_context`` inspects the signature: either costs as much as a small solve.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z0: Tensor | None, options: tuple[Any, ...], *params: Tensor
    ) -> Any:
        inputs = (x, list(params), z0, *options)
        output = ops.run_solve_cells(*inputs)
        rule.cells_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
        dx, dparams = rule.cells_gradient(ctx, _eager, grad_z, any(ctx.needs_input_grad[3:]))
        return dx, None, None, *dparams


class SolveFuse(torch.autograd.Function):
    """``ops.solve_fuse`` in eager mode; see :class:`SolveCells`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_fuse: Tensor,
        cell_sum: Tensor,
        mask: Tensor | None,
        z0: Tensor | None,
        options: tuple[Any, ...],
        *params: Tensor,
    ) -> Any:
        inputs = (x_fuse, cell_sum, list(params), mask, z0, *options)
        output = ops.run_solve_fuse(*inputs)
        rule.fuse_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
        want_params = any(ctx.needs_input_grad[5:])
        dx, dcell_sum, dparams = rule.fuse_gradient(ctx, _eager, grad_z, want_params)
        return dx, dcell_sum, None, None, None, *dparams


class SolveLayer(torch.autograd.Function):
    """``ops.solve_layer`` in eager mode; see :class:`SolveCells`."""

    @staticmethod
    def forward(
        ctx: Any,
        num_modalities: int,
        mask: Tensor | None,
        z0_fuse: Tensor | None,
        z0_cells: Tensor | None,
        options: tuple[Any, ...],
        *tensors: Tensor,  # the injections, then the parameters
    ) -> Any:
        x, params = list(tensors[:num_modalities]), list(tensors[num_modalities:])
        inputs = (x, params, mask, z0_fuse, z0_cells, *options)
        *output, all_converged = ops.run_solve_layer(*inputs)
        rule.layer_setup(ctx, inputs, output)
        return *output, all_converged  # torch hands on what is no tensor as it is

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_states: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        want_params = any(ctx.needs_input_grad[5 + ctx.num_modalities :])
        dx, dparams = rule.layer_gradient(ctx, _eager, grad_z, grad_states, want_params)
        return None, None, None, None, None, *dx, *dparams


def _eager(name: str) -> Callable[..., Any]:
    """Its body; with ``create_graph=True`` the operator; under a transform what that can follow."""
    if torch._C._are_functorch_transforms_active():
        return functools.partial(_guarded, getattr(ops, name))
    run: Callable[..., Any] = getattr(ops, name if torch.is_grad_enabled() else f"run_{name}")
    return run


def _guarded(operator: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """An adjoint operator under a transform: the refusal of a second derivative rides along."""
    with torch.no_grad():
        *grads, residual, nfe, outcome = operator(*args)
    if torch.is_grad_enabled():  # always so in torch.func.grad
        flat = [t for g in grads for t in (g if isinstance(g, list) else [g])]
        tracked = [t for a in args for t in (a if isinstance(a, list) else [a])]
        tracked = [t for t in tracked if isinstance(t, Tensor)]
        passed = iter(rule.NoSecond.apply(len(flat), *flat, *tracked))
        grads = [[next(passed) for _ in g] if isinstance(g, list) else next(passed) for g in grads]
    return *grads, residual, nfe, outcome
