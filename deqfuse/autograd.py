"""The gradient rule: at an equilibrium the incoming cotangent g becomes ``u = (I - J^T)^-1 g``.

Theorem 1 of arXiv 2306.16645. For the layer's own blocks the rule is two plain functions per
operator, registered on it, so that eager mode, ``torch.compile`` and ``opcheck`` share them. For an
arbitrary callable it is `ImplicitGradient`, a thin ``torch.autograd.Function``. Second derivatives
are refused with an error: the rule does not give them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import unwrap_if_dead

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


def _cells_gradient(
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
    dx, dparams = _cells_gradient(ctx, _operator, grad_z, any(ctx.needs_input_grad[1]))
    return dx, dparams, None, *[None] * len(ctx.options)


def fuse_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_fuse, cell_sum, params, mask, _, *ctx.options = inputs
    ctx.save_for_backward(output[0], x_fuse, cell_sum, mask, *params)
    ctx.mark_non_differentiable(*output[1:])


def _fuse_gradient(
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
    dx, dcell_sum, dparams = _fuse_gradient(ctx, _operator, grad_z, want_params)
    return dx, dcell_sum, dparams, None, None, *[None] * len(ctx.options)


def layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, params, mask, _, _, *ctx.options = inputs
    ctx.num_modalities = len(x)
    # `states` holds every equilibrium in memory of the operator's own: callers may write into z.
    ctx.save_for_backward(output[1], mask, *x, *params)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _layer_gradient(
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
    dx, dparams = _layer_gradient(ctx, _operator, grad_z, grad_states, want_params)
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
        passed = iter(_NoSecond.apply(len(flat), *flat, *tracked))
        grads = [[next(passed) for _ in g] if isinstance(g, list) else next(passed) for g in grads]
    return *grads, residual, nfe, outcome


class SolveCells(torch.autograd.Function):
    """``ops.solve_cells`` in eager mode: the same rule, the parameters as arguments of their own.

    The registered rule packs and unpacks the parameter list at every call, and a separate
    ``setup_context`` inspects the signature: either costs as much as a small solve. Statistics
    leave as a list, which torch hands on as it is: as outputs of the node they cost 10 us.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z0: Tensor | None, options: tuple[Any, ...], *params: Tensor
    ) -> Any:
        inputs = (x, list(params), z0, *options)
        z, *statistics = ops.run_solve_cells(*inputs)
        cells_setup(ctx, inputs, (z,))
        return z, statistics

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
        dx, dparams = _cells_gradient(ctx, _eager, grad_z, any(ctx.needs_input_grad[3:]))
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
        z, *statistics = ops.run_solve_fuse(*inputs)
        fuse_setup(ctx, inputs, (z,))
        return z, statistics

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *_: Any) -> tuple[Any, ...]:
        want_params = any(ctx.needs_input_grad[5:])
        dx, dcell_sum, dparams = _fuse_gradient(ctx, _eager, grad_z, want_params)
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
        z, states, *statistics = ops.run_solve_layer(*inputs)
        layer_setup(ctx, inputs, (z, states))
        return z, states, statistics

    @staticmethod
    def backward(
        ctx: Any, grad_z: Tensor | None, grad_states: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        want_params = any(ctx.needs_input_grad[5 + ctx.num_modalities :])
        dx, dparams = _layer_gradient(ctx, _eager, grad_z, grad_states, want_params)
        return None, None, None, None, None, *dx, *dparams


def solve_cells(x: Tensor, params: Sequence[Tensor], z0: Tensor | None, *options: Any) -> Any:
    """``ops.solve_cells`` in eager mode, with gradients."""
    z, statistics = _apply(SolveCells, x, z0, options, *params)
    return z, *statistics


def solve_fuse(
    x_fuse: Tensor,
    cell_sum: Tensor,
    params: Sequence[Tensor],
    mask: Tensor | None,
    z0: Tensor | None,
    *options: Any,
) -> Any:
    """``ops.solve_fuse`` in eager mode, with gradients."""
    z, statistics = _apply(SolveFuse, x_fuse, cell_sum, mask, z0, options, *params)
    return z, *statistics


def solve_layer(
    x: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    z0_fuse: Tensor | None,
    z0_cells: Tensor | None,
    *options: Any,
) -> Any:
    """``ops.solve_layer`` in eager mode, with gradients."""
    z, states, statistics = _apply(
        SolveLayer, len(x), mask, z0_fuse, z0_cells, options, *x, *params
    )
    return z, states, *statistics


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply`` outside transforms.

    It asks of every tensor whether it is left over from a transform that has ended: 11 us for those
    of a layer. A parameter never is.
    """
    plain = [
        unwrap_if_dead(t) if type(t) is not nn.Parameter and isinstance(t, Tensor) else t
        for t in inputs
    ]
    return super(torch.autograd.Function, function).apply(*plain)  # type: ignore[misc]


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
            (u,) = _NoSecond.apply(1, u, image)
        return u, None, None, None


class _NoSecond(torch.autograd.Function):
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
