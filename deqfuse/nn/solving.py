"""From injections to the answer: the ways in which ``DEQFusion`` gets there.

One operator for the whole layer; block by block, for the ablations and ``Unrolled()``; or a fixed
number of steps. Values in, values out: the layer hands over its parameters as :class:`Equations`.
Injections come as N tensors (B, d), or as one (N, B, d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import functional, layer
from deqfuse.backends import BackendName, maps
from deqfuse.backends.layer import fuse_injection
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams, VariantName
from deqfuse.backends.problem import compute_dtype
from deqfuse.reporting import OnFailure
from deqfuse.result import BlockInfo, SolvedMap, SolveInfo
from deqfuse.solvers.options import GradientOption, SolverOption, Unrolled
from deqfuse.solvers.rows import Rows


class ClosedForm(NamedTuple):
    """A combination that needs no solve."""

    evaluate: Callable[..., Tensor]  # z (B, d), cells (N, B, d), x_f (B, d) or None, mask -> (B, d)
    nfe: int


class Equations(NamedTuple):
    """What is to be solved, with the parameters of one call."""

    cells: list[Tensor]  # ten for each of the N cells; none where z_i* = x_i
    fuse: list[Tensor]  # six; none where the combination is in closed form
    weights: Tensor | None  # (N,) of the injection x_f; None where nothing uses it
    bias: Tensor | None  # (1,) of x_f
    closed_form: ClosedForm | None
    num_modalities: int
    num_groups: int
    variant: VariantName

    def x_fuse(self, x: Tensor) -> Tensor | None:
        """Injection of the combination from all x (N, B, d): (B, d)."""
        return None if self.weights is None else fuse_injection(x, self.weights, self.bias)

    def cells_map(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """One step of the cells in the compute dtype, x (N, B, d)."""
        x, *rest = self._of_cells(x)
        return lambda z: maps.residual_cell(z, x, *rest)

    def solved_cells(self, x: Tensor, z: Tensor) -> SolvedMap:
        """The cells at their equilibria z (N, B, d), for Jacobian measurements."""
        linearize = lambda: CellLinearization(z, *self._of_cells(x)).vjp  # noqa: E731
        return SolvedMap(self.cells_map(x), z, torch.no_grad()(linearize))

    def fuse_map(
        self, x_fuse: Tensor, cell_sum: Tensor, mask: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """One step of the combination in the compute dtype, all operands (B, d)."""
        x_fuse, cell_sum, mask, n, params, *rest = self._of_fuse(x_fuse, cell_sum, mask)
        constant = maps.gate_constant(cell_sum, n, params)
        return lambda z: maps.purify_combine(z, x_fuse, constant, mask, n, params, *rest)

    def solved_fuse(
        self, x_fuse: Tensor, cell_sum: Tensor, mask: Tensor | None, z: Tensor
    ) -> SolvedMap:
        """The combination at its equilibrium z (B, d), for Jacobian measurements."""
        operands = x_fuse, cell_sum, mask
        linearize = lambda: FuseLinearization(z, *self._of_fuse(*operands)).vjp  # noqa: E731
        return SolvedMap(self.fuse_map(*operands), z, torch.no_grad()(linearize))

    def _of_cells(self, x: Tensor) -> tuple[Any, ...]:
        """What the cells' map takes behind z, in the compute dtype."""
        dtype = compute_dtype(x.dtype)
        params = CellParams.stack([t.to(dtype) for t in self.cells])
        return x.to(dtype), params, self.num_groups, VARIANTS[self.variant]

    def _of_fuse(self, x_fuse: Tensor, cell_sum: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        """What the combination's linearisation takes behind z, in the compute dtype."""
        dtype, n = compute_dtype(x_fuse.dtype), self.num_modalities
        params = FuseParams(*(t.to(dtype) for t in self.fuse))
        rest = (n, params, self.num_groups, VARIANTS[self.variant])
        return x_fuse.to(dtype), cell_sum.to(dtype), mask, *rest


class How(NamedTuple):
    """How to solve and to differentiate."""

    solver: SolverOption
    adjoint: GradientOption
    on_failure: OnFailure
    backend: BackendName


class Found(NamedTuple):
    """A solve; what few callers ask for is made when they do."""

    z: Tensor  # (B, d), for the caller to keep
    cells: Callable[[], Tensor]  # (N, B, d)
    info: Callable[[], SolveInfo]


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
    mask: Tensor | None,  # (B, d)
    start_fuse: Tensor | None,  # (B, d)
    start_cells: Tensor | None,  # (N, B, d)
) -> Found:
    """The joint equilibrium: in one operator where that solves these equations."""
    whole = equations.cells and equations.fuse and not isinstance(how.adjoint, Unrolled)
    solve = _whole_layer if whole else _block_by_block
    return solve(equations, how, xs, mask, start_fuse, start_cells)


