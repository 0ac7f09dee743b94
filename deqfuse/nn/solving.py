"""From injections to the answer: the three ways in which ``DEQFusion`` gets there.

One operator for the whole layer; block by block, for the ablations and ``Unrolled()``; or a fixed
number of steps. All take injections as N tensors (B, d), or as one (N, B, d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import functional
from deqfuse.backends import maps
from deqfuse.backends.layer import fuse_injection
from deqfuse.backends.maps import CellParams, FuseParams
from deqfuse.backends.problem import compute_dtype
from deqfuse.nn.parts import parameter
from deqfuse.result import BlockInfo, SolveInfo
from deqfuse.solvers.options import SolverOption, Unrolled
from deqfuse.solvers.rows import Rows

if TYPE_CHECKING:
    from deqfuse.nn.fusion import DEQFusion


class Found(NamedTuple):
    """A solve; what few callers ask for is made when they do."""

    z: Tensor  # (B, d), for the caller to keep
    cells: Callable[[], Tensor]  # (N, B, d)
    info: Callable[[], SolveInfo]


def is_whole(layer: DEQFusion) -> bool:
    """All equations of the paper and an implicit gradient: one operator solves them all."""
    if layer.cell != "residual" or isinstance(layer.adjoint, Unrolled):
        return False
    combine = layer._modules.get("combine")
    return combine is not None and combine.gate is not None


def whole_layer(
    layer: DEQFusion,
    xs: list[Tensor],
    mask: Tensor | None,
    start_fuse: Tensor | None,
    start_cells: Tensor | None,
) -> Found:
    """All equations in one operator."""
    cells = _cell_parameters(layer)
    fuse = _fuse_parameters(layer)
    weights, bias = parameter(layer, "modality_weights"), parameter(layer, "injection_bias")
    params = [*cells, *fuse, weights] if bias is None else [*cells, *fuse, weights, bias]
    solved, backend = functional.solve_layer(
        xs, params, mask, start_fuse, start_cells, **_options(layer)
    )

    def info() -> SolveInfo:
        x, states = torch.stack(xs), solved.states.detach()

        def block(at: Any) -> BlockInfo:
            trace = solved.trace[:, at] if layer.solver.trace else None
            return BlockInfo(solved.residual[at], solved.nfe[at], solved.outcome[at], trace)

        return SolveInfo(
            block(-1),
            block(slice(None, -1)),
            backend,
            (
                lambda: (_cells_map(layer, x, cells), states[:-1]),
                lambda: (  # with the tensors of this call: functional_call lends its own
                    _fuse_map(
                        layer, fuse_injection(x, weights, bias), states[:-1].sum(0), fuse, mask
                    ),
                    states[-1],
                ),
            ),
        )

    return Found(solved.z, lambda: solved.states[:-1], info)


def block_by_block(
    layer: DEQFusion,
    xs: list[Tensor],
    mask: Tensor | None,
    start_fuse: Tensor | None,
    start_cells: Tensor | None,
) -> Found:
    """The cells first; for the ablations, and for gradients through the steps."""
    x = torch.stack(xs)
    rows, blocks = tuple(x.shape[:-1]), []
    if layer.cell == "identity":
        zs, cells, backend = x, BlockInfo.exact(x, rows, 0), "reference"
    else:
        flat = _cell_parameters(layer)
        zs, cells, backend = functional.solve_cells(x, flat, z0=start_cells, **_options(layer))
        blocks.append(lambda: (_cells_map(layer, x, flat), zs.detach()))

    if layer.combine is not None and layer.combine.gate is not None:
        x_fuse, cell_sum = _x_fuse(layer, x), zs.sum(0)
        params, n = _fuse_parameters(layer), layer.num_modalities
        z, fuse, backend = functional.solve_fuse(
            x_fuse,
            cell_sum,
            params,
            num_modalities=n,
            mask=mask,
            z0=start_fuse,
            **_options(layer),
        )
        blocks.append(
            lambda: (_fuse_map(layer, x_fuse, cell_sum.detach(), params, mask), z.detach())
        )
    else:  # in closed form: one evaluation without a gate, none without a combination
        z = _combined(layer, x[0], zs.to(x.dtype), x, mask)
        fuse = BlockInfo.exact(x, rows[1:], 0 if layer.combine is None else 1)
    info = SolveInfo(fuse, cells, backend, tuple(blocks))
    # A copy: the backward pass and `info` keep the original, and `z += ...` must be possible.
    return Found(z.clone(), lambda: zs, lambda: info)


def weight_tied(layer: DEQFusion, x: Tensor, mask: Tensor | None, steps: int) -> Found:
    """``steps`` steps of every equation from zero; each combination sees that step's cells."""
    work = x.to(compute_dtype(x.dtype))
    z, zs = torch.zeros_like(work[0]), torch.zeros_like(work)
    flat = _cell_parameters(layer)
    step_cells = _cells_map(layer, x, flat) if flat else (lambda _: work)
    gated = layer.combine is not None and layer.combine.gate is not None
    for _ in range(steps):
        before = z, zs
        zs = step_cells(zs)
        if gated:
            step = _fuse_map(layer, _x_fuse(layer, x), zs.sum(0), _fuse_parameters(layer), mask)
            z = step(z)
        else:
            z = _combined(layer, z, zs.to(x.dtype), x, mask)

    def info() -> SolveInfo:
        with torch.no_grad():
            fuse = last_step(before[0], z, layer.solver, steps)
            cells = last_step(before[1], zs, layer.solver, steps)
        blocks = []
        if flat:
            blocks.append(lambda: (step_cells, zs.detach()))
        if gated:
            blocks.append(lambda: (step, z.detach()))
        return SolveInfo(fuse, cells, "reference", tuple(blocks))

    return Found(z.clone(), lambda: zs, info)


