"""The layer's Jacobian penalty on NVIDIA GPUs: Triton's step kernels, and torch's products.

As the adjoint's last VJP: products with the weights are in the kernels, weights' gradients are
torch's own. They follow torch's switch for TF32, as nothing here is iterated to a tolerance. Groups
that no step kernel takes are computed in plain PyTorch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deqfuse.backends import penalty
from deqfuse.backends.arguments import aligned, aligned_all
from deqfuse.backends.maps import Variant
from deqfuse.backends.presence import only


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
    """As :func:`deqfuse.backends.penalty.penalty_layer`; nothing synchronises with the host."""
    from deqfuse.triton_kernels import tiles

    operands = (x, flat_params, mask, num_groups, variant, want_params)
    if not tiles.fits_steps(states.shape[-1], num_groups):
        return penalty.penalty_layer(probes, states, *operands)
    with torch.cuda.device_of(states):
        return penalty.join(
            _cells, _fuse, aligned(probes), aligned(states), *operands
        )  # fmt: skip


def penalty_present(
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor,  # (N, B, 1)
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """:func:`penalty_layer` over what is present; None where no step kernel takes the groups.

    A probe of zeros has the penalty 0 and no gradient, so what is absent gets that.
    """
    from deqfuse.triton_kernels import tiles

    if not tiles.fits_steps(states.shape[-1], num_groups):
        return None
    counts = present.sum(0, dtype=states.dtype)
    there = torch.cat([present, counts[None] > 0])
    with torch.cuda.device_of(states):
        value, dx, grads = penalty.join(
            _cells, functools.partial(_fuse, counts=counts[:, 0]),
            torch.where(there, probes, 0.0), torch.where(there, states, 0.0), only(x, present),
            flat_params, mask, num_groups, variant, want_params,
        )  # fmt: skip
    return value, only(dx, present), grads


def _cells(
    probes: Tensor,  # (K, N, B, d)
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The cells' part, as ``penalty.join`` asks for it."""
    from deqfuse.triton_kernels import cell, cell_penalty

    packed = cell.pack_cells(flat_params)
    given = cell_penalty.residual_cell_penalty(
        probes, z, x, packed, num_groups, variant.skip, want_params
    )
    return given.value, given.dx, cell.flat_gradients(given.weight1, given.weight2, given.vectors)


def _fuse(
    probes: Tensor,  # (K, B, d)
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    want_params: bool,
    counts: Tensor | None = None,  # (B,), compute dtype; rows' own numbers of modalities
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The fuse step's part, as ``penalty.join`` asks for it."""
    from deqfuse.triton_kernels import fuse_penalty

    given = fuse_penalty.purify_combine_penalty(
        probes, z, x_fuse, cell_sum, aligned(mask),
        num_modalities, aligned_all(flat_params), num_groups, variant.relu_last, want_params,
        counts,
    )  # fmt: skip
    return given.value, given.dx_fuse, given.params or []
