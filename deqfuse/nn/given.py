"""Cells and an injection of the user's own, in the place of the layer's.

A given cell is any module ``(z, x) -> z``. Nothing is known of it but its values, so it is solved
as ``DEQ(f)`` solves a map, on the rows that have its modality. The layer's own cells beside it keep
their operator, and so does the fuse step: ``solving.py`` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deqfuse import checks, reporting
from deqfuse.backends.problem import compute_dtype
from deqfuse.equilibrium import ITERATES, solve_map, uncompiled
from deqfuse.nn.inspection import refusing_at_first
from deqfuse.outcome import Outcome
from deqfuse.reporting import OnFailure
from deqfuse.result import BlockInfo, SolvedMap
from deqfuse.solvers.options import GradientOption, SolverOption
from deqfuse.torch_private import traced

_NAME = "DEQFusion(cells=...)"
# A decorator: torch.compile runs what solves given cells as it is, and with fullgraph=True says so.
outside_graphs = uncompiled(f"{_NAME} {ITERATES}leave fullgraph out, or weight_tied_steps=k")


# ---- what the layer is given ---------------------------------------------------------------------


def check(
    cells: Any, injection: Any, cell_dims: Any, num_modalities: int, cell: str, combine: str
) -> list[nn.Module | None]:
    """The given cells by modality, None where the layer makes its own; all arguments as given."""
    given = _cells([None] * num_modalities if cells is None else cells, num_modalities)
    any_cell = any(module is not None for module in given)
    if any_cell and (cell != "residual" or combine == "weighted_sum"):
        raise ValueError(
            "cells: expected cell='residual', whose cells they replace, and a combination that "
            f"has cells, got cell={cell!r} with combine={combine!r}"
        )
    if not isinstance(injection, (nn.Module, type(None))):
        raise TypeError(
            "injection: expected a torch.nn.Module that maps the list of injections to x_f, got "
            f"{type(injection).__name__}. Remedy: a module whose forward calls it"
        )
    if injection is not None and combine != "purify":
        raise ValueError(
            f"injection: expected combine='purify', which has an x_f to replace, got {combine!r}"
        )
    checks.positive_int("cell_dims", cell_dims)
    if cell_dims != 1 and not any_cell and injection is None:
        raise ValueError(
            f"cell_dims: expected cells= or injection= beside it, which it is for, got {cell_dims}"
        )
    return given


def _cells(cells: Any, num_modalities: int) -> list[nn.Module | None]:
    if isinstance(cells, str):
        raise TypeError(f"cells: expected a sequence of modules and None, got {cells!r}")
    if not isinstance(cells, nn.ModuleList):
        checks.sequence("cells", cells, "modules and None")
    if len(cells) != num_modalities:
        raise ValueError(
            f"cells: expected num_modalities={num_modalities} entries, modules or None, got "
            f"{len(cells)}"
        )
    given = [None if isinstance(c, str) and c == "residual" else c for c in cells]
    for i, module in enumerate(given):
        if not isinstance(module, (nn.Module, type(None))):
            raise TypeError(
                f"cells[{i}]: expected a torch.nn.Module that maps (z, x) to z, or None for the "
                f"layer's own cell, got {type(module).__name__}. Remedy: a module whose forward "
                "calls it; its parameters are then the layer's"
            )
    return given


def split(
    modules: Mapping[str, Any], which: tuple[int, ...]
) -> tuple[Mapping[str, Any], dict[int, nn.Module]]:
    """The cells of a layer by name: its own, and by modality the given ones."""
    if not which:
        return modules, {}
    own = {name: cell for name, cell in modules.items() if int(name) not in which}
    return own, {i: modules[str(i)] for i in which}


def positions(lead: torch.Size, cell_dims: int) -> tuple[int, ...]:
    """Those of the leading dimensions that a given module sees jointly: () or (T,) or more."""
    if len(lead) < cell_dims - 1:
        raise ValueError(
            f"features: expected at least cell_dims={cell_dims} dimensions, the last ones what a "
            f"given cell sees at once, got {len(lead) + 1}"
        )
    return tuple(lead[len(lead) - cell_dims + 1 :])


def reset(module: nn.Module) -> None:
    """Draws parameters anew: by the module's own ``reset_parameters``, or by those of its parts."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
        return
    for part in module.children():
        reset(part)


