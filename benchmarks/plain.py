"""One evaluation of the joint map in plain PyTorch: what the rivals evaluate.

The equations of arXiv 2306.16645 as the papers and their code write them, on the layer's own
parameters: ``F.linear``, ``F.group_norm`` and ``relu``, one gate per modality, every block from the
old state. Nothing of deqfuse runs in ``joint_map``: no operator, no collapsed gate, no block order.
``cells_step``, ``collapsed_step`` and ``squared_pull`` are for the ``compiled`` variant only, which
has the last two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deqfuse import DEQFusion

Blocks = tuple[Tensor, ...]  # z_1 .. z_N, z_f, each (B, d)


def cell_step(
    z: Tensor,  # (B, d)
    x: Tensor,  # (B, d)
    weights: Sequence[Tensor],  # of one cell, in the order of ``ResidualCell.flat``
    groups: int,
) -> Tensor:  # (B, d)
    """Eq. 8."""
    w1, b1, w2, b2, *norms = weights
    h = F.relu(F.group_norm(F.linear(z, w1, b1), groups, *norms[0:2]))
    h = F.relu(F.group_norm(F.linear(h, w2, b2) + x, groups, *norms[2:4]))
    return F.group_norm(h, groups, *norms[4:6])


def cells_step(
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    weights: Sequence[Sequence[Tensor]],  # of each cell
    groups: int,
) -> Tensor:  # (N, B, d)
    """Eq. 8 of every modality, as one function for a compiler."""
    triples = zip(z.unbind(), x.unbind(), weights, strict=True)
    return torch.stack([cell_step(own_z, own_x, own, groups) for own_z, own_x, own in triples])


def combine_step(
    z: Tensor,  # (B, d)
    cells: Sequence[Tensor],  # N tensors (B, d)
    x_fuse: Tensor,  # (B, d)
    weights: Sequence[Tensor],  # in the order of ``PurifyCombine.flat``
    groups: int,
) -> Tensor:  # (B, d)
    """Eqs. 9-12: N products with W_a. (One call on N B rows is not faster in eager mode.)"""
    gate_weight, gate_bias, fuse_weight, fuse_bias, *norm = weights
    gates = [F.linear(z + own, gate_weight, gate_bias) for own in cells]
    purified = sum((gate * z for gate in gates[1:]), gates[0] * z)
    e = F.linear(purified, fuse_weight, fuse_bias) + x_fuse
    return F.group_norm(F.relu(e), groups, *norm)


def collapsed_step(
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    constant: Tensor,  # (B, d): W_a S + N b_a
    n: int,
    weights: Sequence[Tensor],
    groups: int,
) -> Tensor:  # (B, d)
    """Eqs. 9-12 with deqfuse's collapsed gate, for the compiled variant: one product with W_a."""
    gate_weight, _, fuse_weight, fuse_bias, *norm = weights
    gate = F.linear(n * z, gate_weight) + constant
    e = F.linear(z * gate, fuse_weight, fuse_bias) + x_fuse
    return F.group_norm(F.relu(e), groups, *norm)


def squared_pull(
    f: Callable[..., Tensor],
    v: Tensor,  # like z
    z: Tensor,
    *operands: Any,
) -> Tensor:
    """``|J^T v|^2`` summed up, for the compiled variant: J is that of ``f(z, *operands)`` in z.

    A compiled graph has one backward pass: the product with J^T has to be inside.
    """
    return torch.func.vjp(lambda state: f(state, *operands), z)[1](v)[0].square().sum()


def joint_map(
    layer: DEQFusion,
    features: Sequence[Tensor],  # N tensors (B, d)
) -> tuple[Callable[..., Blocks], Blocks]:
    """The map of Eq. 17, ``step(z_1, .., z_N, z_f)``, and its start, zero.

    ``step(..., seen=cells)`` has the fuse equation see these cells in place of its arguments. With
    equal values that changes no result, and its derivative has the diagonal blocks alone.
    """
    layer_cells, combine = list(layer.cells), layer.combine
    cell_weights = [cell.flat() for cell in layer_cells]
    combine_weights, groups = combine.flat(), layer.num_groups
    x_fuse = sum(w * x for w, x in zip(layer.modality_weights.unbind(), features, strict=True))

    def step(*state: Tensor, seen: Sequence[Tensor] | None = None) -> Blocks:
        *cells, z = state
        triples = zip(cells, features, cell_weights, strict=True)
        new = [cell_step(own, x, weights, groups) for own, x, weights in triples]
        seen = cells if seen is None else seen
        return *new, combine_step(z, seen, x_fuse, combine_weights, groups)

    return step, tuple(torch.zeros_like(x) for x in (*features, x_fuse))


def flat_map(
    layer: DEQFusion,
    features: Sequence[Tensor],  # N tensors (B, d)
) -> tuple[Callable[..., Tensor], Tensor]:
    """The same on one state (B, (N + 1) d); ``seen`` is (B, N d)."""
    step, start = joint_map(layer, features)

    def f(state: Tensor, seen: Tensor | None = None) -> Tensor:
        cells = None if seen is None else seen.split(layer.dim, dim=1)
        return torch.cat(step(*state.split(layer.dim, dim=1), seen=cells), dim=1)

    return f, torch.cat(start, dim=1)
