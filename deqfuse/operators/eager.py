"""A solve in eager mode with gradients: the operator's body, without the dispatcher's detours.

Why a second form beside the registered one: that one packs and unpacks the parameter list and
enters the dispatcher twice at every call, which costs as much as a small solve. A separate
``setup_context`` inspects signatures at every call, so ``forward`` takes ``ctx`` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse.operators import bodies, rule
from deqfuse.operators.blocks import Block
from deqfuse.torch_private import apply_function, in_transform


class Solve(torch.autograd.Function):
    """The solve of any kind of block, every tensor an argument of its own.

    ``operands`` are the rows, the params, and ``block.num_others`` others. A launcher may add
    whether all rows converged, which is no tensor: torch hands it on as it is.
    """

    @staticmethod
    def forward(ctx: Any, block: Block, num_rows: int, options: Any, *operands: Any) -> Any:
        parts = split(block, num_rows, operands)
        results = bodies.solve_body(block, *parts, options)
        rule.remember(block, ctx, *parts, options, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        block, first = ctx.block, 3 + ctx.num_rows
        want_params = any(ctx.needs_input_grad[first : -block.num_others])
        row_grads, param_grads = rule.gradient(ctx, _adjoint, grads, want_params)
        return None, None, None, *row_grads, *param_grads, *[None] * block.num_others


def split(
    block: Block, num_rows: int, operands: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor], tuple[Any, ...]]:
    """Rows, params and others of a flat list of operands."""
    end = len(operands) - block.num_others
    return list(operands[:num_rows]), list(operands[num_rows:end]), tuple(operands[end:])


def solve(
    block: Block,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Any],
    options: tuple[Any, ...],
) -> Any:
    """Results of the operator of the solve, with gradients; see :class:`Solve`."""
    return apply_function(Solve, block, len(rows), options, *rows, *params, *others)


def _adjoint(block: Block, *operands: Any) -> Any:
    """How the gradient rule calls the adjoint of a kind of block: by its body, where that will do.

    With ``create_graph=True`` it is the operator, whose own gradient refuses second derivatives;
    under a transform of ``torch.func`` it is the operator with that refusal in a form of its own.
    """
    if in_transform():
        return _guarded(block, *operands)
    if torch.is_grad_enabled():
        return block.adjoint.captured(*operands)
    return bodies.adjoint_body(block, *operands)


def _guarded(block: Block, *operands: Any) -> tuple[Any, ...]:
    """An adjoint operator under a transform; a second derivative of its results is refused."""
    with torch.no_grad():
        results = block.adjoint.captured(*operands)
        row_grads, param_grads, statistics = block.split_gradients(results)
    if torch.is_grad_enabled():  # always so in torch.func.grad
        grads = [*row_grads, *param_grads]
        inputs = [t for a in operands for t in (a if isinstance(a, list) else [a])]
        tracked = [t for t in inputs if isinstance(t, Tensor)]
        grads = list(rule.NoSecond.apply(len(grads), *grads, *tracked))
        row_grads, param_grads = grads[: len(row_grads)], grads[len(row_grads) :]
    return block.join(row_grads, param_grads, statistics)
