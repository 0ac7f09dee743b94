"""The operators: kinds of block (``blocks``), what runs (``bodies``), the gradient (``rule``), and
the Jacobian penalty (``penalty``) and the size of injections (``unit``), which are no solves.

:func:`solve` is the one way in. It takes a call to the form that those who look at it can follow:
the registered operator for compilers, a ``torch.autograd.Function`` in eager mode or under
``torch.func``, the bare body where no gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse import checks
from deqfuse.operators import bodies, captures, eager, registered, transforms
from deqfuse.operators.blocks import CELLS, FUSE, LAYER, Block
from deqfuse.operators.penalty import penalty_layer
from deqfuse.operators.unit import unit_size
from deqfuse.torch_private import in_transform_or_forward_mode, traced

__all__ = ["CELLS", "FUSE", "LAYER", "Block", "penalty_layer", "registered", "solve", "unit_size"]


def solve(
    block: Block,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Any],
    options: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Solve a kind of block; ``blocks.py`` says which operands it has.

    Args:
        block: ``CELLS``, ``FUSE`` or ``LAYER``.
        rows: (..., d) each, features, differentiated.
        params: (...) each, parameters, differentiated.
        others: masks, starts and sizes, without a gradient.
        options: num_groups, variant, solver and adjoint as text, backend, on_failure.

    Returns:
        Equilibria, residual, nfe, outcome and trace as tensors. In eager mode a layer's backend may
        add True where it knows that every row has converged.
    """
    if traced(rows[0]):
        operator = captures.solve_operator(block, rows[0], others, options)
        result: tuple[Any, ...] = operator(*block.join(rows, params, others), *options)
        return result
    checks.not_traced()
    if in_transform_or_forward_mode():
        return transforms.solve(block, rows, params, others, options)
    if torch.is_grad_enabled():
        return eager.solve(block, rows, params, others, options)
    return bodies.solve_body(block, rows, params, others, options)
