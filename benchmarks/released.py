"""The released code's algorithm, stated anew in eager PyTorch: the baseline of the papers' users.

One joint state (z_1 .. z_N, z_f), Anderson mixing with an *absolute* ridge over the last six
iterates, one stopping test for the whole batch, and the same solver again for the backward pass.
The map is that of benchmarks/plain.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HISTORY, RIDGE = 6, 1e-4


def joint_anderson(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (B, n)
    tol: float | None,
    max_iter: int,
) -> tuple[Tensor, int]:
    """Fixed point of ``f`` and the evaluations used.

    Stops when ``|f(z) - z| <= tol |f(z)|`` over the whole batch and returns the best f(z). With
    ``tol=None`` it makes exactly ``max_iter`` evaluations and reads nothing back: that can be
    captured in a CUDA graph.
    """
    rows, n = z0.shape
    states, images = z0.new_zeros(rows, HISTORY, n), z0.new_zeros(rows, HISTORY, n)
    system = z0.new_zeros(rows, HISTORY + 1, HISTORY + 1)
    system[:, 0, 1:] = system[:, 1:, 0] = 1
    unit = z0.new_zeros(rows, HISTORY + 1, 1)
    unit[:, 0] = 1
    z, best, lowest = z0, z0, float("inf")
    for k in range(max_iter):
        image = f(z)
        states[:, k % HISTORY], images[:, k % HISTORY] = z, image
        if tol is None:
            best = image
        else:
            residual = float((image - z).norm() / (image.norm() + 1e-5))
            if residual < lowest:
                best, lowest = image, residual
            if residual <= tol:
                return best, k + 1
        used = min(k + 1, HISTORY)
        if used == 1:
            z = image
            continue
        g = images[:, :used] - states[:, :used]
        ridge = RIDGE * torch.eye(used, dtype=z0.dtype, device=z0.device)
        system[:, 1 : used + 1, 1 : used + 1] = torch.bmm(g, g.mT) + ridge
        # solve_ex: linalg.solve would read its error flag back on a GPU.
        solved = torch.linalg.solve_ex(system[:, : used + 1, : used + 1], unit[:, : used + 1])[0]
        z = torch.bmm(solved[:, 1:].mT, images[:, :used])[:, 0]
    return best, max_iter


def joint_implicit(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (B, n)
    tol: float,
    max_iter: int,
    adjoint_max_iter: int,
) -> tuple[Tensor, int]:
    """The fixed point, differentiable by Theorem 1, and the evaluations of the forward solve."""
    with torch.no_grad():
        z_star, nfe = joint_anderson(f, z0, tol, max_iter)
    if not torch.is_grad_enabled():
        return z_star, nfe

    def solve(vjp: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
        zero = torch.zeros_like(grad)
        return joint_anderson(lambda u: vjp(u) + grad, zero, tol, adjoint_max_iter)[0]

    return attach_gradient(f, f, z_star, solve), nfe


def attach_gradient(
    f: Callable[[Tensor], Tensor],
    frozen: Callable[[Tensor], Tensor],
    z_star: Tensor,
    solve: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
) -> Tensor:
    """f(z*) whose backward first solves ``(I - J^T) u = grad`` and then goes through f once.

    Args:
        frozen: f, differentiable in z; whether in anything else does not matter.
        solve: ``solve(vjp, grad)`` returns u.
    """
    leaf = z_star.detach().requires_grad_()
    image, inner = f(leaf), frozen(leaf)

    def solved(grad: Tensor) -> Tensor:
        def vjp(u: Tensor) -> Tensor:
            return torch.autograd.grad(inner, leaf, u, retain_graph=True)[0]

        return solve(vjp, grad)

    image.register_hook(solved)
    return image
