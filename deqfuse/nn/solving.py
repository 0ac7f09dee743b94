"""From injections to the answer: the ways in which ``DEQFusion`` gets there.

One operator for the whole layer; block by block, for the ablations and ``Unrolled()``; or a fixed
number of steps. Values in, values out: the layer hands over its parameters as :class:`Equations`.
Injections come as N tensors (B, d), or as one (N, B, d).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import functional, layer
from deqfuse.backends import BackendName
from deqfuse.backends.problem import SolvedLayer, compute_dtype
from deqfuse.nn import given
from deqfuse.nn.equations import (
    ClosedForm,
    Equations,
    any_present,
    elements,
    of_some,
    require_memory,
    where,
)
from deqfuse.nn.found import Found
from deqfuse.nn.statistics import last_step, marked, of_cell, together
from deqfuse.outcome import Outcome
from deqfuse.reporting import OnFailure
from deqfuse.result import BlockInfo, SolvedMap, SolveInfo
from deqfuse.solvers.options import GradientOption, SolverOption, Unrolled


class How(NamedTuple):
    """How to solve and to differentiate."""

    solver: SolverOption
    adjoint: GradientOption
    on_failure: OnFailure
    backend: BackendName


class Rows(NamedTuple):
    """What comes with the injections, row by row; None where there is none of it."""

    mask: Tensor | None  # (B, d), dropout factors
    present: Tensor | None  # (N, B, 1), bool
    joint: tuple[int, ...] = ()  # dimensions (T,) of the features that a given cell sees at once

    @property
    def counts(self) -> Tensor | None:
        """(B, 1) int64, how many modalities a row has."""
        return None if self.present is None else self.present.sum(0)


def closed_form(combine: Callable[..., Tensor] | None, weights: Tensor | None) -> ClosedForm:
    """The combination of the ablations: without a gate, a plain sum, or the injection alone."""
    if combine is not None:
        return ClosedForm(combine, nfe=1)
    if weights is None:
        return ClosedForm(lambda z, cells, x_fuse, mask: cells.sum(0), nfe=0)
    return ClosedForm(lambda z, cells, x_fuse, mask: x_fuse, nfe=0)


def equilibrium(
    equations: Equations,
    how: How,
    xs: list[Tensor],  # N tensors (B, d)
    rows: Rows,
    start_fuse: Tensor | None,  # (B, d)
    start_cells: Tensor | None,  # (N, B, d)
) -> Found:
    """The joint equilibrium: in one operator where that solves these equations."""
    solve = _whole_layer if is_whole(equations, how) else _block_by_block
    return solve(equations, how, xs, rows, start_fuse, start_cells)


def is_whole(equations: Equations, how: How) -> bool:
    """Whether one operator solves these equations: all of the paper's, an implicit gradient."""
    foreign = equations.given or equations.injection or isinstance(how.adjoint, Unrolled)
    # Dynamo of torch 2.11 cannot call bool() on a list.
    return not (foreign or not equations.cells or not equations.fuse)


def _whole_layer(
    equations: Equations,
    how: How,
    xs: list[Tensor],
    rows: Rows,
    start_fuse: Tensor | None,
    start_cells: Tensor | None,
) -> Found:
    """All equations of the paper and an implicit gradient: one operator."""
    params, starts = equations.flat(), (start_fuse, start_cells)
    solved, backend = layer.solve_layer(
        xs, params, rows.mask, *starts, rows.present, **settings(equations, how)
    )
    return of_layer(equations, how, xs, rows, params, solved, backend)


def of_layer(
    equations: Equations,
    how: How,
    xs: list[Tensor],  # N tensors (B, d)
    rows: Rows,
    params: list[Tensor],  # backends/layer.py
    solved: SolvedLayer,
    backend: str,
) -> Found:
    """What the solve of a whole layer found."""
    mask, present = rows.mask, rows.present

    def info() -> SolveInfo:
        states = solved.states.detach()

        def block(at: Any) -> BlockInfo:
            trace = solved.trace[:, at] if how.solver.trace else None
            return BlockInfo(solved.residual[at], solved.nfe[at], solved.outcome[at], trace)

        def cells() -> SolvedMap:  # stacked when asked for: the penalty does without
            return equations.solved_cells(torch.stack(xs), states[:-1], present)

        def fuse() -> SolvedMap:
            x_fuse = equations.x_fuse(torch.stack(xs), present)
            assert x_fuse is not None
            given = x_fuse, states[:-1].sum(0), mask, rows.counts
            return equations.solved_fuse(*given, states[-1])

        def penalty(num_probes: int, probes: Tensor | None = None) -> Tensor:
            require_memory(params)
            which = (equations.num_groups, equations.variant, backend, probes)
            return layer.layer_penalty(xs, params, mask, present, states, num_probes, *which)

        return SolveInfo(block(-1), block(slice(None, -1)), backend, (cells, fuse), penalty)

    return Found(solved.z, lambda: solved.states[:-1], info)


