"""The two maps linearised at a point: J v, J^T u, and the VJP for parameters and inputs.

At the equilibrium the Jacobian is constant. One evaluation saves the normalised values, the inverse
standard deviations and the relu signs; after that a product with J or J^T costs two matrix products
and a few element-wise passes, as often as needed, without a graph. GroupNorm's Jacobian is
``diag(gamma) S`` with the symmetric ``S t = rstd (t - mean(t) - x_hat mean(t x_hat))`` per group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfuse.backends.maps import (
    CellParams,
    FuseParams,
    Variant,
    gate_constant,
    gate_sum,
    linear,
    normalize,
)


class _Norm:
    """GroupNorm at a fixed input: value, and products with S."""

    def __init__(self, y: Tensor, num_groups: int) -> None:
        self.x_hat, self.rstd = normalize(y, num_groups)
        self.num_groups = num_groups

    def symmetric(self, t: Tensor) -> Tensor:
        """``S t``, which serves both directions."""
        shape = (self.num_groups, t.shape[-1] // self.num_groups)
        t_, x_ = t.unflatten(-1, shape), self.x_hat.unflatten(-1, shape)
        out = t_ - t_.mean(-1, keepdim=True) - x_ * (t_ * x_).mean(-1, keepdim=True)
        return (self.rstd * out).flatten(-2)

    def slope(self, t: Tensor, s: Tensor, s_pulled: Tensor) -> tuple[Tensor, Tensor]:
        """``S t`` and the gradient of ``<t, S s>`` with respect to the norm's input.

        Args:
            t, s: (..., d).
            s_pulled: (..., d) ``S s``; it may be zero where t is, where only these entries of the
                gradient are wanted.

        The gradient is ``-rstd (x_hat mean(t S s) + mean(s x_hat) S t + mean(t x_hat) S s)``.
        """
        shape = (self.num_groups, t.shape[-1] // self.num_groups)
        x_ = self.x_hat.unflatten(-1, shape)
        mean = lambda a, b: (a.unflatten(-1, shape) * b).mean(-1, keepdim=True)  # noqa: E731
        t_pulled = self.symmetric(t)
        pulled = [a.unflatten(-1, shape) for a in (t_pulled, s_pulled)]
        out = x_ * mean(t, pulled[1]) + mean(s, x_) * pulled[0] + mean(t, x_) * pulled[1]
        return t_pulled, (-self.rstd * out).flatten(-2)


class CellLinearization:
    """N residual cells linearised at z (N, B, d)."""

    def __init__(
        self, z: Tensor, x: Tensor, params: CellParams, num_groups: int, variant: Variant
    ) -> None:
        self.z, self.params, self.skip = z, params, variant.skip
        self.gamma1, self.gamma2, self.gamma3 = (
            g[:, None] for g in (params.norm1_weight, params.norm2_weight, params.norm3_weight)
        )
        self.norm1 = _Norm(linear(z, params.linear1_weight, params.linear1_bias), num_groups)
        self.h = torch.relu(self.norm1.x_hat * self.gamma1 + params.norm1_bias[:, None])
        y = linear(self.h, params.linear2_weight, params.linear2_bias) + x
        self.norm2 = _Norm(y, num_groups)
        e = self.norm2.x_hat * self.gamma2 + params.norm2_bias[:, None]
        if self.skip:
            e = e + z
        self.sign1, self.sign2 = self.h > 0, e > 0
        self.norm3 = _Norm(torch.relu(e), num_groups)

    def jvp(self, v: Tensor) -> Tensor:
        """J v for v (N, B, d)."""
        t = self.gamma1 * self.norm1.symmetric(torch.bmm(v, self.params.linear1_weight.mT))
        t = torch.bmm(torch.where(self.sign1, t, 0.0), self.params.linear2_weight.mT)
        t = self.gamma2 * self.norm2.symmetric(t)
        if self.skip:
            t = t + v
        return self.gamma3 * self.norm3.symmetric(torch.where(self.sign2, t, 0.0))

    def pull(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents at GN2's output, W2's output (which is also x's) and W1's output."""
        de = torch.where(self.sign2, self.norm3.symmetric(self.gamma3 * u), 0.0)
        dy2 = self.norm2.symmetric(self.gamma2 * de)
        dn1 = torch.where(self.sign1, torch.bmm(dy2, self.params.linear2_weight), 0.0)
        return de, dy2, dn1

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u for u (N, B, d)."""
        de, _, dn1 = self.pull(u)
        dz = torch.bmm(self.norm1.symmetric(self.gamma1 * dn1), self.params.linear1_weight)
        return dz + de if self.skip else dz

    def vjp_operands(self, u: Tensor, want_params: bool) -> tuple[Tensor, CellParams | None]:
        """Gradients with respect to x (N, B, d) and the parameters.

        Weight gradients are matrix products over all rows.
        """
        de, dy2, dn1 = self.pull(u)
        if not want_params:
            return dy2, None
        dy1 = self.norm1.symmetric(self.gamma1 * dn1)
        return dy2, CellParams(
            linear1_weight=torch.bmm(dy1.mT, self.z),
            linear1_bias=dy1.sum(1),
            linear2_weight=torch.bmm(dy2.mT, self.h),
            linear2_bias=dy2.sum(1),
            norm1_weight=(dn1 * self.norm1.x_hat).sum(1),
            norm1_bias=dn1.sum(1),
            norm2_weight=(de * self.norm2.x_hat).sum(1),
            norm2_bias=de.sum(1),
            norm3_weight=(u * self.norm3.x_hat).sum(1),
            norm3_bias=u.sum(1),
        )


class FuseLinearization:
    """The purify-then-combine step linearised at z (B, d)."""

    def __init__(
        self,
        z: Tensor,
        x_fuse: Tensor,
        cell_sum: Tensor,
        mask: Tensor | None,
        num_modalities: int | Tensor,  # or (B, 1), row by row
        params: FuseParams,
        num_groups: int,
        variant: Variant,
    ) -> None:
        self.z, self.mask, self.n, self.params = z, mask, num_modalities, params
        self.gate_input = num_modalities * z + cell_sum
        constant = gate_constant(cell_sum, num_modalities, params)
        self.gate = gate_sum(z, constant, num_modalities, params)
        self.q = z * self.gate
        e = self.masked(torch.addmm(params.fuse_bias, self.q, params.fuse_weight.mT)) + x_fuse
        self.relu_last = variant.relu_last
        if self.relu_last:
            self.norm = _Norm(e, num_groups)
            self.sign = self.norm.x_hat * params.norm_weight + params.norm_bias > 0
        else:
            self.sign = e > 0
            self.norm = _Norm(torch.relu(e), num_groups)

    def masked(self, t: Tensor) -> Tensor:
        return t if self.mask is None else t * self.mask

    def signed(self, t: Tensor) -> Tensor:
        return torch.where(self.sign, t, 0.0)

    def jvp(self, v: Tensor) -> Tensor:
        """J v for v (B, d)."""
        dq = v * self.gate + self.n * self.z * (v @ self.params.gate_weight.mT)
        t = self.masked(dq @ self.params.fuse_weight.mT)
        if self.relu_last:
            return self.signed(self.params.norm_weight * self.norm.symmetric(t))
        return self.params.norm_weight * self.norm.symmetric(self.signed(t))

    def pull(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents at the norm's affine output, at e (which is also x_fuse's) and at q."""
        if self.relu_last:
            u = self.signed(u)
            de = self.norm.symmetric(self.params.norm_weight * u)
        else:
            de = self.signed(self.norm.symmetric(self.params.norm_weight * u))
        return u, de, self.masked(de) @ self.params.fuse_weight

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u for u (B, d)."""
        dq = self.pull(u)[2]
        return dq * self.gate + self.n * ((dq * self.z) @ self.params.gate_weight)

    def vjp_operands(
        self, u: Tensor, want_params: bool
    ) -> tuple[Tensor, Tensor, FuseParams | None]:
        """Gradients with respect to x_fuse and the sum of the cells (B, d), and the parameters."""
        du, de, dq = self.pull(u)
        dgate = dq * self.z
        dcell_sum = dgate @ self.params.gate_weight
        if not want_params:
            return de, dcell_sum, None
        dcombined = self.masked(de)
        return (
            de,
            dcell_sum,
            FuseParams(
                gate_weight=dgate.mT @ self.gate_input,
                gate_bias=(self.n * dgate).sum(0),
                fuse_weight=dcombined.mT @ self.q,
                fuse_bias=dcombined.sum(0),
                norm_weight=(du * self.norm.x_hat).sum(0),
                norm_bias=du.sum(0),
            ),
        )
