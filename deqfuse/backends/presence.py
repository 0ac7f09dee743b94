"""Rows that lack modalities: of a solve, only what is present goes to a backend's launchers.

For a row with n modalities present the sums of Eqs. 9 to 12 of arXiv 2306.16645 run over these n:
cells of absent ones are not solved, and the fuse step is that of a layer with n modalities. So the
rows of each cell are gathered where it is present, and those of the fuse step by their n. What
stands in an absent feature is never read, and its gradient is zero.

``present`` is (N, B, 1), bool, ``counts`` (B, 1), int64; None where everything is present.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deqfuse.backends import layer, penalty
from deqfuse.backends.backend import Backend, Launchers
from deqfuse.backends.maps import CellParams
from deqfuse.backends.problem import (
    LayerStatistics,
    Solved,
    SolvedLayer,
    Statistics,
    compute_dtype,
)
from deqfuse.outcome import Outcome

SIZE = len(CellParams._fields)  # parameters of a cell


@functools.cache
def cells(backend: Backend) -> Launchers:
    """A backend's launchers for the cells, which take ``present`` behind the other operands.

    Args:
        backend: whose launchers run on the rows that are present.

    Returns:
        solve ``(x, params, z0, present, *how)`` and adjoint ``(grad_z, z, x, params, present,
        *how)``.
    """

    def solve(x: Any, params: Any, z0: Any, present: Any, *how: Any) -> Solved:
        if present is None:
            return backend.cells.solve(x, params, z0, *how)
        return _solve_cells(backend.cells.solve, x, params, z0, present, *how)

    def adjoint(grad_z: Any, z: Any, x: Any, params: Any, present: Any, *how: Any) -> Any:
        if present is None:
            return backend.cells.adjoint(grad_z, z, x, params, *how)
        return _adjoint_cells(backend.cells.adjoint, grad_z, z, x, params, present, *how)

    return Launchers(solve, adjoint)


@functools.cache
def fuse(backend: Backend) -> Launchers:
    """A backend's launchers for the fuse step, which take ``counts`` in front of N.

    Args:
        backend: whose launchers run on the rows with n modalities each.

    Returns:
        solve ``(x_fuse, cell_sum, params, mask, z0, counts, num_modalities, *how)`` and adjoint
        ``(grad_z, z, x_fuse, cell_sum, params, mask, counts, num_modalities, *how)``.
    """

    def solve(
        x: Any, cell_sum: Any, params: Any, mask: Any, z0: Any, counts: Any, n: int, *how: Any
    ) -> Solved:
        if counts is None:
            return backend.fuse.solve(x, cell_sum, params, mask, z0, n, *how)
        return _solve_fuse(backend.fuse.solve, x, cell_sum, params, mask, z0, counts, *how)

    def adjoint(
        grad_z: Any, z: Any, x: Any, cell_sum: Any, params: Any, mask: Any, counts: Any, n: int,
        *how: Any,
    ) -> Any:  # fmt: skip
        launch = backend.fuse.adjoint
        if counts is None:
            return launch(grad_z, z, x, cell_sum, params, mask, n, *how)
        return _adjoint_fuse(launch, grad_z, z, x, cell_sum, params, mask, counts, *how)

    return Launchers(solve, adjoint)


@functools.cache
def whole(backend: Backend) -> Launchers:
    """A backend's launchers for the layer, which take ``present`` behind the other operands.

    Args:
        backend: whose launchers run; those of the blocks where anything is absent.

    Returns:
        solve ``(x, params, mask, z0_fuse, z0_cells, present, *how)`` and adjoint ``(grad_z,
        grad_cells, states, x, params, mask, present, *how)``.
    """

    def solve(
        x: Any, params: Any, mask: Any, z0_fuse: Any, z0_cells: Any, present: Any, *how: Any
    ) -> SolvedLayer:
        if _complete(present):
            return backend.layer.solve(x, params, mask, z0_fuse, z0_cells, *how)
        if backend.solve_present is not None:
            found = backend.solve_present(x, params, mask, z0_fuse, z0_cells, present, *how)
            if found is not None:
                return found
        of_cells = functools.partial(_solve_cells, backend.cells.solve)
        of_fuse = functools.partial(_solve_fuse, backend.fuse.solve)
        counts = present.sum(0)
        return layer.solve(
            lambda x, params, z0, *how: of_cells(x, params, z0, present, *how),
            lambda x, total, params, mask, z0, n, *how: of_fuse(
                x, total, params, mask, z0, counts, *how
            ),
            only(x, present), params, mask, z0_fuse, z0_cells, *how,
        )  # fmt: skip

    def adjoint(
        grad_z: Any, grad_cells: Any, states: Any, x: Any, params: Any, mask: Any, present: Any,
        *how: Any,
    ) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:  # fmt: skip
        operands = grad_z, grad_cells, states, x, params, mask
        if _complete(present):
            return backend.layer.adjoint(*operands, *how)
        if backend.adjoint_present is not None:
            found: tuple[list[Tensor], list[Tensor], LayerStatistics] | None
            found = backend.adjoint_present(*operands, present, *how)
            if found is not None:
                return found
        of_cells = functools.partial(_adjoint_cells, backend.cells.adjoint)
        of_fuse = functools.partial(_adjoint_fuse, backend.fuse.adjoint)
        counts = present.sum(0)
        dx, grads, statistics = layer.adjoint(
            lambda g, z, x, params, *how: of_cells(g, z, x, params, present, *how),
            lambda g, z, x, total, params, mask, n, *how: of_fuse(
                g, z, x, total, params, mask, counts, *how
            ),
            grad_z, grad_cells, states, only(x, present), params, mask, *how,
        )  # fmt: skip
        return only(dx, present), grads, statistics

    return Launchers(solve, adjoint)


def prepared(
    backend: Backend, params: list[Tensor], *how: Any
) -> Callable[[list[Tensor], Tensor | None], SolvedLayer]:
    """A backend's solve of a layer with these parameters, for many calls.

    Args:
        backend: whose launchers run.
        params: the list of ``layer.py``, tensors of (d, d), (d,), (N,), (1,); not to be changed.
        *how: num_groups, variant, solver, as a launcher takes them.

    Returns:
        ``solve(x, present)``: N tensors (B, d), and (N, B, 1) bool or None.
    """
    general = whole(backend).solve
    own = None if backend.prepare is None else backend.prepare(params, *how)

    def solve(x: list[Tensor], present: Tensor | None) -> SolvedLayer:
        found: SolvedLayer | None = None if own is None else own(x, present)
        if found is not None:
            return found
        return SolvedLayer(*general(x, params, None, None, None, present, *how))

    return solve


def penalty_layer(
    backend: Backend,
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1)
    *how: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The layer's Jacobian penalty over what is present.

    Args:
        backend: which computes it where all is; otherwise the blocks' plain form does.
        probes, states, x, flat_params, mask, *how: as for :func:`deqfuse.backends.penalty.
            penalty_layer`.
        present: which cells there are.

    Returns:
        As :func:`deqfuse.backends.penalty.penalty_layer`; values of absent cells are 0.
    """
    if _complete(present):
        return backend.penalty(probes, states, x, flat_params, mask, *how)
    assert present is not None
    if backend.penalty_present is not None:
        found: tuple[Tensor, list[Tensor], list[Tensor]] | None
        found = backend.penalty_present(probes, states, x, flat_params, mask, present, *how)
        if found is not None:
            return found

    def of_cells(
        probes: Tensor, z: Tensor, x: Tensor, params: list[Tensor], *how: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        value, dx, grads = z.new_zeros(z.shape[:-1]), z.new_zeros(z.shape), []
        for i, rows in _rows_of(present):
            some = probes[:, i : i + 1, rows], z[i : i + 1, rows], x[i : i + 1, rows]
            own, dx_own, d = penalty.of_cells(*some, params[SIZE * i : SIZE * (i + 1)], *how)
            value[i, rows], dx[i, rows] = own[0], dx_own[0]
            grads += d
        return value, dx, grads

    counts = present.sum(0)

    def of_fuse(
        probes: Tensor, z: Tensor, x: Tensor, total: Tensor, params: list[Tensor], mask: Any,
        _: int, *how: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        value, dx = z.new_zeros(z.shape[:-1]), z.new_zeros(z.shape)
        grads = [z.new_zeros(p.shape) for p in params] if how[-1] else []
        for n, rows in _rows_with(counts):
            some = probes[:, rows], z[rows], x[rows], total[rows]
            own, dx_own, d = penalty.of_fuse(*some, params, _pick(mask, rows), n, *how)
            value[rows], dx[rows] = own, dx_own
            grads = [a + b for a, b in zip(grads, d, strict=True)]
        return value, dx, grads

    value, dx, grads = penalty.join(
        of_cells, of_fuse, probes, states, only(x, present), flat_params, mask, *how
    )
    return value, only(dx, present), grads


def _complete(present: Tensor | None) -> bool:
    """Whether nothing is absent, as far as that is seen without waiting for a device."""
    return present is None or (present.device.type == "cpu" and bool(present.all()))


def only(x: list[Tensor], present: Tensor) -> list[Tensor]:
    """The features, or their gradients, with zeros where they are absent, whatever stands there."""
    return [torch.where(here, t, 0.0) for t, here in zip(x, present, strict=True)]


def _solve_cells(
    launch: Callable[..., Solved],
    x: Tensor,  # (N, B, d)
    params: list[Tensor],
    z0: Tensor | None,  # (N, B, d)
    present: Tensor,  # (N, B, 1)
    *how: Any,
) -> Solved:
    blocks = []
    for i, rows in _rows_of(present):
        start = None if z0 is None else z0[i : i + 1, rows]
        found = launch(x[i : i + 1, rows], params[SIZE * i : SIZE * (i + 1)], start, *how)
        z, residual, nfe, outcome = (t[0] for t in found[:4])
        own = Solved(z, residual, nfe, outcome, found.trace[:, 0])
        blocks.append(_spread([(rows, own)], x[i], how[-1], Outcome.ABSENT))
    z, residual, nfe, outcome = (
        torch.stack(parts) for parts in zip(*(b[:4] for b in blocks), strict=True)
    )
    return Solved(z, residual, nfe, outcome, torch.stack([b.trace for b in blocks], 1))


def _solve_fuse(
    launch: Callable[..., Solved],
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    z0: Tensor | None,  # (B, d)
    counts: Tensor,  # (B, 1)
    *how: Any,
) -> Solved:
    parts = []
    for n, rows in _rows_with(counts):
        some = x_fuse[rows], cell_sum[rows], params, _pick(mask, rows), _pick(z0, rows)
        parts.append((rows, launch(*some, n, *how)))
    return _spread(parts, x_fuse, how[-1], Outcome.EMPTY)


def _adjoint_cells(
    launch: Callable[..., Any],
    grad_z: Tensor,  # (N, B, d)
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    params: list[Tensor],
    present: Tensor,  # (N, B, 1)
    *how: Any,
) -> tuple[Tensor, list[Tensor], Statistics]:
    dx, grads, statistics = x.new_zeros(x.shape), [], _nothing(z)
    for i, rows in _rows_of(present):
        some = (t[i : i + 1, rows] for t in (grad_z, z, x))
        own, d, how_it_went = launch(*some, params[SIZE * i : SIZE * (i + 1)], *how)
        dx[i, rows] = own[0]
        grads += d
        for t, part in zip(statistics, how_it_went, strict=True):
            t[i, rows] = part[0]
    return dx, grads, statistics


def _adjoint_fuse(
    launch: Callable[..., Any],
    grad_z: Tensor,  # (B, d)
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    counts: Tensor,  # (B, 1)
    *how: Any,
) -> tuple[Tensor, Tensor, list[Tensor], Statistics]:
    statistics = _nothing(z)
    dx, dcell_sum = x_fuse.new_zeros(x_fuse.shape), cell_sum.new_zeros(cell_sum.shape)
    grads = [p.new_zeros(p.shape) for p in params] if how[-1] else []
    for n, rows in _rows_with(counts):
        some = grad_z[rows], z[rows], x_fuse[rows], cell_sum[rows], params, _pick(mask, rows)
        dx[rows], dcell_sum[rows], d, how_it_went = launch(*some, n, *how)
        grads = [a + b for a, b in zip(grads, d, strict=True)]
        for t, part in zip(statistics, how_it_went, strict=True):
            t[rows] = part
    return dx, dcell_sum, grads, statistics


def _rows_of(present: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every cell with the rows (R,) that have its modality."""
    for i, here in enumerate(present[..., 0]):
        yield i, torch.nonzero(here).flatten()


def _rows_with(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every number n > 0 of modalities with the rows (R,) that have so many."""
    for n in counts.unique().tolist():
        if n > 0:
            yield n, torch.nonzero(counts[:, 0] == n).flatten()


def _pick(t: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if t is None else t[rows]


def _spread(parts: list[tuple[Tensor, Solved]], like: Tensor, solver: Any, rest: Outcome) -> Solved:
    """Solves of some rows each as one of all rows of ``like`` (B, d); the others end as ``rest``.

    Out of place, so that autograd can follow: ``Unrolled()`` passes here.
    """
    dtype, count = compute_dtype(like.dtype), len(like)
    empty = torch.nan if rest is Outcome.EMPTY else 0.0
    z = torch.full(like.shape, empty, dtype=dtype, device=like.device)
    residual = z.new_full((count,), empty)
    nfe = torch.zeros(count, dtype=torch.int32, device=z.device)
    outcome = torch.full((count,), int(rest), dtype=torch.int8, device=z.device)
    trace = z.new_full((solver.max_iter if solver.trace else 0, count), torch.nan)
    for rows, found in parts:
        z = z.index_copy(0, rows, found.z)
        residual[rows], nfe[rows], outcome[rows] = (
            found.residual.detach(), found.nfe, found.outcome,
        )  # fmt: skip
        trace[:, rows] = found.trace.detach()
    return Solved(z, residual, nfe, outcome, trace)


def _nothing(z: Tensor) -> Statistics:
    """Of backward solves that had nothing to do."""
    return Statistics(
        z.new_zeros(z.shape[:-1]),
        torch.zeros(z.shape[:-1], dtype=torch.int32, device=z.device),
        torch.full(z.shape[:-1], int(Outcome.CONVERGED), dtype=torch.int8, device=z.device),
    )