def last_step(old: Tensor, new: Tensor, solver: SolverOption, steps: int) -> BlockInfo:
    """Residual of the last of some steps; converged only if it happens to meet the tolerance."""
    rows = Rows(old.flatten(0, -2), solver.tol, max_iter=1)
    rows.observe(old.flatten(0, -2), new.flatten(0, -2), cost=steps)
    found, shape = rows.solution(), new.shape[:-1]
    return BlockInfo(found.residual.view(shape), found.nfe.view(shape), found.outcome.view(shape))


def _combined(layer: DEQFusion, z: Tensor, zs: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """One evaluation of the combination, whichever it is."""
    if layer.combine is not None:
        return layer.combine(z, zs, _x_fuse(layer, x), mask)
    return zs.sum(0) if layer.modality_weights is None else _x_fuse(layer, x)


def _options(layer: DEQFusion) -> dict[str, Any]:
    return {
        "num_groups": layer.num_groups,
        "variant": layer.variant,
        "solver": layer.solver,
        "adjoint": layer.adjoint,
        "on_failure": layer.on_failure,
        "backend": layer.backend,
    }


def _x_fuse(layer: DEQFusion, x: Tensor) -> Tensor:
    """Injection of the fuse equation from all x (N, B, d): (B, d)."""
    return fuse_injection(x, layer.modality_weights, layer.injection_bias)


def _cell_parameters(layer: DEQFusion) -> list[Tensor]:
    flat: list[Tensor] = []
    cells: Any = layer._modules["cells"]
    for name, cell in cells._modules.items():
        try:
            flat += cell.flat()
        except (TypeError, ValueError) as error:
            raise type(error)(f"cells.{name}.{error}") from None
    return flat


def _fuse_parameters(layer: DEQFusion) -> list[Tensor]:
    combine: Any = layer._modules["combine"]
    try:
        return combine.flat()
    except (TypeError, ValueError) as error:
        raise type(error)(f"combine.{error}") from None


def _cells_map(layer: DEQFusion, x: Tensor, flat: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The cells' map in the compute dtype, for Jacobian measurements."""
    dtype = compute_dtype(x.dtype)
    params, x = CellParams.stack([t.to(dtype) for t in flat]), x.to(dtype)
    return lambda z: maps.residual_cell(z, x, params, layer.num_groups, layer.variant)


def _fuse_map(
    layer: DEQFusion, x_fuse: Tensor, cell_sum: Tensor, flat: list[Tensor], mask: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The fuse map in the compute dtype, for Jacobian measurements."""
    dtype, n = compute_dtype(x_fuse.dtype), layer.num_modalities
    params, x_fuse = FuseParams(*(t.to(dtype) for t in flat)), x_fuse.to(dtype)
    constant = maps.gate_constant(cell_sum.to(dtype), n, params)
    return lambda z: maps.purify_combine(
        z, x_fuse, constant, mask, n, params, layer.num_groups, layer.variant
    )