def inject(
    module: nn.Module,
    x: Tensor,  # (N, B, d)
    joint: tuple[int, ...],
) -> Tensor:  # (B, d)
    """``x_f`` from all injections, by a given module, in the compute dtype."""
    shape = _rows(x[0], joint)
    x_fuse = module([x_i.reshape(shape) for x_i in x])
    checks.tensor("injection(xs)", x_fuse, like=x)
    checks.shape("injection(xs)", x_fuse, shape, "the shape of each of xs")
    return x_fuse.reshape(x.shape[1:]).to(compute_dtype(x.dtype))


def _rows(x: Tensor, joint: tuple[int, ...]) -> tuple[int, ...]:
    """Shape (R, d) or (R, T, d) in which a given module gets x (B, d)."""
    return (len(x) // max(1, math.prod(joint)), *joint, x.shape[1])


def refuse_export(x: Tensor) -> None:
    """What records a call without its values cannot hold a solver of given cells."""
    if traced(x):
        raise NotImplementedError(
            f"deqfuse: {_NAME} under torch.export, or on meta and fake tensors, is not supported: "
            "the solver of given cells iterates until every row has converged, and such tensors "
            "have no values to look at. Remedy: weight_tied_steps=k, or the layer's own cells"
        )


# ---- their equilibria ----------------------------------------------------------------------------


class SolvedCell(NamedTuple):
    """What a solve of one given cell found."""

    z: Tensor  # (B, d), in the compute dtype
    info: BlockInfo  # (B,)
    backend: str
    block: Callable[[], SolvedMap]


class GivenCell:
    """One given cell on the injections of one call.

    Its problem is one row (d,) of the layer's, or with ``cell_dims=2`` a sample's rows (T, d) at
    once: R problems of n numbers, without those that lack the modality. The module never sees
    these: what stands in an absent feature reaches nothing, whatever the module does with it.

    Args:
        index: which modality.
        module: the cell.
        x: (B, d) its injections.
        present: (B, 1) bool, or None for all.
        joint: dimensions that the cell sees jointly, () or (T,) or more.

    Raises:
        ValueError: a sample of which some positions are present and some are not.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        x: Tensor,
        present: Tensor | None,
        joint: tuple[int, ...],
    ) -> None:
        self.name, self.module = f"cells[{index}]", module
        shape = _rows(x, joint)
        self.all, self.each, self.width = shape[0], math.prod(joint), x.shape[1]
        self.x, self.where = x.reshape(shape), None
        if present is not None:
            if torch.compiler.is_exporting() or x.is_meta:
                raise NotImplementedError(
                    f"deqfuse: {_NAME} with present= under torch.export, or on meta tensors, is "
                    "not supported: how many rows a given cell gets depends on values. Remedy: "
                    "the layer's own cells"
                )
            some = present.reshape(self.all, self.each)
            whole = some.all(1)
            if joint and (partly := some.any(1) & ~whole).any():
                raise ValueError(
                    f"present: expected {self.name} to have all of a sample's {shape[1:-1]} "
                    f"positions or none, as it sees them jointly, got some in {int(partly.sum())} "
                    f"of {self.all} samples. Remedy: the modality present in the whole sample, and "
                    "a cell that leaves padded positions out itself"
                )
            self.where = torch.nonzero(whole).flatten()
            self.x = self.x.index_select(0, self.where)

    def step(self, z: Tensor) -> Tensor:
        """One step of the cell, (R, n) to (R, n), on a copy: it may work in place."""
        out = self.module(z.to(self.x.dtype, copy=True).reshape(self.x.shape), self.x)
        checks.tensor(f"{self.name}(z, x)", out, like=self.x)
        checks.shape(f"{self.name}(z, x)", out, tuple(self.x.shape), "the shape of z and of x")
        return out.flatten(1).to(z.dtype)

    def on_rows(self, z: Tensor) -> Tensor:
        """One step of all rows, z in any shape of (B, d); absent ones are zero."""
        return self._spread(self.step(self._pick(z))).reshape(z.shape)

    def solve(
        self,
        start: Tensor | None,  # (B, d)
        solver: SolverOption,
        adjoint: GradientOption,
        on_failure: OnFailure,
    ) -> SolvedCell:
        """The equilibria of all rows, with the gradient of the implicit function theorem."""
        step = self.step
        if len(self.x) > 1:  # a single one has no other whose statistics it could take
            step = refusing_at_first(
                step,
                lambda: [self.module],
                self.name,
                "eval() for this module, LayerNorm or GroupNorm",
            )
        x = self.x.detach().flatten(1)
        z0 = torch.zeros_like(x) if start is None else self._pick(start).to(x.dtype)
        what = f"{self.name} ({type(self.module).__name__})"
        remedy = f"cell_dims={self.x.dim()} where they are positions of one sample"
        parts = (reporting.Part(what, ..., remedy),)
        z, info, backend = solve_map(step, z0, _NAME, parts, solver, adjoint, on_failure)
        z = self._spread(z.to(compute_dtype(x.dtype)))
        return SolvedCell(
            z.reshape(-1, self.width), self._of_rows(info), backend, self.measured(z.detach())
        )

    def measured(self, z: Tensor) -> Callable[[], SolvedMap]:
        """The cell at its equilibria, z in any shape of (B, d), for Jacobian measurements."""
        problems = z.reshape(self.all, self.each * self.width)
        count = None if self.where is None else self.x.numel()
        return lambda: SolvedMap(self.on_rows, problems, None, count, self.each)

    def _pick(self, t: Tensor) -> Tensor:
        """The numbers (R, n) of what is present, from (B, d)."""
        t = t.reshape(self.all, self.each * self.width)
        return t if self.where is None else t.index_select(0, self.where)

    def _spread(self, t: Tensor, rest: float = 0.0) -> Tensor:
        """(R, ...) among all problems; ``rest`` for those that lack the modality."""
        if self.where is None:
            return t
        return t.new_full((self.all, *t.shape[1:]), rest).index_copy(0, self.where, t)

    def _of_rows(self, info: BlockInfo) -> BlockInfo:
        """Statistics of problems (R,) as those of the layer's rows (B,)."""

        def rows(t: Tensor, rest: float = 0.0) -> Tensor:
            return self._spread(t, rest).repeat_interleave(self.each, 0)

        trace = None if info.trace is None else rows(info.trace.mT, torch.nan).mT
        outcome = rows(info.outcome, int(Outcome.ABSENT))
        return BlockInfo(rows(info.residual), rows(info.nfe), outcome, trace)


def solve(
    modules: Mapping[int, nn.Module],
    x: Tensor,  # (N, B, d)
    present: Tensor | None,  # (N, B, 1)
    joint: tuple[int, ...],
    start: Tensor | None,  # (N, B, d)
    solver: SolverOption,
    adjoint: GradientOption,
    on_failure: OnFailure,
) -> dict[int, SolvedCell]:
    """Equilibria of the given cells, by modality.

    Args:
        modules: the given cells, by modality.
        x: (N, B, d) all injections.
        present: (N, B, 1) bool, or None.
        joint: dimensions that a cell sees jointly.
        start: (N, B, d), or None for zero.
        solver, adjoint, on_failure: as for ``functional.fixed_point``.

    Raises:
        NotImplementedError: inside transforms of ``torch.func``.
        ConvergenceError: rows failed and ``on_failure="raise"``.
    """
    found = {}
    for i, module in modules.items():
        here = None if present is None else present[i]
        own = None if start is None else start[i]
        cell = GivenCell(i, module, x[i], here, joint)
        found[i] = cell.solve(own, solver, adjoint, on_failure)
    return found
