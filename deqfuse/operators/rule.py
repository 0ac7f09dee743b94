"""The gradient rule: at an equilibrium the incoming cotangent g becomes ``u = (I - J^T)^-1 g``.

Theorem 1 of arXiv 2306.16645. Stated here once for every kind of block, as two plain functions:
what a solve keeps (:func:`remember`) and what becomes of its cotangents (:func:`gradient`).
``registered.py`` gives them to the operators, ``eager.py`` and ``transforms.py`` to a
``torch.autograd.Function``. Second derivatives are refused: the rule does not give them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse import reporting
from deqfuse.backends.maps import CellParams
from deqfuse.errors import DoubleBackwardError
from deqfuse.operators.blocks import CELLS, LAYER, Block
from deqfuse.solvers.options import GradientOption, from_code
from deqfuse.torch_private import traced, values_of

Adjoint = Callable[..., Sequence[Any]]  # (block, *operands): how an adjoint is called


def remember(
    block: Block,
    ctx: Any,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Any],
    options: Sequence[Any],
    results: Sequence[Any],
) -> None:
    """Keep in ``ctx`` what :func:`gradient` needs of a solve, and say what has no gradient."""
    ctx.block, ctx.options, ctx.num_rows = block, options, len(rows)
    ctx.sizes = [others[i] for i in block.sizes]
    masks = [others[i] for i in block.masks]
    ctx.save_for_backward(results[block.num_equilibria - 1], *masks, *rows, *params)
    ctx.mark_non_differentiable(*results[block.num_equilibria : block.num_results])
    ctx.set_materialize_grads(False)


def gradient(
    ctx: Any,
    adjoint: Adjoint,
    grads: Sequence[Tensor | None],
    want_params: bool,
) -> tuple[list[Any], list[Any]]:
    """Gradients of the rows and of the params from the cotangents of a solve's results.

    Args:
        ctx: what :func:`remember` wrote into.
        adjoint: how to call the adjoint of a kind of block.
        grads: cotangents of the results; None stands for zero.
        want_params: whether any parameter needs its gradient.
    """
    block: Block = ctx.block
    star, *saved = ctx.saved_tensors
    masks, saved = saved[: len(block.masks)], saved[len(block.masks) :]
    rows, params = saved[: ctx.num_rows], saved[ctx.num_rows :]
    cotangents = block.cotangents(*grads[: block.num_equilibria])
    nothing: tuple[list[Any], list[Any]] = [None] * len(rows), [None] * len(params)
    if all(g is None for g in cotangents):
        return nothing
    if block is LAYER and cotangents[0] is None:
        # Only the cells were used: the fuse step, failed or not, has no part in it.
        own = len(rows) * len(CellParams._fields)
        block, cotangents, star = CELLS, cotangents[1:], star[:-1]
        operands = block.join([torch.stack(rows)], params[:own], masks[-1:])  # what is present
    else:
        operands = block.join(rows, params, (*masks, *ctx.sizes))

    num_groups, variant, solver, code, backend, on_failure = ctx.options
    code = _in_force(code, solver)
    results = adjoint(
        block, *cotangents, star, *operands, num_groups, variant, code, backend, want_params
    )
    row_grads, param_grads, (residual, _, outcome, *known) = block.split_gradients(results)
    option: GradientOption = from_code(code)
    if option.reports and not traced(outcome):
        reporting.report(
            reporting.backward(block.parts),
            values_of(outcome),
            values_of(residual),
            option,
            on_failure,
            all_converged=any(known),
            cotangents=[None if g is None else values_of(g) for g in cotangents],
        )
    if block is not ctx.block:
        row_grads = list(row_grads[0].unbind())
    return row_grads, [*param_grads, *nothing[1][len(param_grads) :]]


@functools.lru_cache(maxsize=256)
def _in_force(adjoint: str, solver: str) -> str:
    """The gradient option as it applies behind this forward solver (never looser than it)."""
    option: GradientOption = from_code(adjoint).for_forward(from_code(solver))
    return option.code


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
