"""Gradients of the cpu backend: adjoints of blocks and of the layer, and the Jacobian penalty."""

from __future__ import annotations

from torch import Tensor

from deqfuse.backends import cpu_native
from deqfuse.backends.arguments import adjoint_numbers
from deqfuse.backends.maps import Variant
from deqfuse.backends.problem import LayerStatistics, Statistics
from deqfuse.solvers.options import GradientOption


def adjoint_cells(
    grad_z: Tensor,  # (N, B, d)
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], Statistics]:
    """Gradients through the cells' equilibria: dx, the parameters', the statistics."""
    dx, grads, *statistics = cpu_native.adjoint_cells(
        grad_z, z, x, flat_params, want_params,
        num_groups, variant.skip, *adjoint_numbers(adjoint),
    )  # fmt: skip
    return dx, grads, Statistics(*statistics)


def adjoint_fuse(
    grad_z: Tensor,  # (B, d)
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Statistics]:
    """Gradients through the fuse equilibrium: dx_fuse, dcell_sum, parameters', statistics."""
    dx, dcell_sum, grads, *statistics = cpu_native.adjoint_fuse(
        grad_z, z, x_fuse, cell_sum, flat_params, want_params, mask,
        num_modalities, num_groups, variant.relu_last, *adjoint_numbers(adjoint),
    )  # fmt: skip
    return dx, dcell_sum, grads, Statistics(*statistics)


def adjoint_layer(
    grad_z: Tensor,  # (B, d)
    grad_cells: Tensor | None,  # (N, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """Gradients through the whole layer in one call: dx, the parameters', the statistics."""
    operands = grad_z, grad_cells, states, x, flat_params, mask
    return adjoint_present(*operands, None, num_groups, variant, adjoint, want_params)


def adjoint_present(
    grad_z: Tensor,  # (B, d)
    grad_cells: Tensor | None,  # (N, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1), bool
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """As :func:`adjoint_layer`, of what is present."""
    dx, grads, *statistics = cpu_native.adjoint_layer(
        grad_z, grad_cells, states, x, flat_params, want_params, mask,
        None if present is None else present.contiguous(),
        num_groups, variant.skip, variant.relu_last, *adjoint_numbers(adjoint),
    )  # fmt: skip
    return dx, grads, LayerStatistics(*statistics)


def penalty_layer(
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The Jacobian penalty, as :func:`deqfuse.backends.penalty.penalty_layer`, in one call."""
    operands = probes, states, x, flat_params, mask
    return penalty_present(*operands, None, num_groups, variant, want_params)


def penalty_present(
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1), bool
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As :func:`penalty_layer`, of what is present."""
    return cpu_native.penalty_layer(
        probes, states, x, flat_params, want_params, mask,
        None if present is None else present.contiguous(),
        num_groups, variant.skip, variant.relu_last,
    )  # fmt: skip
