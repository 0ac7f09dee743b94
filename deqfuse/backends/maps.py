"""The equations of the layer, one step each, in plain PyTorch. All rows at once, no state.

This file is the statement that every fused kernel is checked against. Shapes: ``d`` features, ``N``
modalities, ``B`` rows; cell parameters carry a leading modality dimension. Equation numbers are
those of arXiv 2306.16645.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

GROUP_NORM_EPS = 1e-5


class Variant(NamedTuple):
    """In what the authors' code differs from their paper.

    Attributes:
        skip: ``+ z_i`` before a cell's last relu.
        relu_last: the combination ends in ``relu(GN(e))`` instead of ``GN(relu(e))``.
        bias: a scalar bias on x_f.
    """

    skip: bool
    relu_last: bool
    bias: bool


VariantName = Literal["paper", "released", "released-mmimdb"]
PAPER = Variant(skip=False, relu_last=False, bias=False)
VARIANTS: dict[VariantName, Variant] = {
    "paper": PAPER,
    "released": Variant(skip=True, relu_last=False, bias=True),
    "released-mmimdb": Variant(skip=True, relu_last=True, bias=True),
}


class CellParams(NamedTuple):
    """Parameters of N residual cells, in the order in which operators carry them.

    A single cell's are the same ten without the dimension N.

    Attributes:
        linear1_weight: (N, d, d) W1.
        linear1_bias: (N, d) b1.
        linear2_weight: (N, d, d) W2.
        linear2_bias: (N, d) b2.
        norm1_weight: (N, d) of GN1.
        norm1_bias: (N, d) of GN1.
        norm2_weight: (N, d) of GN2.
        norm2_bias: (N, d) of GN2.
        norm3_weight: (N, d) of GN3.
        norm3_bias: (N, d) of GN3.
    """

    linear1_weight: Tensor  # (N, d, d)
    linear1_bias: Tensor  # (N, d)
    linear2_weight: Tensor  # (N, d, d)
    linear2_bias: Tensor  # (N, d)
    norm1_weight: Tensor  # (N, d)
    norm1_bias: Tensor  # (N, d)
    norm2_weight: Tensor  # (N, d)
    norm2_bias: Tensor  # (N, d)
    norm3_weight: Tensor  # (N, d)
    norm3_bias: Tensor  # (N, d)

    @classmethod
    def stack(cls, flat: list[Tensor]) -> CellParams:
        """From ``N * 10`` tensors, cell after cell, as the operators receive them.

        Args:
            flat: N * 10 tensors, (d, d) or (d,) each.

        Returns:
            The ten stacked ones, copies.
        """
        size = len(cls._fields)
        return cls(*(torch.stack(flat[i::size]) for i in range(size)))

    def unstack(self) -> list[Tensor]:
        """The inverse of :meth:`stack`: fresh tensors (d, d) or (d,), cell after cell."""
        return [field[i].clone() for i in range(self.linear1_weight.shape[0]) for field in self]


class FuseParams(NamedTuple):
    """Parameters of the purify-then-combine step. The gate is absent in the "no gate" ablation.

    Attributes:
        gate_weight: (d, d) W_a.
        gate_bias: (d,) b_a.
        fuse_weight: (d, d) W_f.
        fuse_bias: (d,) b_f.
        norm_weight: (d,) of the GroupNorm.
        norm_bias: (d,) of the GroupNorm.
    """

    gate_weight: Tensor  # (d, d)
    gate_bias: Tensor  # (d,)
    fuse_weight: Tensor  # (d, d)
    fuse_bias: Tensor  # (d,)
    norm_weight: Tensor  # (d,)
    norm_bias: Tensor  # (d,)


def normalize(
    y: Tensor,  # (..., d)
    num_groups: int,
) -> tuple[Tensor, Tensor]:  # x_hat (..., d), rstd (..., G, 1)
    """Centre and scale each group of d / G features; two passes, so that no digits cancel.

    Where the variance overflows, rstd is NaN and so is the row: 1 / sqrt(inf) = 0 would make a
    huge input look like none, with a fixed point that is found at once.
    """
    # Not unflatten: under torch.set_default_device Dynamo cannot trace it.
    grouped = y.reshape(*y.shape[:-1], num_groups, y.shape[-1] // num_groups)
    centred = grouped - grouped.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    rstd = (variance + GROUP_NORM_EPS).rsqrt() + (variance - variance)
    return (centred * rstd).flatten(-2), rstd


def group_norm(y: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    """GroupNorm over the last dimension, affine, eps 1e-5."""
    return normalize(y, num_groups)[0] * weight + bias


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, B, d) x (N, d, d) -> (N, B, d): one affine map per modality."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def residual_cell(
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    params: CellParams,
    num_groups: int,
    variant: Variant = PAPER,
) -> Tensor:  # (N, B, d)
    """One step of every residual cell (Eq. 8):

    ``z_i <- GN3(relu(GN2(W2 relu(GN1(W1 z_i + b1)) + b2 + x_i)))``

    ``variant.skip`` adds ``+ z_i`` before the last relu.
    """
    row = lambda t: t[:, None]  # noqa: E731 - (N, d) -> (N, 1, d)
    y = linear(z, params.linear1_weight, params.linear1_bias)
    h = torch.relu(group_norm(y, row(params.norm1_weight), row(params.norm1_bias), num_groups))
    y = linear(h, params.linear2_weight, params.linear2_bias) + x
    y = group_norm(y, row(params.norm2_weight), row(params.norm2_bias), num_groups)
    if variant.skip:
        y = y + z
    return group_norm(torch.relu(y), row(params.norm3_weight), row(params.norm3_bias), num_groups)


def gate_constant(
    cell_sum: Tensor,  # (B, d)
    num_modalities: int | Tensor,  # or (B, 1), row by row
    params: FuseParams,
) -> Tensor:  # (B, d)
    """The part of the collapsed gate that does not depend on z_f: ``W_a S + N b_a``."""
    return torch.addmm(num_modalities * params.gate_bias, cell_sum, params.gate_weight.mT)


def gate_sum(
    z: Tensor,  # (B, d)
    constant: Tensor,  # (B, d), from gate_constant
    num_modalities: int | Tensor,  # or (B, 1), row by row
    params: FuseParams,
) -> Tensor:  # (B, d)
    """The sum of all gates, collapsed: ``sum_i a_i = W_a (N z_f + S) + N b_a``."""
    if isinstance(num_modalities, Tensor):
        return constant + num_modalities * (z @ params.gate_weight.mT)
    return torch.addmm(constant, z, params.gate_weight.mT, alpha=num_modalities)


def purify_combine(
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    constant: Tensor,  # (B, d), from gate_constant
    mask: Tensor | None,  # (B, d), dropout
    num_modalities: int | Tensor,  # or (B, 1), row by row
    params: FuseParams,
    num_groups: int,
    variant: Variant = PAPER,
) -> Tensor:  # (B, d)
    """One step of the soft gate and the combination (Eqs. 9-12), with the gate collapsed:

    ``sum_i a_i * z_f = z_f * (W_a (N z_f + S) + N b_a)``,   ``S = sum_i z_i``

    ``z_f <- GN(relu(W_f sum_i (a_i * z_f) + b_f + x_f))``; :func:`output_norm` has the last step.
    """
    gate = gate_sum(z, constant, num_modalities, params)
    combined = torch.addmm(params.fuse_bias, z * gate, params.fuse_weight.mT)
    if mask is not None:
        combined = combined * mask
    return output_norm(combined + x_fuse, params.norm_weight, params.norm_bias, num_groups, variant)


def output_norm(
    e: Tensor, weight: Tensor, bias: Tensor, num_groups: int, variant: Variant
) -> Tensor:
    """``GN(relu(e))``, or ``relu(GN(e))`` with ``variant.relu_last``."""
    if variant.relu_last:
        return torch.relu(group_norm(e, weight, bias, num_groups))
    return group_norm(torch.relu(e), weight, bias, num_groups)