def _whole_layer(
    equations: Equations,
    how: How,
    xs: list[Tensor],
    mask: Tensor | None,
    start_fuse: Tensor | None,
    start_cells: Tensor | None,
) -> Found:
    """All equations of the paper and an implicit gradient: one operator."""
    joint = [equations.weights, equations.bias]
    params = [*equations.cells, *equations.fuse, *(t for t in joint if t is not None)]
    solved, backend = layer.solve_layer(
        xs, params, mask, start_fuse, start_cells, **_options(equations, how)
    )

    def info() -> SolveInfo:
        states = solved.states.detach()

        def block(at: Any) -> BlockInfo:
            trace = solved.trace[:, at] if how.solver.trace else None
            return BlockInfo(solved.residual[at], solved.nfe[at], solved.outcome[at], trace)

        def cells() -> SolvedMap:  # stacked when asked for: the penalty does without
            return equations.solved_cells(torch.stack(xs), states[:-1])

        def fuse() -> SolvedMap:
            x_fuse = equations.x_fuse(torch.stack(xs))
            assert x_fuse is not None
            return equations.solved_fuse(x_fuse, states[:-1].sum(0), mask, states[-1])

        def penalty(num_probes: int) -> Tensor:
            which = (equations.num_groups, equations.variant, backend)
            return layer.layer_penalty(xs, params, mask, states, num_probes, *which)

        return SolveInfo(block(-1), block(slice(None, -1)), backend, (cells, fuse), penalty)

    return Found(solved.z, lambda: solved.states[:-1], info)


def _block_by_block(
    equations: Equations,
    how: How,
    xs: list[Tensor],
    mask: Tensor | None,
    start_fuse: Tensor | None,
    start_cells: Tensor | None,
) -> Found:
    """The cells first; for the ablations, and for gradients through the steps."""
    x, options = torch.stack(xs), _options(equations, how)
    blocks = []
    if equations.cells:
        zs, cells, backend = functional.solve_cells(x, equations.cells, z0=start_cells, **options)
        blocks.append(lambda: equations.solved_cells(x, zs.detach()))
    else:
        zs, cells, backend = x, BlockInfo.exact(x, 0), "reference"

    x_fuse = equations.x_fuse(x)
    if equations.closed_form is None:
        assert x_fuse is not None
        cell_sum = zs.sum(0)
        z, fuse, backend = functional.solve_fuse(
            x_fuse,
            cell_sum,
            equations.fuse,
            num_modalities=equations.num_modalities,
            mask=mask,
            z0=start_fuse,
            **options,
        )
        given = x_fuse, cell_sum.detach(), mask
        blocks.append(lambda: equations.solved_fuse(*given, z.detach()))
    else:
        z = equations.closed_form.evaluate(x[0], zs.to(x.dtype), x_fuse, mask)
        fuse = BlockInfo.exact(z, equations.closed_form.nfe)
    info = SolveInfo(fuse, cells, backend, tuple(blocks))
    # A copy: the backward pass and `info` keep the original, and `z += ...` must be possible.
    return Found(z.clone(), lambda: zs, lambda: info)


def weight_tied(
    equations: Equations,
    how: How,
    x: Tensor,  # (N, B, d)
    mask: Tensor | None,  # (B, d)
    steps: int,
) -> Found:
    """``steps`` steps of every equation from zero; each combination sees that step's cells."""
    work = x.to(compute_dtype(x.dtype))
    z, zs = torch.zeros_like(work[0]), torch.zeros_like(work)
    step_cells = equations.cells_map(x) if equations.cells else (lambda _: work)
    for _ in range(steps):
        before = z, zs
        zs, x_fuse = step_cells(zs), equations.x_fuse(x)
        if equations.closed_form is None:
            assert x_fuse is not None
            step = equations.fuse_map(x_fuse, zs.sum(0), mask)
            z = step(z)
        else:
            z = equations.closed_form.evaluate(z, zs.to(x.dtype), x_fuse, mask)

    def info() -> SolveInfo:
        with torch.no_grad():
            fuse = last_step(before[0], z, how.solver, steps)
            cells = last_step(before[1], zs, how.solver, steps)
        blocks = []
        if equations.cells:
            blocks.append(lambda: SolvedMap(step_cells, zs.detach()))
        if equations.closed_form is None:
            blocks.append(lambda: SolvedMap(step, z.detach()))
        return SolveInfo(fuse, cells, "reference", tuple(blocks))

    return Found(z.clone(), lambda: zs, info)


def last_step(old: Tensor, new: Tensor, solver: SolverOption, steps: int) -> BlockInfo:
    """Residual of the last of some steps; converged only if it happens to meet the tolerance."""
    rows = Rows(old.flatten(0, -2), solver.tol, max_iter=1)
    rows.observe(old.flatten(0, -2), new.flatten(0, -2), cost=steps)
    found, shape = rows.solution(), new.shape[:-1]
    return BlockInfo(found.residual.view(shape), found.nfe.view(shape), found.outcome.view(shape))


def _options(equations: Equations, how: How) -> dict[str, Any]:
    return {"num_groups": equations.num_groups, "variant": equations.variant, **how._asdict()}
