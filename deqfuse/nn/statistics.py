"""Statistics of blocks that no single solve made: of fixed steps, of some cells, with a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from deqfuse.outcome import Outcome
from deqfuse.result import BlockInfo
from deqfuse.solvers import rows as solver_rows
from deqfuse.solvers.options import SolverOption


def last_step(old: Tensor, new: Tensor, solver: SolverOption, steps: int) -> BlockInfo:
    """Residual of the last of some steps; converged only if it happens to meet the tolerance."""
    judge = solver_rows.Rows(old.flatten(0, -2), solver.tol, max_iter=1)
    judge.observe(old.flatten(0, -2), new.flatten(0, -2), cost=steps)
    found, shape = judge.solution(), new.shape[:-1]
    return BlockInfo(found.residual.view(shape), found.nfe.view(shape), found.outcome.view(shape))


def marked(info: BlockInfo, present: Tensor | None, otherwise: Outcome) -> BlockInfo:
    """Statistics (...) of a block without those of what is absent; ``present`` is (..., 1).

    Args:
        info: of all rows.
        present: which of them have anything to solve; all when None.
        otherwise: how the others end, ABSENT with zeros or EMPTY with NaN.
    """
    if present is None:
        return info
    here, residual = present[..., 0], torch.nan if otherwise is Outcome.EMPTY else 0.0
    return BlockInfo(
        torch.where(here, info.residual, residual),
        torch.where(here, info.nfe, 0),
        torch.where(here, info.outcome, int(otherwise)).to(torch.int8),
    )


def of_cell(info: BlockInfo, k: int) -> BlockInfo:
    """Statistics (B,) of one of N cells."""
    trace = None if info.trace is None else info.trace[:, k]
    return BlockInfo(info.residual[k], info.nfe[k], info.outcome[k], trace)


def together(infos: list[BlockInfo]) -> BlockInfo:
    """Statistics (N, B) from those (B,) of N cells; shorter traces end with NaN."""
    traces = [info.trace for info in infos if info.trace is not None]
    steps = max((len(t) for t in traces), default=0)
    full = [torch.cat([t, t.new_full((steps - len(t), *t.shape[1:]), torch.nan)]) for t in traces]
    return BlockInfo(
        torch.stack([info.residual for info in infos]),
        torch.stack([info.nfe for info in infos]),
        torch.stack([info.outcome for info in infos]),
        torch.stack(full, 1) if full else None,
    )
