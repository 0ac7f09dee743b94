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
from torch import Tensor, nn

from deqfuse import functional, layer
from deqfuse.backends import BackendName, maps
from deqfuse.backends.layer import fuse_injection
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams, VariantName
from deqfuse.backends.problem import SolvedLayer, compute_dtype
from deqfuse.nn import given
from deqfuse.nn.found import Found
from deqfuse.nn.statistics import last_step, marked, of_cell, together
from deqfuse.reporting import OnFailure
from deqfuse.result import BlockInfo, SolvedMap, SolveInfo
from deqfuse.solvers.options import GradientOption, SolverOption, Unrolled
from deqfuse.torch_private import in_transform, traced


class ClosedForm(NamedTuple):
    """A combination that needs no solve."""

    evaluate: Callable[..., Tensor]  # z (B, d), cells (N, B, d), x_f (B, d) or None, mask -> (B, d)
    nfe: int


class Equations(NamedTuple):
    """What is to be solved, with the parameters of one call."""

    cells: list[Tensor]  # ten for each cell of the layer's own; none where z_i* = x_i
    fuse: list[Tensor]  # six; none where the combination is in closed form
    weights: Tensor | None  # (N,) of the injection x_f; None where nothing uses it
    bias: Tensor | None  # (1,) of x_f
    closed_form: ClosedForm | None
    num_modalities: int
    num_groups: int
    variant: VariantName
    given: dict[int, nn.Module]  # cells of the user's own, by modality
    injection: nn.Module | None  # makes x_f in the place of the weighted sum

    def flat(self) -> list[Tensor]:
        """All parameters as one list, for the operator of the whole layer."""
        joint = (self.weights, self.bias)
        return [*self.cells, *self.fuse, *(t for t in joint if t is not None)]

    def x_fuse(
        self, x: Tensor, present: Tensor | None = None, joint: tuple[int, ...] = ()
    ) -> Tensor | None:
        """Injection of the combination from all x (N, B, d) that are present: (B, d)."""
        if self.injection is not None:
            return given.inject(self.injection, _where(present, x), joint)
        if self.weights is None:
            return None
        return fuse_injection(_where(present, x), self.weights, self.bias)

    @property
    def own(self) -> list[int]:
        """The modalities with a cell of the layer's own, where some are given."""
        return [i for i in range(self.num_modalities) if i not in self.given]

    def solved_own(self, i: int, x: Tensor, z: Tensor, present: Tensor | None) -> SolvedMap:
        """The layer's own cell of modality i at its equilibrium z (B, d), as one of them."""
        k, size, at = self.own.index(i), len(CellParams._fields), slice(i, i + 1)
        alone = self._replace(cells=self.cells[size * k : size * (k + 1)])
        return alone.solved_cells(x[at], z[None], _at(present, at))

    def cells_map(self, x: Tensor, present: Tensor | None) -> Callable[[Tensor], Tensor]:
        """One step of the cells in the compute dtype, x (N, B, d); absent ones stay zero."""
        x, *rest = self._of_cells(_where(present, x))
        return lambda z: _where(present, maps.residual_cell(z, x, *rest))

    def solved_cells(self, x: Tensor, z: Tensor, present: Tensor | None) -> SolvedMap:
        """The cells at their equilibria z (N, B, d), for Jacobian measurements."""

        @torch.no_grad()
        def linearize() -> Callable[[Tensor], Tensor]:
            vjp = CellLinearization(z, *self._of_cells(_where(present, x))).vjp
            return lambda u: _where(present, vjp(u))

        return SolvedMap(self.cells_map(x, present), z, linearize, _elements(z, present))

    def fuse_map(
        self,
        x_fuse: Tensor,
        cell_sum: Tensor,
        mask: Tensor | None,
        counts: Tensor | None,  # (B, 1)
    ) -> Callable[[Tensor], Tensor]:
        """One step of the combination in the compute dtype, all other operands (B, d)."""
        x_fuse, cell_sum, mask, n, params, *rest = self._of_fuse(x_fuse, cell_sum, mask, counts)
        constant = maps.gate_constant(cell_sum, n, params)
        return lambda z: maps.purify_combine(z, x_fuse, constant, mask, n, params, *rest)

    def solved_fuse(
        self,
        x_fuse: Tensor,
        cell_sum: Tensor,
        mask: Tensor | None,
        counts: Tensor | None,  # (B, 1)
        z: Tensor,
    ) -> SolvedMap:
        """The combination at its equilibrium z (B, d), for Jacobian measurements."""
        operands = x_fuse, cell_sum, mask, counts
        linearize = lambda: FuseLinearization(z, *self._of_fuse(*operands)).vjp  # noqa: E731
        return SolvedMap(self.fuse_map(*operands), z, torch.no_grad()(linearize))

    def _of_cells(self, x: Tensor) -> tuple[Any, ...]:
        """What the cells' map takes behind z, in the compute dtype."""
        _require_memory(self.cells)
        dtype = compute_dtype(x.dtype)
        params = CellParams.stack([t.to(dtype) for t in self.cells])
        return x.to(dtype), params, self.num_groups, VARIANTS[self.variant]

    def _of_fuse(
        self, x_fuse: Tensor, cell_sum: Tensor, mask: Tensor | None, counts: Tensor | None
    ) -> tuple[Any, ...]:
        """What the combination's linearisation takes behind z, in the compute dtype."""
        _require_memory(self.fuse)
        dtype = compute_dtype(x_fuse.dtype)
        n = self.num_modalities if counts is None else counts
        params = FuseParams(*(t.to(dtype) for t in self.fuse))
        rest = (n, params, self.num_groups, VARIANTS[self.variant])
        return x_fuse.to(dtype), cell_sum.to(dtype), mask, *rest


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

        def penalty(num_probes: int) -> Tensor:
            _require_memory(params)
            which = (equations.num_groups, equations.variant, backend)
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
        zs = _where(rows.present, x)
        cells, backend = marked(BlockInfo.exact(zs, 0), rows.present), "reference"

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
        z = _where(_any(rows.present), z, torch.nan)
        fuse = BlockInfo.exact(z, equations.closed_form.nfe)
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
        some = {"z0": _at(start, own), "present": _at(present, own), **settings(equations, how)}
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
    step_own = equations.cells_map(x[own], _at(present, own)) if own else None

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
    absent_are_zero = _where(rows.present, work)
    cells = {
        i: given.GivenCell(i, module, x[i], _at(rows.present, i), rows.joint)
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

    z = _where(_any(rows.present), z, torch.nan)

    def info() -> SolveInfo:
        with torch.no_grad():
            fuse = last_step(before[0], z, how.solver, steps)
            of_cells = marked(last_step(before[1], zs, how.solver, steps), rows.present)
        blocks, at = [], zs.detach()
        if cells:
            own = functools.partial(equations.solved_own, x=x, present=rows.present)
            for i, z_i in enumerate(at):
                given_map = cells[i].measured(z_i) if i in cells else None
                blocks.append(given_map or functools.partial(own, i, z=z_i))
        elif equations.cells:
            count = _elements(zs, rows.present)
            blocks.append(lambda: SolvedMap(step_cells, at, None, count))
        if equations.closed_form is None:
            blocks.append(lambda: SolvedMap(step, z.detach()))
        return SolveInfo(fuse, of_cells, "reference", tuple(blocks))

    return Found(z.clone(), lambda: zs, info)


def _require_memory(params: list[Tensor]) -> None:
    """Behind the forward of a module sharded by FSDP2 its parameters are there without memory."""
    first = params[0]
    if traced(first) or in_transform() or first.numel() == 0:
        return
    if first.untyped_storage().size() == 0:
        raise RuntimeError(
            "info: expected the layer's parameters, got their memory freed, as FSDP2 does behind "
            "the forward of a module. Remedy: fully_shard(layer, reshard_after_forward=False), or "
            "measure in the forward of the module that is sharded as one"
        )


def _where(present: Tensor | None, t: Tensor, rest: float = 0.0) -> Tensor:
    return t if present is None else torch.where(present, t, rest)


def _at(t: Tensor | None, which: Any) -> Tensor | None:
    """Of something for each modality that of some of them."""
    return None if t is None else t[which]


def _any(present: Tensor | None) -> Tensor | None:
    """(B, 1) bool, whether a row has anything."""
    return None if present is None else present.any(0)


def _elements(z: Tensor, present: Tensor | None) -> Tensor | int:
    """How many numbers of z (N, B, d) belong to what is present."""
    return z.numel() if present is None else present.sum() * z.shape[-1]


def settings(equations: Equations, how: How) -> dict[str, Any]:
    return {"num_groups": equations.num_groups, "variant": equations.variant, **how._asdict()}
