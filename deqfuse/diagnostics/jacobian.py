"""Size and spectral radius of the Jacobian of a row-wise map at a point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deqfuse import checks
from deqfuse.solvers.derivatives import plain_kernels

Map = Callable[[Tensor], Tensor]


def jacobian_penalty(blocks: Sequence[tuple[Map, Tensor]], num_probes: int) -> Tensor:
    """Hutchinson estimate of ``sum_b |J_b|_F^2`` per element of the state, differentiable.

    J_b is the Jacobian of a block's map; ``|J^T v|^2`` for a Gaussian probe v is ``|J|_F^2`` on
    average. :meth:`deqfuse.SolveInfo.jacobian_penalty` calls this for a layer's own blocks.

    Args:
        blocks: (f, z) pairs; f maps (..., d) to (..., d), row by row. z (..., d) is held constant.
        num_probes: Gaussian probes v per block; the estimate averages ``|J^T v|^2``.

    Returns:
        Scalar of shape (), ``sum over blocks and probes |J^T v|^2 / (num_probes * total number of
        elements)``; without a graph when gradients are switched off.

    Raises:
        TypeError: ``num_probes`` is no integer.
        ValueError: ``num_probes`` is less than 1.
        RuntimeError: inside ``torch.inference_mode()``, or z was made there.
    """
    checks.positive_int("num_probes", num_probes)
    if not blocks:
        return torch.zeros(())
    for _, z in blocks:
        check_differentiable("jacobian_penalty", z)
    elements = sum(z.numel() for _, z in blocks)
    total = blocks[0][1].new_zeros(())
    if elements == 0:
        return total
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        for f, z in blocks:
            z = z.detach().requires_grad_()
            with plain_kernels():  # the penalty is differentiated, and with it J^T v
                fz = f(z)
            if not fz.requires_grad:  # J = 0
                continue
            for _ in range(num_probes):
                probe = torch.randn_like(fz)
                (vjp,) = torch.autograd.grad(
                    fz, z, probe, create_graph=True, allow_unused=True, materialize_grads=True
                )
                total = total + vjp.square().sum()
    total = total / (num_probes * elements)
    return total if keep_graph else total.detach()


def spectral_radius(f: Map, z: Tensor, num_iters: int = 60) -> Tensor:
    """Spectral radius (largest ``|eigenvalue|``) of each row's Jacobian, estimated.

    Power iteration on J^T; the mean growth over the second half of the iterations, so that a
    complex pair, whose growth oscillates, is averaged out.

    Args:
        f: maps (..., d) to (..., d), row by row.
        z: (..., d) where the Jacobian is taken.
        num_iters: iterations, at least 2.

    Returns:
        (...), one number for each row.

    Raises:
        TypeError: ``num_iters`` is no integer.
        ValueError: ``num_iters`` is less than 2.
        RuntimeError: inside ``torch.inference_mode()``, or z was made there.
    """
    check_differentiable("spectral_radius", z)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        fz = f(z)
    if not fz.requires_grad:
        return torch.zeros_like(z[..., 0])

    def vjp(v: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(
            fz, z, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out

    return radius_of(vjp, z, num_iters)


@torch.no_grad()
def radius_of(vjp: Map, z: Tensor, num_iters: int) -> Tensor:
    """:func:`spectral_radius` of a Jacobian that is known by its products ``v -> J^T v``."""
    checks.positive_int("num_iters", num_iters)
    if num_iters < 2:
        raise ValueError(f"num_iters: expected an int >= 2, got {num_iters}")
    v = torch.randn_like(z)
    log_growth, counted = torch.zeros_like(z[..., 0]), 0
    for i in range(num_iters):
        v = vjp(v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-30))
        if i >= num_iters // 2:
            log_growth = log_growth + torch.linalg.vector_norm(v, dim=-1).clamp_min(1e-30).log()
            counted += 1
    return (log_growth / counted).exp()


def check_differentiable(what: str, z: Tensor) -> None:
    """Where autograd records nothing, every Jacobian would look like zero."""
    if torch.compiler.is_compiling():  # torch cannot trace the question
        return
    if torch.is_inference_mode_enabled() or z.is_inference():
        raise RuntimeError(
            f"{what}: expected a solve and a measurement outside torch.inference_mode(), which "
            "rules out derivatives. Remedy: torch.no_grad() around both"
        )
