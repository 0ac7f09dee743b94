"""The equilibrium of any row-wise callable, whose solve stays outside compiled graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from deqfuse import backends, checks, reporting
from deqfuse.backends.problem import compute_dtype
from deqfuse.operators.rule import NoSecond
from deqfuse.reporting import OnFailure
from deqfuse.result import BlockInfo
from deqfuse.solvers.adjoint import solve_adjoint
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import GradientOption, Implicit, SolverOption, Unrolled
from deqfuse.solvers.solve import Solver, solve
from deqfuse.torch_private import (
    dynamo_is_loaded,
    in_transform_or_forward_mode,
    mark_uncompiled,
    traced,
    values_of,
)

# What torch.compile(fullgraph=True) says about loops whose length depends on the data.
ITERATES = "iterates until every row has converged, which no graph can hold. Remedy: "
_COMPILE_F = f"DEQ(f) {ITERATES}compile f itself, DEQ(torch.compile(f)), or leave fullgraph out"

_F = TypeVar("_F", bound=Callable[..., Any])


def uncompiled(reason: str) -> Callable[[_F], _F]:
    """``torch.compiler.disable``, without loading the compiler when deqfuse is imported."""

    def mark(f: _F) -> _F:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not dynamo_is_loaded():
                return f(*args, **kwargs)
            return torch.compiler.disable(f, reason=reason)(*args, **kwargs)

        mark_uncompiled(call, reason)
        return cast(_F, call)

    return mark


@uncompiled(_COMPILE_F)
def fixed_point(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (B, n)
    *,
    solver: SolverOption = Anderson(),  # noqa: B008 - frozen
    adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
    on_failure: OnFailure = "warn",
) -> tuple[Tensor, BlockInfo, str]:
    """Equilibrium ``z = f(z)`` of any row-wise callable, with gradients to everything f touches.

    The gradient is that of the implicit function theorem (Theorem 1 of arXiv 2306.16645): backward,
    ``(I - J^T) u = g`` is solved per row, with J the Jacobian of f at the equilibrium.

    Args:
        f: maps (B, n) to (B, n), dtype and device of ``z0``; row b of the output may depend on row
            b of the input only, since rows are solved and stopped one by one.
        z0: (B, n) start, any floating dtype; no gradient flows to it. For 16-bit z0 the state is
            float32, and f receives and returns it in 16 bits: it cannot be solved beyond f's own
            rounding.
        solver: forward solver with its tolerance and budget.
        adjoint: how gradients pass.
        on_failure: "warn", "raise" or "ignore" when rows do not converge, forward or backward.

    Returns:
        The equilibrium (B, n) in the dtype of ``z0``, differentiable in whatever f uses (arguments,
        closed-over parameters); its statistics, of shape (B,); the name of the backend that ran the
        solver.

    Raises:
        TypeError: f is not callable; z0, or what f returned, is no floating tensor.
        ValueError: z0, or what f returned, has a wrong shape or device.
        NotImplementedError: inside a ``torch.func`` transform or forward-mode differentiation.
        ConvergenceError: rows failed and ``on_failure="raise"``.
    """
    checks.options(solver, adjoint, on_failure)
    if not callable(f):
        raise TypeError(f"f: expected a callable f(z), got {type(f).__name__}")
    checks.tensor("z0", z0)
    if z0.dim() != 2:
        raise ValueError(f"z0: expected (B, n), got shape {tuple(z0.shape)}")
    return solve_map(f, z0, "DEQ(f)", reporting.FIXED_POINT, solver, adjoint, on_failure)


def solve_map(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (B, n)
    what: str,
    parts: reporting.Parts,
    solver: SolverOption,
    adjoint: GradientOption,
    on_failure: OnFailure,
) -> tuple[Tensor, BlockInfo, str]:
    """What :func:`fixed_point` does with arguments that have been checked.

    Args:
        f, z0, solver, adjoint, on_failure: as there.
        what: whose map it is, as an error has it.
        parts: the same, as a report on rows that failed has it.

    Returns:
        As there.
    """
    checks.not_traced()
    if in_transform_or_forward_mode():
        raise NotImplementedError(
            f"deqfuse: {what} inside torch.func transforms (vmap, grad, jvp, ...) or forward-mode "
            "differentiation is not supported. Remedy: backward(); a mapped dimension as more rows"
        )

    def checked(z: Tensor) -> Tensor:
        # A copy of its own, in its own dtype: an f that works in place must not reach the solver's
        # state, where f(z) - z would be zero and every row "converged".
        fz = f(z.to(z0.dtype, copy=True))
        checks.tensor("f(z)", fz, like=z0)
        checks.shape("f(z)", fz, tuple(z0.shape), "(B, n), the shape of z0")
        return fz.to(z.dtype)

    adjoint = adjoint.for_forward(solver)
    start = z0.detach().to(compute_dtype(z0.dtype))  # norms are never below float32
    if isinstance(adjoint, Unrolled):
        backend, found = "reference", solve(checked, start, solver)
    else:
        with torch.no_grad():
            backend = backends.for_rows(start, solver)
            found = solve(checked, start, solver, run=_anderson_of(backend, solver))
    info = block_info(found, parts, solver, on_failure)
    z_star = found.z
    if torch.is_grad_enabled() and not isinstance(adjoint, Unrolled):
        leaf = z_star.detach().requires_grad_()
        image = checked(leaf)
        if image.requires_grad:
            z_star = ImplicitGradient.apply(image, leaf, adjoint, parts, on_failure)
    return z_star.to(z0.dtype), info, backend


def block_info(
    solved: Any, parts: reporting.Parts, solver: SolverOption, on_failure: str
) -> BlockInfo:
    """Statistics as users see them, and the report on rows that failed."""
    residual, outcome = solved.residual.detach(), solved.outcome
    if not traced(outcome):
        reporting.report(parts, values_of(outcome), values_of(residual), solver, on_failure)
    return BlockInfo(residual, solved.nfe, outcome, solved.trace if solver.trace else None)


def _anderson_of(backend: str, solver: SolverOption) -> Solver | None:
    """The backend's own step of Anderson mixing; None for solvers that have but one form."""
    if not isinstance(solver, Anderson):
        return None
    run = backends.load(backend).anderson
    return lambda f, z0, option, linearize: run(f, z0, option)


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
        parts: reporting.Parts,
        on_failure: str,
    ) -> Tensor:  # (B, n)
        ctx.save_for_backward(image, z_star)
        ctx.adjoint, ctx.parts, ctx.on_failure = adjoint, parts, on_failure
        return z_star.clone()  # the answer, in grad mode as without; the graph is that of f(z*)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
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
                reporting.backward(ctx.parts),
                solution.outcome,
                solution.residual,
                ctx.adjoint,
                ctx.on_failure,
                cotangents=(grad,),
            )
        u = solution.z
        # With create_graph=True, u depends on z* and the parameters in ways that no graph records.
        if torch.is_grad_enabled():
            (u,) = NoSecond.apply(1, u, image)
        return u, None, None, None, None
