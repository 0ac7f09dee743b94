"""The released code's algorithm, stated anew in eager PyTorch: the baseline of the papers' users.

One joint state (z_1 .. z_N, z_f), Anderson mixing with an *absolute* ridge over the last six
iterates, one stopping test for the whole batch, and the same solver again for the backward pass.
The map is that of benchmarks/plain.py. The Jacobian penalty is theirs, too: a product of J^T with a
Gaussian probe on the graph of the last evaluation, which the backward pass uses as well,
differentiated once more. (They draw two probes; here everybody has one.)
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

    leaf = z_star.detach().requires_grad_()
    image = f(leaf)

    def vjp(u: Tensor) -> Tensor:
        return torch.autograd.grad(image, leaf, u, retain_graph=True)[0]

    return attach_gradient(image, lambda grad: solve(vjp, grad)), nfe


def joint_penalized(
    f: Callable[..., Tensor],
    z0: Tensor,  # (B, n)
    dim: int,
    tol: float,
    max_iter: int,
    adjoint_max_iter: int,
) -> tuple[Tensor, Tensor]:
    """The fixed point as of :func:`joint_implicit`, and the Jacobian penalty there.

    Their penalty is that of the joint map, in which the fuse equation depends on the cells, too.
    Here these are given to it as a second argument (``seen``): the penalty leaves them out, so that
    everybody estimates the same quantity, and the backward solve has both, in the same products.

    Args:
        f: ``f(z, seen)`` with seen (B, n - dim).
    """
    with torch.no_grad():
        z_star, _ = joint_anderson(f, z0, tol, max_iter)
    leaf = z_star.detach().requires_grad_()
    seen = z_star[:, :-dim].detach().requires_grad_()
    image = f(leaf, seen)

    def solve(grad: Tensor) -> Tensor:
        def step(u: Tensor) -> Tensor:
            out, through_gates = torch.autograd.grad(image, (leaf, seen), u, retain_graph=True)
            out[:, :-dim] += through_gates
            return out.add_(grad)

        return joint_anderson(step, torch.zeros_like(grad), tol, adjoint_max_iter)[0]

    probe = torch.randn_like(leaf)
    (pulled,) = torch.autograd.grad(image, leaf, probe, create_graph=True)
    return attach_gradient(image, solve), pulled.square().sum() / leaf.numel()


def attach_gradient(image: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """f(z*) whose backward first solves ``(I - J^T) u = grad`` and then goes through f once.

    Args:
        image: f(z*), with the graph of this one evaluation.
        solve: u of a gradient.
    """
    out = image.view_as(image)  # so that products with J^T, from ``image`` back, do not solve again
    out.register_hook(solve)
    return out
