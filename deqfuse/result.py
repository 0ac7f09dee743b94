"""What a solve says about itself: an outcome per row, statistics per block, one record per layer."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["BlockInfo", "Outcome", "SolveInfo"]


class Outcome(enum.IntEnum):
    """How the solve of one row ended. Stored per row as int8."""

    CONVERGED = 0
    MAX_ITER = 1
    STALLED = 2
    NON_FINITE = 3

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Outcome.CONVERGED: "the relative residual reached the tolerance",
    Outcome.MAX_ITER: "the evaluation budget ran out first",
    Outcome.STALLED: "no new best residual in 20 evaluations",
    Outcome.NON_FINITE: "the row's map became NaN or infinite",
}


@dataclass(frozen=True)
class BlockInfo:
    """Statistics of one kind of block. Every field is a detached tensor on the solve's device.

    Shapes: ``(...)`` for the fuse block and for ``DEQ``, ``(N, ...)`` for the modality cells, where
    ``...`` are the leading dimensions of the input. ``trace`` has one more dimension in front.
    """

    residual: Tensor  # relative residual |f(z) - z| / (|f(z)| + 1e-5) of the returned iterate
    nfe: Tensor  # int32, evaluations of f (JVPs and VJPs included) while the row was active
    outcome: Tensor  # int8, values of Outcome
    trace: Tensor | None = None  # (steps, ...): residual at every step; NaN once the row had stopped

    @property
    def converged(self) -> Tensor:
        """(...) bool: the row reached its tolerance."""
        return self.outcome == int(Outcome.CONVERGED)

    @classmethod
    def exact(cls, like: Tensor, shape: tuple[int, ...], nfe: int) -> BlockInfo:
        """For a block whose equilibrium is known in closed form (``like`` gives device and dtype)."""
        return cls(
            residual=torch.zeros(shape, device=like.device, dtype=like.dtype),
            nfe=torch.full(shape, nfe, device=like.device, dtype=torch.int32),
            outcome=torch.zeros(shape, device=like.device, dtype=torch.int8),
        )

    def reshape(self, *shape: int) -> BlockInfo:
        """The same statistics with rows arranged as ``shape`` (the trace keeps its first dimension)."""
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
    inputs alive, so drop it when you no longer need it.
    """

    fuse: BlockInfo  # (...)
    cells: BlockInfo | None  # (N, ...); None for DEQ, which has a single block
    backend: str  # the backend that ran, never "auto"
    blocks: tuple[Callable[[], Any], ...] = field(default=(), repr=False, compare=False)

    @property
    def converged(self) -> Tensor:
        """(...) bool: every block of that row converged."""
        if self.cells is None:
            return self.fuse.converged
        return self.fuse.converged & self.cells.converged.all(0)

    @property
    def nfe(self) -> Tensor:
        """(...) int32: evaluations of the row's slowest block."""
        if self.cells is None:
            return self.fuse.nfe
        return torch.maximum(self.fuse.nfe, self.cells.nfe.amax(0))

    def jacobian_penalty(self, num_probes: int = 1) -> Tensor:
        """Differentiable scalar: sum over blocks of ``|J_bb^T v|^2 / (B (N+1) d)``, Gaussian probes v.

        The equilibrium is held constant (its own dependence on the parameters is not followed), as in
        the authors' released code; add it to the loss to keep the layer contractive in training.
        Needs grad mode. One double VJP per probe and block, on the reference path.
        """
        from deqfuse.diagnostics.jacobian import jacobian_penalty

        return jacobian_penalty([block() for block in self.blocks], num_probes)

    def spectral_radius(self, num_iters: int = 60) -> Tensor:
        """(blocks, ...) estimate of each row's largest ``|eigenvalue|`` of J_bb, by power iteration.

        The cells come first, the fuse block last. Below 1 the plain iteration converges.
        """
        from deqfuse.diagnostics.jacobian import spectral_radius

        rows = self.fuse.residual.shape
        radii = [spectral_radius(*block(), num_iters=num_iters) for block in self.blocks]
        return torch.cat([r.reshape(-1, *rows) for r in radii])
