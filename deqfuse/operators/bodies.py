"""What an operator does when it runs: finds the backend and calls its launcher.

Eager mode calls these functions themselves (``eager.py``); ``registered.py`` makes them the
operators' implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from deqfuse import backends
from deqfuse.backends.maps import VARIANTS
from deqfuse.operators.blocks import Block
from deqfuse.solvers.options import from_code


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off: the norms of a converging loop need float32 at least."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()  # entering torch.autocast costs more than it looks
    return torch.autocast(device_type=device.type, enabled=False)


def solve_body(
    block: Block,
    rows: Sequence[Tensor],
    params: Sequence[Tensor],
    others: Sequence[Any],
    options: Sequence[Any],
) -> tuple[Any, ...]:
    """The solve of a kind of block on the backend that the options name.

    Returns:
        ``block.num_results`` tensors; the layer's launchers may add whether all rows are known to
        have converged, which saves the caller a look at the outcomes: 20 us behind a small solve.
    """
    num_groups, variant, solver, _, backend, _ = options
    solve = block.launchers(backends.load(backend)).solve
    with full_precision(rows[0].device):
        operands = block.join(rows, params, others)
        return tuple(solve(*operands, num_groups, VARIANTS[variant], from_code(solver)))


def adjoint_body(block: Block, *inputs: Any) -> tuple[Any, ...]:
    """The adjoint of a kind of block, its operands in the operator's order."""
    *operands, num_groups, variant, adjoint, backend, want_params = inputs
    at = block.num_equilibria  # there is one cotangent for each, and the equilibrium follows
    operands[at] = operands[at].contiguous()
    launch = block.launchers(backends.load(backend)).adjoint
    with full_precision(operands[at].device):
        *grads, statistics = launch(
            *operands, num_groups, VARIANTS[variant], from_code(adjoint), want_params
        )
    return *grads, *statistics
