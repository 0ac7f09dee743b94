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

Door = Callable[[str], Callable[..., Any]]  # how an adjoint is called, given the operator's name


def cells_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, params, _, *ctx.options = inputs
    ctx.save_for_backward(output[0], x, *params)
    ctx.mark_non_differentiable(*output[1:])


def cells_gradient(
    ctx: Any, door: Door, grad_z: Tensor, want_params: bool
) -> tuple[Tensor, list[Any]]:
    z, x, *params = ctx.saved_tensors
    num_groups, variant, solver, adjoint, backend, on_failure = ctx.options
    adjoint = _in_force(adjoint, solver)
    dx, dparams, residual, _, outcome = door("adjoint_cells")(
        grad_z, z, x, params, num_groups, variant, adjoint, backend, want_params
    )
    _report(f"the backward solve of {reporting.CELLS}", outcome, residual, adjoint, on_failure)
    return dx, dparams or [None] * len(params)


def _cells_backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dparams = cells_gradient(ctx, _operator, grad_z, any(ctx.needs_input_grad[1]))
    return dx, dparams, None, *[None] * len(ctx.options)


def fuse_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_fuse, cell_sum, params, mask, _, *ctx.options = inputs
    ctx.save_for_backward(output[0], x_fuse, cell_sum, mask, *params)
    ctx.mark_non_differentiable(*output[1:])


def fuse_gradient(
    ctx: Any, door: Door, grad_z: Tensor, want_params: bool
) -> tuple[Tensor, Tensor, list[Any]]:
    z, x_fuse, cell_sum, mask, *params = ctx.saved_tensors
    n, num_groups, variant, solver, adjoint, backend, on_failure = ctx.options
    adjoint = _in_force(adjoint, solver)
    dx, dcell_sum, dparams, residual, _, outcome = door("adjoint_fuse")(
        grad_z, z, x_fuse, cell_sum, params, mask, n,
        num_groups, variant, adjoint, backend, want_params,
    )  # fmt: skip
    _report(f"the backward solve of {reporting.FUSE}", outcome, residual, adjoint, on_failure)
    return dx, dcell_sum, dparams or [None] * len(params)


def _fuse_backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
    want_params = any(ctx.needs_input_grad[2])
    dx, dcell_sum, dparams = fuse_gradient(ctx, _operator, grad_z, want_params)
    return dx, dcell_sum, dparams, None, None, *[None] * len(ctx.options)


def layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, params, mask, _, _, *ctx.options = inputs
    ctx.num_modalities = len(x)
    # `states` holds every equilibrium in memory of the operator's own: callers may write into z.
    ctx.save_for_backward(output[1], mask, *x, *params)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def layer_gradient(
    ctx: Any,
    door: Door,
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
        dx, dcells, residual, _, outcome = door("adjoint_cells")(
            grad_cells, states[:-1], torch.stack(x), params[:own],
            num_groups, variant, adjoint, backend, want_params,
        )  # fmt: skip
        what = f"the backward solve of {reporting.CELLS}"
        _report(what, outcome, residual, adjoint, on_failure)
        return list(dx.unbind()), [*(dcells or [None] * own), *[None] * (len(params) - own)]
    dx, dparams, residual, _, outcome, *converged = door("adjoint_layer")(
        grad_z, grad_cells, states, x, params, mask,
        num_groups, variant, adjoint, backend, want_params,
    )  # fmt: skip
    option: GradientOption = from_code(adjoint)
    if option.reports and not ops.traced(outcome):
        statistics = ops.unwrapped(outcome), ops.unwrapped(residual)
        reporting.report_layer(*statistics, option, on_failure, any(converged), backward=True)
    return dx, dparams or [None] * len(params)


def _layer_backward(
    ctx: Any, grad_z: Tensor | None, grad_states: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    want_params = any(ctx.needs_input_grad[1])
    dx, dparams = layer_gradient(ctx, _operator, grad_z, grad_states, want_params)
    return dx, dparams, None, None, None, *[None] * len(ctx.options)


@functools.lru_cache(maxsize=256)
def _in_force(adjoint: str, solver: str) -> str:
    """The gradient option as it applies behind this forward solver (never looser than it)."""
    option: GradientOption = from_code(adjoint).for_forward(from_code(solver))
    return option.code


def _report(what: str, outcome: Tensor, residual: Tensor, adjoint: str, on_failure: str) -> None:
    option: GradientOption = from_code(adjoint)
    if option.reports and not ops.traced(outcome):
        statistics = ops.unwrapped(outcome), ops.unwrapped(residual)
        reporting.report(what, *statistics, option, on_failure)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise DoubleBackwardError


torch.library.register_autograd("deqfuse::solve_cells", _cells_backward, setup_context=cells_setup)
torch.library.register_autograd("deqfuse::solve_fuse", _fuse_backward, setup_context=fuse_setup)
torch.library.register_autograd("deqfuse::solve_layer", _layer_backward, setup_context=layer_setup)
torch.library.register_autograd("deqfuse::adjoint_layer", _refuse)
torch.library.register_autograd("deqfuse::adjoint_cells", _refuse)
torch.library.register_autograd("deqfuse::adjoint_fuse", _refuse)


def _operator(name: str) -> Callable[..., Any]:
    """The operator itself, which compilers see and which refuses to be differentiated."""
    operator: Callable[..., Any] = getattr(ops, name)
    return operator


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
        if torch.is_grad_enabled():
            (u,) = NoSecond.apply(1, u, image)
        return u, None, None, None


class NoSecond(torch.autograd.Function):
    """Passes the first ``count`` tensors on and refuses to be differentiated by any of them all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DoubleBackwardError
