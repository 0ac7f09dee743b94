"""What a solve says about itself: outcome per row, statistics per block, record per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import checks, reporting
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
    def exact(cls, like: Tensor, shape: tuple[int, ...], nfe: int) -> BlockInfo:
        """For a block solved in closed form (``like`` gives device and dtype)."""
        return cls(
            residual=torch.zeros(shape, device=like.device, dtype=like.dtype),
            nfe=torch.full(shape, nfe, device=like.device, dtype=torch.int32),
            outcome=torch.zeros(shape, device=like.device, dtype=torch.int8),
        )

    def reshape(self, *shape: int) -> BlockInfo:
        """The same statistics with rows arranged as ``shape``."""
        return BlockInfo(
            self.residual.reshape(shape),
            self.nfe.reshape(shape),
            self.outcome.reshape(shape),
            None if self.trace is None else self.trace.reshape(self.trace.shape[0], *shape),
        )


class SolvedMap(NamedTuple):
    """A map and its equilibrium, of which Jacobians can be measured."""

    f: Callable[[Tensor], Tensor]  # (..., d) -> (..., d), row by row
    z: Tensor  # (..., d)
    linearize: Callable[[], Callable[[Tensor], Tensor]] | None = None  # -> (v -> J^T v), if known


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
    # Each gives one kind of block, for the Jacobian measurements below. () where there is no
    # equilibrium or it is in closed form (J = 0), None where nothing was kept to measure.
    blocks: tuple[Callable[[], SolvedMap], ...] | None = field(
        default=(), repr=False, compare=False
    )
    # The whole layer's penalty for a number of probes, where there is an operator for it.
    penalty: Callable[[int], Tensor] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: the statistics, not the closures over the graph."""
        return {**vars(self), "blocks": None if self.blocks else self.blocks, "penalty": None}

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

    def jacobian_penalty(self, num_probes: int = 1, *, probability: float = 1.0) -> Tensor:
        """Scalar ``sum_b |J_bb^T v|^2 / (B (N+1) d)`` with Gaussian probes v, for the loss.

        An estimate of the squared Frobenius norm of the Jacobian J_bb of every block b, per element
        of the state (Bai et al., "Stabilizing Equilibrium Models by Jacobian Regularization",
        arXiv 2106.14342). In the loss it keeps the layer contractive in training. The equilibrium
        is held constant (its own dependence on the parameters is not followed), as in the authors'
        released code.

        For the equations of the paper and of the released code it is one operator, which computes
        value and gradients in closed form; for ablations, ``DEQ`` and ``ProFusion`` one double VJP
        per probe and block. Blocks in closed form count as 0, and so does ``ProFusion(steps=)``;
        with ``weight_tied_steps`` it is the Jacobian of one more step.

        Args:
            num_probes: probes per row and block, drawn from torch's default generator.
            probability: chance that the penalty is computed at all; otherwise 0 is returned. What
                is computed is divided by it, so that the expectation stays the same.

        Returns:
            A scalar, differentiable where gradients are on.

        Raises:
            RuntimeError: the solve or this call under ``torch.inference_mode()``; or this record
                is a copy, which keeps nothing to measure.
            DoubleBackwardError: its gradient is differentiated again (one operator only).
        """
        from deqfuse.diagnostics.jacobian import check_differentiable, jacobian_penalty

        checks.positive_int("num_probes", num_probes)
        if not 0 < checks.positive_float("probability", probability) <= 1:
            raise ValueError(f"probability: expected a number in (0, 1], got {probability!r}")
        blocks = self._measurable("jacobian_penalty")
        if probability < 1 and torch.rand(()) >= probability:
            return self.fuse.residual.new_zeros(())
        if blocks and self.penalty is not None:
            check_differentiable("jacobian_penalty", self.fuse.residual)
            return self.penalty(num_probes) / probability
        return jacobian_penalty([block()[:2] for block in blocks], num_probes) / probability

    def spectral_radius(self, num_iters: int = 60) -> Tensor:
        """(blocks, ...) largest ``|eigenvalue|`` of each row's J_bb, by power iteration.

        The cells come first, the fuse block last; blocks in closed form are left out. Below 1 the
        plain iteration converges.

        Args:
            num_iters: products with J^T, at least 2.

        Raises:
            RuntimeError: as in :meth:`jacobian_penalty`.
        """
        from deqfuse.diagnostics.jacobian import check_differentiable, radius_of, spectral_radius

        rows, radii = self.fuse.residual.shape, []
        for f, z, linearize in (block() for block in self._measurable("spectral_radius")):
            check_differentiable("spectral_radius", z)
            if linearize is None:
                radii.append(spectral_radius(f, z, num_iters))
            else:
                radii.append(radius_of(linearize(), z, num_iters))
        if not radii:
            return self.fuse.residual.new_zeros(0, *rows)
        # (N, B) for the cells, (B,) for the fuse block; spelled out, as -1 is ambiguous for B = 0.
        parts = [r.reshape(r.shape[0] if r.dim() > 1 else 1, *rows) for r in radii]
        return torch.cat(parts)

    def _measurable(self, what: str) -> tuple[Callable[[], SolvedMap], ...]:
        """Every kind of block that has a Jacobian."""
        if self.blocks is None:
            raise RuntimeError(
                f"{what}: expected the record that forward returned, got a copy of it (pickle, "
                "deepcopy), which keeps the statistics only. Remedy: measure before copying"
            )
        return self.blocks