def _block_by_block(
    equations: Equations,
    how: How,
    xs: list[Tensor],
    rows: Rows,
    start_fuse: Tensor | None,
    start_cells: Tensor | None,
) -> Found:
    """The cells first; for given cells, the ablations, and for gradients through the steps."""
    x, options = torch.stack(xs), settings(equations, how)
    blocks: list[Callable[[], SolvedMap]] = []
    if equations.given:
        zs, cells, backend, blocks = _mixed_cells(equations, how, x, rows, start_cells)
    elif equations.cells:
        zs, cells, backend = functional.solve_cells(
            x, equations.cells, z0=start_cells, present=rows.present, **options
        )
        blocks.append(lambda: equations.solved_cells(x, zs.detach(), rows.present))
    else:
        zs = where(rows.present, x)
        cells, backend = BlockInfo.exact(zs, 0), "reference"
        cells = marked(cells, rows.present, Outcome.ABSENT)

    x_fuse = equations.x_fuse(x, rows.present, rows.joint)
    if equations.closed_form is None:
        assert x_fuse is not None
        cell_sum = zs.sum(0)
        z, fuse, backend = functional.solve_fuse(
            x_fuse,
            cell_sum,
            equations.fuse,
            num_modalities=equations.num_modalities,
            counts=rows.counts,
            mask=rows.mask,
            z0=start_fuse,
            **options,
        )
        given = x_fuse, cell_sum.detach(), rows.mask, rows.counts
        blocks.append(lambda: equations.solved_fuse(*given, z.detach()))
    else:
        z = equations.closed_form.evaluate(x[0], zs.to(x.dtype), x_fuse, rows.mask)
        some = any_present(rows.present)
        z = where(some, z, torch.nan)
        fuse = marked(BlockInfo.exact(z, equations.closed_form.nfe), some, Outcome.EMPTY)
    info = SolveInfo(fuse, cells, backend, tuple(blocks))
    # A copy: the backward pass and `info` keep the original, and `z += ...` must be possible.
    return Found(z.clone(), lambda: zs, lambda: info)


@given.outside_graphs
def _mixed_cells(
    equations: Equations,
    how: How,
    x: Tensor,  # (N, B, d)
    rows: Rows,
    start: Tensor | None,  # (N, B, d)
) -> tuple[Tensor, BlockInfo, str, list[Callable[[], SolvedMap]]]:
    """Given cells, each by itself, and the layer's own beside them in one operator."""
    given.refuse_export(x)
    own, present, found = equations.own, rows.present, {}
    if own:
        some = {
            "z0": of_some(start, own),
            "present": of_some(present, own),
            **settings(equations, how),
        }
        zs, info, backend = functional.solve_cells(x[own], equations.cells, **some)
        for k, i in enumerate(own):
            block = functools.partial(equations.solved_own, i, x, zs[k].detach(), present)
            found[i] = given.SolvedCell(zs[k], of_cell(info, k), backend, block)
    options = how.solver, how.adjoint, how.on_failure
    found |= given.solve(equations.given, x, present, rows.joint, start, *options)
    ordered = [found[i] for i in range(equations.num_modalities)]
    info = together([cell.info for cell in ordered])
    zs = torch.stack([cell.z for cell in ordered])
    return zs, info, ordered[-1].backend, [cell.block for cell in ordered]


def _mixed_step(
    equations: Equations, cells: dict[int, given.GivenCell], x: Tensor, present: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """One step of given cells and the layer's own beside them, (N, B, d) to (N, B, d)."""
    own = equations.own
    step_own = equations.cells_map(x[own], of_some(present, own)) if own else None

    def step(z: Tensor) -> Tensor:
        new = {i: cell.on_rows(z[i]) for i, cell in cells.items()}
        if step_own is not None:
            new |= zip(own, step_own(z[own]), strict=True)
        return torch.stack([new[i] for i in range(len(z))])

    return step


def weight_tied(
    equations: Equations,
    how: How,
    x: Tensor,  # (N, B, d)
    rows: Rows,
    steps: int,
) -> Found:
    """``steps`` steps of every equation from zero; each combination sees that step's cells."""
    work = x.to(compute_dtype(x.dtype))
    z, zs = torch.zeros_like(work[0]), torch.zeros_like(work)
    absent_are_zero = where(rows.present, work)
    cells = {
        i: given.GivenCell(i, module, x[i], of_some(rows.present, i), rows.joint)
        for i, module in equations.given.items()
    }
    if cells:
        step_cells = _mixed_step(equations, cells, x, rows.present)
    else:
        step_cells = (
            equations.cells_map(x, rows.present) if equations.cells else (lambda _: absent_are_zero)
        )
    x_fuse = equations.x_fuse(x, rows.present, rows.joint)
    for _ in range(steps):
        before = z, zs
        zs = step_cells(zs)
        if equations.closed_form is None:
            assert x_fuse is not None
            step = equations.fuse_map(x_fuse, zs.sum(0), rows.mask, rows.counts)
            z = step(z)
        else:
            z = equations.closed_form.evaluate(z, zs.to(x.dtype), x_fuse, rows.mask)

    some = any_present(rows.present)
    z = where(some, z, torch.nan)

    def info() -> SolveInfo:
        with torch.no_grad():
            fuse = marked(last_step(before[0], z, how.solver, steps), some, Outcome.EMPTY)
            of_cells = last_step(before[1], zs, how.solver, steps)
            of_cells = marked(of_cells, rows.present, Outcome.ABSENT)
        blocks, at = [], zs.detach()
        if cells:
            own = functools.partial(equations.solved_own, x=x, present=rows.present)
            for i, z_i in enumerate(at):
                given_map = cells[i].measured(z_i) if i in cells else None
                blocks.append(given_map or functools.partial(own, i, z=z_i))
        elif equations.cells:
            count = elements(zs, rows.present)
            blocks.append(lambda: SolvedMap(step_cells, at, None, count))
        if equations.closed_form is None:
            blocks.append(lambda: SolvedMap(step, z.detach()))
        return SolveInfo(fuse, of_cells, "reference", tuple(blocks))

    return Found(z.clone(), lambda: zs, info)


def settings(equations: Equations, how: How) -> dict[str, Any]:
    return {"num_groups": equations.num_groups, "variant": equations.variant, **how._asdict()}
