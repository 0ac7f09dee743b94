"""The Jacobian penalty of the layer in closed form: value and every gradient, without a graph.

Per row and block it is ``sum_k |J^T v_k|^2`` over Gaussian probes ``v_k``, with J the Jacobian of
the block's map at its equilibrium, which is held constant (in the gate's constant, too). ``J^T v``
is one pull through the linearised map; its gradient goes back along the same way and, as the norms
depend on what they normalise, through the evaluation as well. Both need what the adjoint needs of
an equilibrium, and products with the same matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deqfuse.backends.layer import LayerParams, fuse_injection
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import CellParams, FuseParams, Variant


def draw_probes(states: Tensor, num_probes: int) -> Tensor:
    """Gaussian probes for :func:`penalty_layer`, from torch's default generator.

    The order in which they are drawn is fixed, so that a seed gives one penalty on every backend:
    first the ``num_probes`` probes of the cells, each (N, B, d) at once, then those of the fuse
    step, each (B, d).

    Args:
        states: (N + 1, B, d) equilibria; the probes have their dtype and device.
        num_probes: K, at least 1.

    Returns:
        (K, N + 1, B, d).
    """
    probes = states.new_empty((num_probes, *states.shape))
    for part in (*probes[:, :-1], *probes[:, -1]):
        part.normal_()
    return probes


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
    """Value per row and block, and the gradients of the sum of all values.

    Args:
        probes: Gaussian vectors in the dtype of ``states``, as :func:`draw_probes` orders them.
        states: equilibria of the cells, then of the fuse step; compute dtype.
        x: injections.
        flat_params: ten tensors per cell, six of the fuse step, modality_weights, injection_bias if
            there is one.
        mask: dropout factors on W_f's output, or None.
        num_groups: groups of every GroupNorm.
        variant: which equations.
        want_params: whether the parameters' gradients are wanted.

    Returns:
        value (N + 1, B): ``sum_k |J_b^T v_k|^2`` of each row; dx: N tensors (B, d); the parameters'
        gradients in the order of ``flat_params``, or none. All in the compute dtype, so that the
        caller may scale what sums up all rows before it is stored in 16 bits.
    """
    n, dtype = len(x), states.dtype
    params = LayerParams.split([t.to(dtype) for t in flat_params], n)
    mask = None if mask is None else mask.to(dtype)
    stacked, zs = torch.stack([t.to(dtype) for t in x]), states[:-1]
    cells = CellLinearization(zs, stacked, CellParams.stack(params.cells), num_groups, variant)
    fuse_params = FuseParams(*params.fuse)
    x_fuse = fuse_injection(stacked, params.weights, params.bias)
    fuse = FuseLinearization(
        states[-1], x_fuse, zs.sum(0), mask, n, fuse_params, num_groups, variant
    )
    of_cells, dx, dcells = _cells(cells, probes[:, :-1])
    of_fuse, dx_fuse, dfuse = _fuse(fuse, probes[:, -1])
    value = torch.cat([of_cells, of_fuse[None]])
    dx = dx + params.weights[:, None, None] * dx_fuse
    grads: list[Tensor] = []
    if want_params:
        grads = [*dcells.unstack(), *dfuse, (stacked * dx_fuse).sum((1, 2))]
        if params.bias is not None:
            grads.append(dx_fuse.sum().reshape(params.bias.shape))
    return value, [d.clone() for d in dx], grads


def _cells(
    at: CellLinearization,
    probes: Tensor,  # (K, N, B, d)
) -> tuple[Tensor, Tensor, CellParams]:
    """(N, B) values, dx (N, B, d) and the gradients of all parameters, for all cells."""
    w1, w2, zero = at.params.linear1_weight, at.params.linear2_weight, torch.zeros_like(at.z)
    value, dy1, dy2, de = zero[..., 0], zero, zero, zero
    dw1, dw2 = torch.zeros_like(w1), torch.zeros_like(w2)
    dg1 = dg2 = dg3 = torch.zeros_like(at.params.norm1_weight)
    for v in probes:
        # J^T v, as in CellLinearization.vjp
        q, t2, s = at.pull(v)
        t1 = at.norm1.symmetric(at.gamma1 * s)
        out = torch.bmm(t1, w1)
        out = out + q if at.skip else out
        value = value + out.square().sum(-1)
        # and back along the same way
        w = 2 * out
        p, dy = at.norm1.slope(torch.bmm(w, w1.mT), at.gamma1 * s, t1)
        dy1, dg1, dw1 = dy1 + dy, dg1 + (s * p).sum(1), dw1 + torch.bmm(t1.mT, w)
        r = torch.where(at.sign1, at.gamma1 * p, 0.0)
        p, dy = at.norm2.slope(torch.bmm(r, w2.mT), at.gamma2 * q, t2)
        dy2, dg2, dw2 = dy2 + dy, dg2 + (q * p).sum(1), dw2 + torch.bmm(t2.mT, r)
        c = at.gamma2 * p
        c = torch.where(at.sign2, c + w if at.skip else c, 0.0)
        p, dy = at.norm3.slope(c, at.gamma3 * v, q)
        de, dg3 = de + torch.where(at.sign2, dy, 0.0), dg3 + (v * p).sum(1)
    # through the evaluation
    dy2 = dy2 + at.norm2.symmetric(at.gamma2 * de)
    dn1 = torch.where(at.sign1, torch.bmm(dy2, w2), 0.0)
    dy1 = dy1 + at.norm1.symmetric(at.gamma1 * dn1)
    return (
        value,
        dy2,
        CellParams(
            linear1_weight=dw1 + torch.bmm(dy1.mT, at.z),
            linear1_bias=dy1.sum(1),
            linear2_weight=dw2 + torch.bmm(dy2.mT, at.h),
            linear2_bias=dy2.sum(1),
            norm1_weight=dg1 + (dn1 * at.norm1.x_hat).sum(1),
            norm1_bias=dn1.sum(1),
            norm2_weight=dg2 + (de * at.norm2.x_hat).sum(1),
            norm2_bias=de.sum(1),
            norm3_weight=dg3,
            norm3_bias=torch.zeros_like(dg3),
        ),
    )


def _fuse(
    at: FuseLinearization,
    probes: Tensor,  # (K, B, d)
) -> tuple[Tensor, Tensor, FuseParams]:
    """(B,) values, dx_fuse (B, d) and the gradients of all parameters."""
    wa, wf, gamma = at.params.gate_weight, at.params.fuse_weight, at.params.norm_weight
    zero = torch.zeros_like(at.z)
    value, dgate, de, dg = zero[..., 0], zero, zero, torch.zeros_like(gamma)
    dwa, dwf = torch.zeros_like(wa), torch.zeros_like(wf)
    for v in probes:
        # J^T v, as in FuseLinearization.vjp
        u, t, y = at.pull(v)
        out = y * at.gate + at.n * ((y * at.z) @ wa)
        value = value + out.square().sum(-1)
        # and back along the same way
        w = 2 * out
        dgate, dwa = dgate + w * y, dwa + at.n * ((y * at.z).mT @ w)
        dy = at.gate * w + at.n * at.z * (w @ wa.mT)
        dwf = dwf + at.masked(t).mT @ dy
        back = at.masked(dy @ wf.mT)
        back = back if at.relu_last else at.signed(back)
        p, slope = at.norm.slope(back, gamma * u, t)
        de = de + (slope if at.relu_last else at.signed(slope))
        dg = dg + (u * p).sum(0)
    # through the evaluation
    dcombined = at.masked(de)
    dgate = dgate + at.z * (dcombined @ wf)
    return (
        value,
        de,
        FuseParams(
            gate_weight=dwa + dgate.mT @ at.gate_input,
            gate_bias=at.n * dgate.sum(0),
            fuse_weight=dwf + dcombined.mT @ at.q,
            fuse_bias=dcombined.sum(0),
            norm_weight=dg,
            norm_bias=torch.zeros_like(dg),
        ),
    )
