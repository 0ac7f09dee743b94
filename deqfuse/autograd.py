"""The gradient rule: at an equilibrium the incoming cotangent g becomes ``u = (I - J^T)^-1 g``.

Theorem 1 of arXiv 2306.16645. For the layer's own blocks the rule is two plain functions per
operator, registered on it, so that eager mode, ``torch.compile`` and ``opcheck`` share them. For an
arbitrary callable it is `ImplicitGradient`, a thin ``torch.autograd.Function``. Second derivatives
are refused with an error: the rule does not give them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfuse import ops, reporting
from deqfuse.backends.maps import CellParams
from deqfuse.errors import DoubleBackwardError
from deqfuse.solvers.adjoint import solve_adjoint
from deqfuse.solvers.options import GradientOption, from_code

# ---- the layer's blocks --------------------------------------------------------------------------


def _cells_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, params, _, *ctx.options = inputs
    ctx.save_for_backward(output[0], x, *params)
    ctx.mark_non_differentiable(*output[1:])


def _cells_gradient(
    ctx: Any, run: Callable[..., Any], grad_z: Tensor, want_params: bool
) -> tuple[Tensor, list[Any]]:
    z, x, *params = ctx.saved_tensors
    num_groups, variant, solver, adjoint, backend, on_failure = ctx.options
    adjoint = _in_force(adjoint, solver)
    dx, dparams, residual, _, outcome = run(
        grad_z, z, x, params, num_groups, variant, adjoint, backend, want_params
    )
    _report(f"the backward solve of {reporting.CELLS}", outcome, residual, adjoint, on_failure)
    return dx, dparams or [None] * len(params)


def _cells_backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dparams = _cells_gradient(ctx, ops.adjoint_cells, grad_z, any(ctx.needs_input_grad[1]))
    return dx, dparams, None, *[None] * len(ctx.options)


def _fuse_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_fuse, cell_sum, params, mask, _, *ctx.options = inputs
    ctx.save_for_backward(output[0], x_fuse, cell_sum, mask, *params)
    ctx.mark_non_differentiable(*output[1:])


def _fuse_gradient(
    ctx: Any, run: Callable[..., Any], grad_z: Tensor, want_params: bool
) -> tuple[Tensor, Tensor, list[Any]]:
    z, x_fuse, cell_sum, mask, *params = ctx.saved_tensors
    n, num_groups, variant, solver, adjoint, backend, on_failure = ctx.options
    adjoint = _in_force(adjoint, solver)
    dx, dcell_sum, dparams, residual, _, outcome = run(
        grad_z, z, x_fuse, cell_sum, params, mask, n,
        num_groups, variant, adjoint, backend, want_params,
    )  # fmt: skip
    _report(f"the backward solve of {reporting.FUSE}", outcome, residual, adjoint, on_failure)
    return dx, dcell_sum, dparams or [None] * len(params)


def _fuse_backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
    want_params = any(ctx.needs_input_grad[2])
    dx, dcell_sum, dparams = _fuse_gradient(ctx, ops.adjoint_fuse, grad_z, want_params)
    return dx, dcell_sum, dparams, None, None, *[None] * len(ctx.options)


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, params, mask, _, _, *ctx.options = inputs
    ctx.num_modalities = len(x)
    # `states` holds every equilibrium in memory of the operator's own: callers may write into z.
    ctx.save_for_backward(output[1], mask, *x, *params)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _layer_gradient(
    ctx: Any,
    run: Callable[..., Any],
    grad_z: Tensor | None,
    grad_states: Tensor | None,
    want_params: bool,
) -> tuple[list[Any], list[Any]]:
    states, mask, *rest = ctx.saved_tensors
    x, params = rest[: ctx.num_modalities], rest[ctx.num_modalities :]
    num_groups, variant, solver, adjoint, backend, on_failure = ctx.options
    adjoint = _in_force(adjoint, solver)
    # Nobody is handed the fused row of `states`, so its cotangent is zero.
    grad_cells = None if grad_states is None else grad_states[:-1]
    if grad_z is None and grad_cells is None:
        return [None] * len(x), [None] * len(params)
    if grad_z is None:  # only the cells were used: the fuse step, failed or not, has no part in it
        own = ctx.num_modalities * len(CellParams._fields)
        run_cells = ops.adjoint_cells if run is ops.adjoint_layer else ops.run_adjoint_cells
        dx, dcells, residual, _, outcome = run_cells(
            grad_cells, states[:-1], torch.stack(x), params[:own],
            num_groups, variant, adjoint, backend, want_params,
        )  # fmt: skip
        what = f"the backward solve of {reporting.CELLS}"
        _report(what, outcome, residual, adjoint, on_failure)
        return list(dx.unbind()), [*(dcells or [None] * own), *[None] * (len(params) - own)]
    dx, dparams, residual, _, outcome = run(
        grad_z, grad_cells, states, x, params, mask,
        num_groups, variant, adjoint, backend, want_params,
    )  # fmt: skip
    option: GradientOption = from_code(adjoint)
    if option.reports:
        reporting.report_layer(outcome, residual, option, on_failure, backward=True)
    return dx, dparams or [None] * len(params)


def _layer_backward(
    ctx: Any, grad_z: Tensor | None, grad_states: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    want_params = any(ctx.needs_input_grad[1])
    dx, dparams = _layer_gradient(ctx, ops.adjoint_layer, grad_z, grad_states, want_params)
    return dx, dparams, None, None, None, *[None] * len(ctx.options)


@functools.lru_cache(maxsize=256)
def _in_force(adjoint: str, solver: str) -> str:
    """The gradient option as it applies behind this forward solver (never looser than it)."""
    option: GradientOption = from_code(adjoint).for_forward(from_code(solver))
    return option.code


def _report(what: str, outcome: Tensor, residual: Tensor, adjoint: str, on_failure: str) -> None:
    option: GradientOption = from_code(adjoint)
    if option.reports:
        reporting.report(what, outcome, residual, option, on_failure)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise DoubleBackwardError


torch.library.register_autograd("deqfuse::solve_cells", _cells_backward, setup_context=_cells_setup)
torch.library.register_autograd("deqfuse::solve_fuse", _fuse_backward, setup_context=_fuse_setup)
torch.library.register_autograd("deqfuse::solve_layer", _layer_backward, setup_context=_layer_setup)
torch.library.register_autograd("deqfuse::adjoint_layer", _refuse)
torch.library.register_autograd("deqfuse::adjoint_cells", _refuse)
torch.library.register_autograd("deqfuse::adjoint_fuse", _refuse)


def _eager(adjoint: str) -> Callable[..., Any]:
    """The body of an adjoint; with ``create_graph=True`` the operator, which refuses another."""
    run: Callable[..., Any] = getattr(ops, adjoint if torch.is_grad_enabled() else f"run_{adjoint}")
    return run


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
        _cells_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
        run, want_params = _eager("adjoint_cells"), any(ctx.needs_input_grad[3:])
        dx, dparams = _cells_gradient(ctx, run, grad_z, want_params)
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
        _fuse_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
        run, want_params = _eager("adjoint_fuse"), any(ctx.needs_input_grad[5:])
        dx, dcell_sum, dparams = _fuse_gradient(ctx, run, grad_z, want_params)
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
        output = ops.run_solve_layer(*inputs)
        _layer_setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_states: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        want_params = any(ctx.needs_input_grad[5 + ctx.num_modalities :])
        run = _eager("adjoint_layer")
        dx, dparams = _layer_gradient(ctx, run, grad_z, grad_states, want_params)
        return None, None, None, None, None, *dx, *dparams


# ---- any callable --------------------------------------------------------------------------------


class ImplicitGradient(torch.autograd.Function):
    """Identity on ``f(z*)`` whose backward solves the adjoint equation.

    The graph of one evaluation of f at z* does the rest: behind this node it carries u to
    everything that f touched, its arguments and its closed-over parameters alike.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,  # (B, n) f(z*), with its graph
        z_star: Tensor,  # (B, n) the leaf that the graph starts from
        adjoint: GradientOption,
        on_failure: str,
    ) -> Tensor:  # (B, n)
        ctx.save_for_backward(image, z_star)
        ctx.adjoint, ctx.on_failure = adjoint, on_failure
        return z_star.clone()  # the answer, in grad mode as without; the graph is that of f(z*)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        image, z_star = ctx.saved_tensors

        def vjp(u: Tensor) -> Tensor:
            (out,) = torch.autograd.grad(
                image, z_star, u, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return out

        with torch.no_grad():
            solution = solve_adjoint(vjp, grad, ctx.adjoint)
        if ctx.adjoint.reports:
            reporting.report(
                "the backward solve",
                solution.outcome,
                solution.residual,
                ctx.adjoint,
                ctx.on_failure,
            )
        u = solution.z
        # With create_graph=True, u depends on z* and the parameters in ways that no graph records.
        return (_NoSecond.apply(u, image) if torch.is_grad_enabled() else u), None, None, None


class _NoSecond(torch.autograd.Function):
    """Passes ``u`` on and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, image: Tensor) -> Tensor:
        return u.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise DoubleBackwardError
