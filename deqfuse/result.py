"""What a solve says about itself: outcome per row, statistics per block, record per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deqfuse import reporting
from deqfuse.outcome import Outcome

__all__ = ["BlockInfo", "SolveInfo"]


@dataclass(frozen=True)
class BlockInfo:
    """Statistics of one kind of block. Every field is a detached tensor on the solve's device.

    Shapes: ``(...)`` for the fuse block and for ``DEQ``, ``(N, ...)`` for the modality cells, where
    ``...`` are the leading dimensions of the input. ``trace`` has one more dimension in front.
    """

    residual: Tensor  # |f(z) - z| / (|f(z)| + 1e-5) at the best iterate z; f(z) is returned
    nfe: Tensor  # int32, evaluations of f (JVPs and VJPs included) while the row was active
    outcome: Tensor  # int8, values of Outcome
    # (steps, ...): residual at every step; NaN once the row had stopped. DEQ's ends with its last
    # row; the layer's has max_iter steps (with rescue more), since a solve there is one operator.
    trace: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """(...) bool: the row reached its tolerance."""
        return self.outcome == int(Outcome.CONVERGED)

    @classmethod
    def exact(cls, z: Tensor, nfe: int) -> BlockInfo:
        """For a block solved in closed form by z (..., d), an answer where it is finite."""
        finite = z.detach().isfinite().all(-1)
        return cls(
            residual=torch.where(finite, 0.0, torch.nan).to(z.dtype),
            nfe=torch.full(finite.shape, nfe, device=z.device, dtype=torch.int32),
            outcome=torch.where(finite, int(Outcome.CONVERGED), int(Outcome.NON_FINITE)).to(
                torch.int8
            ),
        )

    def reshape(self, *shape: int) -> BlockInfo:
        """The same statistics with rows arranged as ``shape``."""
        return BlockInfo(
            self.residual.reshape(shape),
            self.nfe.reshape(shape),
            self.outcome.reshape(shape),
            None if self.trace is None else self.trace.reshape(self.trace.shape[0], *shape),
        )


@dataclass(frozen=True)
class SolveInfo:
    """What happened in one forward solve.

    Statistics stay on the device until someone reads them. ``jacobian_penalty`` and
    ``spectral_radius`` are computed when called; for that the record keeps the equilibrium and the
    inputs alive, so drop it when you no longer need it. Copies (pickle, deepcopy) keep the
    statistics only.
    """

    fuse: BlockInfo  # (...)
    cells: BlockInfo | None  # (N, ...); None for DEQ, which has a single block
    backend: str  # the backend that ran, never "auto"
    # Each gives (f, z*) of one kind of block, for the Jacobian measurements below. () where there
    # is no equilibrium or it is in closed form (J = 0), None where nothing was kept to measure.
    blocks: tuple[Callable[[], Any], ...] | None = field(default=(), repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: the statistics, not the closures over the graph."""
        return {**vars(self), "blocks": None if self.blocks else self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        """What is known without a look at the device: shapes and names."""
        cells = "" if self.cells is None else f", cells={tuple(self.cells.outcome.shape)}"
        rows = tuple(self.fuse.outcome.shape)
        return f"SolveInfo(rows={rows}{cells}, backend={self.backend!r})"

    def reshape(self, *rows: int) -> SolveInfo:
        """The same record with rows arranged as ``rows``."""
        cells = self.cells
        if cells is not None:
            cells = cells.reshape(cells.residual.shape[0], *rows)
        return dataclasses.replace(self, fuse=self.fuse.reshape(*rows), cells=cells)

    @property
    def converged(self) -> Tensor:
        """(...) bool: every block of that row converged."""
        reporting.flush()
        if self.cells is None:
            return self.fuse.converged
        return self.fuse.converged & self.cells.converged.all(0)

    @property
    def residual(self) -> Tensor:
        """(...): residual of the row's worst block."""
        if self.cells is None:
            return self.fuse.residual
        return torch.maximum(self.fuse.residual, self.cells.residual.amax(0))  # NaN if any is

    @property
    def outcome(self) -> Tensor:
        """(...) int8, values of ``Outcome``: of the row's first block that failed, cells first."""
        found = self.fuse.outcome
        if self.cells is not None:
            for block in reversed(self.cells.outcome.unbind()):
                found = torch.where(block == int(Outcome.CONVERGED), found, block)
        return found

    @property
    def nfe(self) -> Tensor:
        """(...) int32: evaluations of the row's slowest block."""
        if self.cells is None:
            return self.fuse.nfe
        return torch.maximum(self.fuse.nfe, self.cells.nfe.amax(0))

    def jacobian_penalty(self, num_probes: int = 1) -> Tensor:
        """Scalar ``sum_b |J_bb^T v|^2 / (B (N+1) d)`` with Gaussian probes v, for the loss.

        Differentiable where gradients are on, a plain number under ``torch.no_grad()``. The
        equilibrium is held constant (its own dependence on the parameters is not followed), as in
        the authors' released code; in the loss it keeps the layer contractive in training. One
        double VJP per probe and block, on the reference path. Blocks in closed form count as 0,
        and so does ``ProFusion(steps=)``; with ``weight_tied_steps`` it is the Jacobian of one more
        step.

        Raises:
            RuntimeError: the solve or this call under ``torch.inference_mode()``; or this record
                is a copy, which keeps nothing to measure.
        """
        from deqfuse.diagnostics.jacobian import jacobian_penalty

        return jacobian_penalty(self._blocks("jacobian_penalty"), num_probes)

    def spectral_radius(self, num_iters: int = 60) -> Tensor:
        """(blocks, ...) largest ``|eigenvalue|`` of each row's J_bb, by power iteration.

        The cells come first, the fuse block last; blocks in closed form are left out. Below 1 the
        plain iteration converges. Raises as :meth:`jacobian_penalty`.
        """
        from deqfuse.diagnostics.jacobian import spectral_radius

        rows = self.fuse.residual.shape
        radii = [spectral_radius(f, z, num_iters) for f, z in self._blocks("spectral_radius")]
        if not radii:
            return self.fuse.residual.new_zeros(0, *rows)
        # (N, B) for the cells, (B,) for the fuse block; spelled out, as -1 is ambiguous for B = 0.
        parts = [r.reshape(r.shape[0] if r.dim() > 1 else 1, *rows) for r in radii]
        return torch.cat(parts)

    def _blocks(self, what: str) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
        """(f, z*) of every kind of block that has a Jacobian."""
        if self.blocks is None:
            raise RuntimeError(
                f"{what}: expected the record that forward returned, got a copy of it (pickle, "
                "deepcopy), which keeps the statistics only. Remedy: measure before copying"
            )
        return [block() for block in self.blocks]
