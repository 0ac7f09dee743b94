"""What ``DEQFusion`` solves, with the parameters of one call: maps of rows, and of their Jacobians.

Where ``present`` (N, B, 1), bool, is given, rows lack modalities: sums run over what is present,
and what stands in the place of the rest is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deqfuse.backends import maps
from deqfuse.backends.layer import fuse_injection
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import VARIANTS, CellParams, FuseParams, VariantName
from deqfuse.backends.problem import compute_dtype
from deqfuse.nn import given
from deqfuse.result import SolvedMap
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
            return given.inject(self.injection, where(present, x), joint)
        if self.weights is None:
            return None
        return fuse_injection(where(present, x), self.weights, self.bias)

    @property
    def own(self) -> list[int]:
        """The modalities with a cell of the layer's own, where some are given."""
        return [i for i in range(self.num_modalities) if i not in self.given]

    def solved_own(self, i: int, x: Tensor, z: Tensor, present: Tensor | None) -> SolvedMap:
        """The layer's own cell of modality i at its equilibrium z (B, d), as one of them."""
        k, size, at = self.own.index(i), len(CellParams._fields), slice(i, i + 1)
        alone = self._replace(cells=self.cells[size * k : size * (k + 1)])
        return alone.solved_cells(x[at], z[None], of_some(present, at))

    def cells_map(self, x: Tensor, present: Tensor | None) -> Callable[[Tensor], Tensor]:
        """One step of the cells in the compute dtype, x (N, B, d); absent ones stay zero."""
        x, *rest = self._of_cells(where(present, x))
        return lambda z: where(present, maps.residual_cell(z, x, *rest))

    def solved_cells(self, x: Tensor, z: Tensor, present: Tensor | None) -> SolvedMap:
        """The cells at their equilibria z (N, B, d), for Jacobian measurements."""

        @torch.no_grad()
        def linearize() -> Callable[[Tensor], Tensor]:
            vjp = CellLinearization(z, *self._of_cells(where(present, x))).vjp
            return lambda u: where(present, vjp(u))

        return SolvedMap(self.cells_map(x, present), z, linearize, elements(z, present))

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
        require_memory(self.cells)
        dtype = compute_dtype(x.dtype)
        params = CellParams.stack([t.to(dtype) for t in self.cells])
        return x.to(dtype), params, self.num_groups, VARIANTS[self.variant]

    def _of_fuse(
        self, x_fuse: Tensor, cell_sum: Tensor, mask: Tensor | None, counts: Tensor | None
    ) -> tuple[Any, ...]:
        """What the combination's linearisation takes behind z, in the compute dtype."""
        require_memory(self.fuse)
        dtype = compute_dtype(x_fuse.dtype)
        n = self.num_modalities if counts is None else counts
        params = FuseParams(*(t.to(dtype) for t in self.fuse))
        rest = (n, params, self.num_groups, VARIANTS[self.variant])
        return x_fuse.to(dtype), cell_sum.to(dtype), mask, *rest


def require_memory(params: list[Tensor]) -> None:
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


def where(present: Tensor | None, t: Tensor, rest: float = 0.0) -> Tensor:
    return t if present is None else torch.where(present, t, rest)


def of_some(t: Tensor | None, which: Any) -> Tensor | None:
    """Of something for each modality that of some of them."""
    return None if t is None else t[which]


def any_present(present: Tensor | None) -> Tensor | None:
    """(B, 1) bool, whether a row has anything."""
    return None if present is None else present.any(0)


def elements(z: Tensor, present: Tensor | None) -> Tensor | int:
    """How many numbers of z (N, B, d) belong to what is present."""
    return z.numel() if present is None else present.sum() * z.shape[-1]
