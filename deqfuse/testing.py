"""The layer stated naively, and its exact gradients: an oracle without any code of the solvers.

The equations of arXiv 2306.16645 as the paper has them, one modality at a time and as one joint map
of (z_1 .. z_N, z_f): no block order, no collapsed gate, no stacked parameters. Exact gradients come
from the full Jacobian of that map, row by row. For float64 and small sizes: (N + 1) d unknowns per
row, O(((N + 1) d)^3) work. Where given cells see T positions of a sample at once (``cell_dims``),
all T rows of it are one problem of T (N + 1) d unknowns.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from deqfuse.errors import ConvergenceError
from deqfuse.nn.cells import PurifyCombine, ResidualCell
from deqfuse.nn.fusion import DEQFusion
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import Implicit, Unrolled

__all__ = [
    "dense_implicit_gradients",
    "gradient_errors",
    "naive_cell",
    "naive_combine",
    "naive_injections",
    "naive_map",
    "naive_root",
]

TIGHT = 1e-12  # relative residual; one evaluation in float64 rounds at a few 1e-16
SAME_MAP = 1e-8  # relative residual of the layer's answer in the naive map
NEGLIGIBLE = 1e-4  # see gradient_errors


def naive_injections(
    fusion: DEQFusion,
    features: Sequence[Tensor],  # N tensors (..., d_i)
) -> tuple[Tensor, Tensor]:  # (B, N, d), (B, d)
    """Injections x_i (projected, normalised) and ``x_f = sum_i w_i x_i + bias`` (Eq. 11).

    Where the layer was given an injection, x_f is what that makes.

    Args:
        fusion: the layer whose projections, weights and bias are used.
        features: N tensors (..., d_i), as for the layer; B rows (samples) in all.

    Returns:
        The injections (B, N, d) and that of the combination (B, d).
    """
    x = [feature.reshape(-1, feature.shape[-1]) for feature in features]
    if fusion.projections is not None:
        x = [project(x_i) for project, x_i in zip(fusion.projections, x, strict=True)]
    if fusion.injection_norm:
        sizes = [x_i.square().mean(1, keepdim=True).sqrt() for x_i in x]
        x = [x_i / size.where(size > 0, 1.0) for x_i, size in zip(x, sizes, strict=True)]
    x_fuse = torch.zeros_like(x[0])
    if fusion.injection is not None:
        shape = (-1, *_joint(fusion, features), fusion.dim)
        x_fuse = fusion.injection([x_i.reshape(shape) for x_i in x]).reshape_as(x_fuse)
    if fusion.modality_weights is not None:
        x_fuse = sum((w * x_i for w, x_i in zip(fusion.modality_weights, x, strict=True)), x_fuse)
    if fusion.injection_bias is not None:
        x_fuse = x_fuse + fusion.injection_bias
    return torch.stack(x, dim=1), x_fuse


def naive_cell(
    cell: ResidualCell,
    z: Tensor,  # (B, d)
    x: Tensor,  # (B, d)
) -> Tensor:  # (B, d)
    """One step of a residual cell (Eq. 8); released variants add ``+ z`` before the last relu.

    Args:
        cell: the cell whose parameters are used.
        z: (B, d) state.
        x: (B, d) injection.

    Returns:
        (B, d), the next state.
    """
    groups = cell.num_groups
    h = F.linear(z, cell.linear1.weight, cell.linear1.bias)
    h = F.relu(F.group_norm(h, groups, cell.norm1.weight, cell.norm1.bias))
    h = F.linear(h, cell.linear2.weight, cell.linear2.bias) + x
    h = F.group_norm(h, groups, cell.norm2.weight, cell.norm2.bias)
    if cell.variant in ("released", "released-mmimdb"):
        h = h + z
    return F.group_norm(F.relu(h), groups, cell.norm3.weight, cell.norm3.bias)


def naive_combine(
    combine: PurifyCombine,
    z_fuse: Tensor,  # (B, d)
    cells: Sequence[Tensor],  # N tensors (B, d)
    x_fuse: Tensor,  # (B, d)
    mask: Tensor | None = None,  # (B, d)
) -> Tensor:  # (B, d)
    """One step of soft gate and combination (Eqs. 9-12), with one gate per modality.

    The gate alpha_i weighs each feature, and the purified feature of a modality is ``alpha_i *
    z_f``; without a gate it is z_i itself.

    Args:
        combine: the combination whose parameters are used.
        z_fuse: (B, d) fused state z_f.
        cells: N tensors (B, d), the states z_i of the cells.
        x_fuse: (B, d) injection of the combination.
        mask: (B, d) dropout factors on W_f's output; none when not given.

    Returns:
        (B, d), the next fused state.
    """
    total = torch.zeros_like(z_fuse)
    for z in cells:
        if combine.gate is None:
            total = total + z
        else:
            alpha = F.linear(z_fuse + z, combine.gate.weight, combine.gate.bias)  # Eq. 9
            total = total + alpha * z_fuse  # Eq. 10
    e = F.linear(total, combine.fuse.weight, combine.fuse.bias)
    e = (e if mask is None else e * mask) + x_fuse
    groups, norm = combine.num_groups, combine.norm
    if combine.variant == "released-mmimdb":
        return F.relu(F.group_norm(e, groups, norm.weight, norm.bias))
    return F.group_norm(F.relu(e), groups, norm.weight, norm.bias)  # Eq. 12


def naive_map(
    fusion: DEQFusion,
    state: Tensor,  # (B, N + 1, d): z_1 .. z_N, z_f
    x: Tensor,  # (B, N, d)
    x_fuse: Tensor,  # (B, d)
    mask: Tensor | None = None,  # (B, d)
    joint: tuple[int, ...] = (),
) -> Tensor:  # (B, N + 1, d)
    """One evaluation of the joint map of Eq. 17: every block sees the old state.

    Args:
        fusion: the layer whose equations and parameters are used.
        state: (B, N + 1, d), z_1 .. z_N and z_f.
        x: (B, N, d) injections, as :func:`naive_injections` gives them.
        x_fuse: (B, d) injection of the combination.
        mask: (B, d) dropout factors on W_f's output; none when not given.
        joint: dimensions (T,) of the features that given cells see at once; the B rows are
            samples of so many each.

    Returns:
        (B, N + 1, d), the next state.
    """
    *cells, z_fuse = state.unbind(1)
    new = list(x.unbind(1))
    for i, (cell, z, x_i) in enumerate(zip(fusion.cells, cells, new, strict=False)):
        if i in fusion._given:
            shape = (-1, *joint, fusion.dim)
            new[i] = cell(z.reshape(shape), x_i.reshape(shape)).reshape_as(z)
        else:
            new[i] = naive_cell(cast(ResidualCell, cell), z, x_i)
    if fusion.combine is not None:
        fused = naive_combine(fusion.combine, z_fuse, cells, x_fuse, mask)
    else:
        fused = x_fuse if fusion.combine_kind == "weighted_sum" else torch.stack(cells).sum(0)
    return torch.stack([*new, fused], dim=1)


def _joint(fusion: DEQFusion, features: Sequence[Tensor]) -> tuple[int, ...]:
    """Those leading dimensions of the features that given modules see at once."""
    return tuple(features[0].shape[-fusion.cell_dims : -1])


def _problem(b: int, joint: tuple[int, ...], *tensors: Tensor | None) -> list[Any]:
    """The rows of the b-th problem: one, or those of a sample."""
    at = slice(b * math.prod(joint), (b + 1) * math.prod(joint))
    return [None if t is None else t[at] for t in tensors]


def _system(
    fusion: DEQFusion,
    joint: tuple[int, ...],
    state: Tensor,  # (T, N + 1, d), T = 1 where no cell sees more
    *operands: Tensor | None,  # x, x_fuse and mask of these rows
) -> Tensor:  # (n, n) with n = T (N + 1) d
    """``I - J`` of the joint map for one problem: n copies of it, a unit cotangent for each."""
    n = state.numel()
    wide: list[Any] = [
        None if t is None else t.detach().expand(n, *t.shape).flatten(0, 1)
        for t in (state, *operands)
    ]
    copies, x, x_fuse, mask = wide
    copies = copies.clone().requires_grad_()
    unit = torch.eye(n, dtype=state.dtype, device=state.device)
    with torch.enable_grad():
        # The zero term is for ablations in which nothing depends on the state.
        out = naive_map(fusion, copies, x, x_fuse, mask, joint) + 0 * copies
    return unit - torch.autograd.grad(out, copies, unit.view_as(out))[0].view(n, n)


@torch.no_grad()
def naive_root(
    fusion: DEQFusion,
    features: Sequence[Tensor],  # N tensors (..., d_i)
    *,
    mask: Tensor | None = None,  # (B, d)
    steps: int = 60,
) -> Tensor:  # (B, N + 1, d)
    """An equilibrium (z_1 .. z_N, z_f) by other means: damped iteration from 0, then Newton.

    Where a row has several equilibria (the released variants can), this is one of them.

    Args:
        fusion: an equilibrium layer in float64.
        features: N tensors (..., d_i), as for the layer; B rows in all.
        mask: (B, d) dropout factors on W_f's output; none when not given.
        steps: of the damped iteration; five Newton steps follow.

    Returns:
        (B, N + 1, d), z_1 .. z_N and z_f.

    Raises:
        ConvergenceError: the relative residual of a row stays above 1e-12.
    """
    x, x_fuse = naive_injections(fusion, features)
    joint = _joint(fusion, features)
    state = x_fuse.new_zeros(len(x_fuse), fusion.num_modalities + 1, fusion.dim)
    for _ in range(steps):
        state = 0.5 * state + 0.5 * naive_map(fusion, state, x, x_fuse, mask, joint)
    for b in range(len(state) // math.prod(joint)):
        z, x_b, x_fuse_b, mask_b = _problem(b, joint, state, x, x_fuse, mask)
        for _ in range(5):
            g = naive_map(fusion, z, x_b, x_fuse_b, mask_b, joint) - z
            system = _system(fusion, joint, z, x_b, x_fuse_b, mask_b)
            z = z + torch.linalg.solve(system, g.flatten()).view_as(z)
        _problem(b, joint, state)[0].copy_(z)
    residual = (naive_map(fusion, state, x, x_fuse, mask, joint) - state).flatten(1).norm(dim=1)
    residual = residual / state.flatten(1).norm(dim=1).clamp_min(1e-30)
    if not (residual <= TIGHT).all():
        raise ConvergenceError(f"naive_root: relative residuals {residual.tolist()}, tol {TIGHT}")
    return state


def dense_implicit_gradients(
    fusion: DEQFusion,
    features: Sequence[Tensor],  # N tensors (..., d_i)
    grad_z: Tensor,  # (..., d)
    grad_cells: Tensor | None = None,  # (N, ..., d)
    *,
    mask: Tensor | None = None,  # (B, d)
) -> dict[str, Tensor]:
    """Exact gradients at the equilibrium that ``fusion`` finds (Theorem 1, on the joint system).

    ``u = (I - J^T)^-1 g`` with the full Jacobian J of :func:`naive_map`, one row at a time (batched
    ``torch.linalg.solve`` is wrong for n > 128 on some MKL builds); then one VJP of the naive map,
    which includes the path of each x_i through x_f.

    Args:
        fusion: float64, with tight tolerances; its parameters need not require gradients.
        features: N tensors (..., d_i), as for the layer.
        grad_z: (..., d) cotangent (incoming gradient) of the fused output.
        grad_cells: (N, ..., d) cotangents of the modality equilibria; zero when not given.
        mask: (B, d) dropout factors, when ``fusion`` is made to use this very draw; else no
            dropout.

    Returns:
        Gradients by parameter name and ``features[i]``, each of the shape (...) of what it belongs
        to.

    Raises:
        ValueError: ``fusion`` has ``weight_tied_steps``: no equilibrium.
        ConvergenceError: what ``fusion`` returns does not solve the naive equations.
    """
    if fusion.weight_tied_steps is not None:
        raise ValueError("fusion: expected an equilibrium layer, got one with weight_tied_steps")
    n, d, joint = fusion.num_modalities, fusion.dim, _joint(fusion, features)
    z, cells, _ = _equilibrium(fusion, features)
    state = torch.cat([cells.reshape(n, -1, d), z.reshape(1, -1, d)]).transpose(0, 1)
    g_cells = torch.zeros_like(state[:, :-1]).transpose(0, 1) if grad_cells is None else grad_cells
    g = torch.cat([g_cells.reshape(n, -1, d), grad_z.reshape(1, -1, d)]).transpose(0, 1)

    twin = copy.deepcopy(fusion).requires_grad_()
    inputs = [feature.detach().clone().requires_grad_() for feature in features]
    leaves = {**dict(twin.named_parameters()), **_named(inputs)}
    with torch.enable_grad():
        x, x_fuse = naive_injections(twin, inputs)
        image = naive_map(twin, state, x, x_fuse, mask, joint)
    if not ((image - state).norm() <= SAME_MAP * state.norm()):
        raise ConvergenceError("fusion: its output is not an equilibrium of the naive equations")
    u = torch.zeros_like(g)
    for b in range(len(g) // math.prod(joint)):
        u_b, g_b, *rows = _problem(b, joint, u, g, state, x, x_fuse, mask)
        system = _system(fusion, joint, *rows)
        u_b.copy_(torch.linalg.solve(system.mT, g_b.flatten()).view_as(u_b))
    grads = torch.autograd.grad(
        image, list(leaves.values()), u, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def _named(features: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"features[{i}]": feature for i, feature in enumerate(features)}


def _equilibrium(fusion: DEQFusion, features: Sequence[Tensor]) -> Any:
    """Fused output, cells, info; "weighted_sum" has no cells and its injections stand in."""
    with torch.no_grad():
        if fusion.combine_kind != "weighted_sum":
            return fusion(features, return_cells=True, return_info=True)
        z, info = fusion(features, return_info=True)
        return z, naive_injections(fusion, features)[0].transpose(0, 1), info


def gradient_errors(
    fusion: DEQFusion,
    features: Sequence[Tensor],  # N tensors (..., d_i)
    seed: int = 0,
) -> dict[str, float]:
    """How far the layer's gradients are from the exact ones, per parameter and input.

    Runs a float64 copy in eval mode with its own kinds of solver and gradient, at tolerance 1e-12
    where they have one, on random cotangents of the fused output and of the cells. Rows that do not
    converge are left out.

    Args:
        fusion: any equilibrium ``DEQFusion``; it is not changed.
        features: N tensors (..., d_i), as for the layer; a few rows.
        seed: of the cotangents.

    Returns:
        By parameter name and ``features[i]``: the largest absolute difference over the largest
        absolute entry of that exact gradient, or over 1e-4 of the largest entry of all gradients
        where that is more (the relative error of a vanishing gradient means nothing).

    Raises:
        ConvergenceError: no row converged, or what ``fusion`` returns does not solve the naive
            equations.
    """
    twin = copy.deepcopy(fusion).double().eval().requires_grad_()
    twin.on_failure = "ignore"
    twin.solver = dataclasses.replace(fusion.solver, tol=TIGHT, max_iter=2000)
    if isinstance(twin.solver, Anderson) and not isinstance(twin.adjoint, Unrolled):
        twin.solver = dataclasses.replace(twin.solver, rescue=True)
    if isinstance(twin.adjoint, Implicit):
        twin.adjoint = dataclasses.replace(twin.adjoint, tol=TIGHT, max_iter=2000)
    joint = _joint(fusion, features)
    rows = [f.detach().double().reshape(-1, *joint, f.shape[-1]) for f in features]
    good = _equilibrium(twin, rows)[2].converged
    good = good.reshape(len(good), -1).all(1)  # of a sample all rows or none
    if not good.any():
        raise ConvergenceError(f"gradient_errors: no row of {len(good)} reached {TIGHT:.0e}")
    inputs = [row[good].requires_grad_() for row in rows]

    generator = torch.Generator().manual_seed(seed)
    shape = (fusion.num_modalities + 1, *inputs[0].shape[:-1], fusion.dim)
    g = torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs[0].device)
    with_cells = fusion.combine_kind != "weighted_sum"
    with torch.enable_grad():
        outputs = twin(inputs, return_cells=True) if with_cells else (twin(inputs),)
    torch.autograd.backward(outputs, (g[-1], g[:-1])[: len(outputs)])
    leaves = {**dict(twin.named_parameters()), **_named(inputs)}
    exact = dense_implicit_gradients(twin, inputs, g[-1], g[:-1] if with_cells else None)
    largest = {name: float(grad.abs().max()) for name, grad in exact.items()}
    floor = max(NEGLIGIBLE * max(largest.values()), torch.finfo(torch.float64).tiny)
    errors = {}
    for name, grad in exact.items():
        given = leaves[name].grad
        difference = grad if given is None else given - grad
        errors[name] = float(difference.abs().max()) / max(largest[name], floor)
    return errors
