"""Which of a block's operators a compiler is given: what a CUDA graph can hold, or its twin.

``torch.compile(mode="reduce-overhead")`` captures what it compiles in CUDA graphs, whose memory is
reused by the next one. It must not hold a solve that asks the device how far it is, or keeps memory
for its next call; operators tagged ``cudagraph_unsafe`` stay outside. On other devices there are no
such graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse import backends
from deqfuse.backends.problem import Problem
from deqfuse.operators.blocks import LAYER, Block
from deqfuse.solvers.options import from_code
from deqfuse.torch_private import constant_when_compiled

DEVICE = "cuda"


def solve_operator(
    block: Block, like: Tensor, others: Sequence[Any], options: Sequence[Any]
) -> Any:
    """The operator of a solve of features like ``like`` (..., d)."""
    if like.device.type != DEVICE:
        return block.solve.captured
    masked = others[block.masks[-1]] is not None
    if masked and block is not LAYER:  # rows are gathered by what is present
        return block.solve.uncaptured
    num_groups, _, solver, adjoint, backend, _ = options
    how = (num_groups, solver, adjoint, backend)
    captured = _captures_solve(like.device, like.dtype, int(like.shape[-1]), *how, masked)
    return block.solve.captured if captured else block.solve.uncaptured


def adjoint_operator(
    block: Block, star: Tensor, present: Tensor | None, adjoint: str, backend: str
) -> Any:
    """The operator of an adjoint at the equilibrium ``star``."""
    if star.device.type != DEVICE:
        return block.adjoint.captured
    record = backends.load(backend)
    gathers = present is not None and (block is not LAYER or record.adjoint_present is None)
    captured = not gathers and record.captures_adjoint(star.device, from_code(adjoint))
    return block.adjoint.captured if captured else block.adjoint.uncaptured


@constant_when_compiled  # a question about the machine, not to be traced into
def _captures_solve(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    num_groups: int,
    solver: str,
    adjoint: str,
    backend: str,
    masked: bool,
) -> bool:
    problem = Problem(device, dtype, dim, num_groups, from_code(solver), from_code(adjoint))
    record = backends.load(backend)
    gathers = masked and record.solve_present is None
    return not gathers and record.captures_solve(problem)
