"""The two maps of the layer on rows (R, d), as the solvers of any map take them."""

from __future__ import annotations

from torch import Tensor

from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import (
    CellParams,
    FuseParams,
    Variant,
    gate_constant,
    purify_combine,
    residual_cell,
)
from deqfuse.solvers.derivatives import Linearize, Map


def cells_on_rows(
    x: Tensor, flat_params: list[Tensor], num_groups: int, variant: Variant
) -> tuple[Map, Linearize]:
    """The cells' map on rows (N * B, d) and its JVPs, everything in the compute dtype."""
    params, shape = CellParams.stack(flat_params), x.shape

    def step(z: Tensor) -> Tensor:
        return residual_cell(z.view(shape), x, params, num_groups, variant).flatten(0, 1)

    def linearize(z: Tensor) -> Map:
        at = CellLinearization(z.view(shape), x, params, num_groups, variant)
        return lambda v: at.jvp(v.view(shape)).flatten(0, 1)

    return step, linearize


def fuse_on_rows(
    x_fuse: Tensor,
    cell_sum: Tensor,
    flat_params: list[Tensor],
    mask: Tensor | None,
    num_modalities: int,
    num_groups: int,
    variant: Variant,
) -> tuple[Map, Linearize]:
    """The fuse map on rows (B, d) and its JVPs, everything in the compute dtype."""
    params = FuseParams(*flat_params)
    constant = gate_constant(cell_sum, num_modalities, params)
    rest = (num_modalities, params, num_groups, variant)

    def step(z: Tensor) -> Tensor:
        return purify_combine(z, x_fuse, constant, mask, *rest)

    def linearize(z: Tensor) -> Map:
        return FuseLinearization(z, x_fuse, cell_sum, mask, *rest).jvp

    return step, linearize
