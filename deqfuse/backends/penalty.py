"""The Jacobian penalty of the layer in closed form: value and every gradient, without a graph.

Per row and block it is ``sum_k |J^T v_k|^2`` over Gaussian probes ``v_k``, with J the Jacobian of
the block's map at its equilibrium, which is held constant (in the gate's constant, too). ``J^T v``
is one pull through the linearised map; its gradient goes back along the same way and, as the norms
depend on what they normalise, through the evaluation as well. Both need what the adjoint needs of
an equilibrium, and products with the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable

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
    return join(
        of_cells, of_fuse, probes, states, x, flat_params, mask, num_groups, variant, want_params
    )


def join(
    of_cells: Callable[..., tuple[Tensor, Tensor, list[Tensor]]],
    of_fuse: Callable[..., tuple[Tensor, Tensor, list[Tensor]]],
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The layer's penalty from that of its two blocks.

    Args:
        of_cells: of ``(probes (K, N, B, d), z, x, params, num_groups, variant, want_params)`` the
            values (N, B), dx (N, B, d) and the parameters' gradients, cell after cell.
        of_fuse: of ``(probes (K, B, d), z, x_fuse, cell_sum, params, mask, N, num_groups, variant,
            want_params)`` the values (B,), dx_fuse (B, d) and the parameters' gradients.
        probes, states, x, flat_params, mask, num_groups, variant, want_params: see
            :func:`penalty_layer`. Blocks get x, parameters and mask as they are stored.

    Returns:
        See :func:`penalty_layer`.
    """
    params, zs, how = LayerParams.split(flat_params, len(x)), states[:-1], (num_groups, variant)
    stacked = torch.stack(list(x))
    value, dx, dcells = of_cells(probes[:, :-1], zs, stacked, params.cells, *how, want_params)
    x_fuse = fuse_injection(stacked, params.weights, params.bias)
    value_fuse, dx_fuse, dfuse = of_fuse(
        probes[:, -1], states[-1], x_fuse, zs.sum(0), params.fuse, mask, len(x), *how, want_params
    )
    dx = dx + params.weights[:, None, None] * dx_fuse
    grads = [*dcells, *dfuse]
    if want_params:
        grads.append((stacked * dx_fuse).sum((1, 2)))
        if params.bias is not None:
            grads.append(dx_fuse.sum().reshape(params.bias.shape))
    return torch.cat([value, value_fuse[None]]), [d.clone() for d in dx], grads


def of_cells(
    probes: Tensor,  # (K, N, B, d)
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    params = CellParams.stack([t.to(z.dtype) for t in flat_params])
    at = CellLinearization(z, x.to(z.dtype), params, num_groups, variant)
    value, dx, grads = _cells(at, probes)
    return value, dx, grads.unstack() if want_params else []


def of_fuse(
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    params = FuseParams(*(t.to(z.dtype) for t in flat_params))
    mask = None if mask is None else mask.to(z.dtype)
    at = FuseLinearization(
        z, x_fuse, cell_sum, mask, num_modalities, params, num_groups, variant
    )  # fmt: skip
    value, dx, grads = _fuse(at, probes)
    return value, dx, list(grads) if want_params else []


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
