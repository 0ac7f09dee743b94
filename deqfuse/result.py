"""What a solve says about itself: outcome per row, statistics per block, record per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse import checks, reporting
from deqfuse.outcome import Outcome, failed
from deqfuse.torch_private import in_transform, traced

__all__ = ["BlockInfo", "SolveInfo"]


@dataclass(frozen=True)
class BlockInfo:
    """Statistics of one kind of block, per row. Every field is a detached tensor on the solve's
    device.

    A row is one sample, a problem of its own; ``(...)`` are the leading dimensions of the input.
    Statistics have this shape for the fuse block and for ``DEQ``; for the modality cells they are
    ``(N, ...)``, one entry for each cell.

    Attributes:
        residual: (...) relative residual ``|f(z) - z| / (|f(z)| + 1e-5)`` at the row's best iterate
            z; f(z) is what the solve returned.
        nfe: (...) int32, evaluations of f (JVPs and VJPs included) while the row was active.
        outcome: (...) int8, values of :class:`Outcome`.
        trace: (steps, ...) residual at every step, NaN once the row had stopped; None without
            ``solver(trace=True)``. That of ``DEQ`` ends with its last row; the layer's has max_iter
            steps, since a solve there is one operator. The rescue of a row is not traced.
    """

    residual: Tensor  # (...)
    nfe: Tensor  # (...) int32
    outcome: Tensor  # (...) int8
    trace: Tensor | None = None  # (steps, ...)

    @property
    def converged(self) -> Tensor:
        """(...) bool: the row reached its tolerance, by solver or rescue, or there is no row."""
        return ~failed(self.outcome)

    @property
    def rescued(self) -> Tensor:
        """(...) bool: the solver gave the row up, and continuation reached the tolerance."""
        return self.outcome == int(Outcome.RESCUED)

    @classmethod
    def exact(cls, z: Tensor, nfe: int) -> BlockInfo:
        """Statistics of a block that was solved in closed form: converged where it is finite.

        Args:
            z: (..., d) its answer.
            nfe: evaluations that each row took.

        Returns:
            The statistics, of shape (...).
        """
        finite = z.detach().isfinite().all(-1)
        return cls(
            residual=torch.where(finite, 0.0, torch.nan).to(z.dtype),
            nfe=torch.full(finite.shape, nfe, device=z.device, dtype=torch.int32),
            outcome=torch.where(finite, int(Outcome.CONVERGED), int(Outcome.NON_FINITE)).to(
                torch.int8
            ),
        )

    def reshape(self, *shape: int) -> BlockInfo:
        """The same statistics with rows arranged as ``shape``.

        Args:
            *shape: new dimensions of the statistics, -1 for one of them to be inferred.

        Returns:
            The statistics as views of these, where torch can.
        """
        return BlockInfo(
            self.residual.reshape(shape),
            self.nfe.reshape(shape),
            self.outcome.reshape(shape),
            None if self.trace is None else self.trace.reshape(self.trace.shape[0], *shape),
        )


class SolvedMap(NamedTuple):
    """A map and its equilibrium, of which Jacobians can be measured.

    Attributes:
        f: the map, (..., d) -> (..., d), row by row.
        z: (..., d) its equilibrium.
        linearize: () -> (v -> J^T v) at z, (..., d) to (..., d), where there are products that need
            no graph; None otherwise.
        elements: how many numbers of z belong to something that is present, an int or a scalar
            tensor of shape (); None for all.
        rows: how many of the record's rows one row of z stands for: T where a given cell takes T
            of them at once.
    """

    f: Callable[[Tensor], Tensor]
    z: Tensor  # (..., d)
    linearize: Callable[[], Callable[[Tensor], Tensor]] | None = None
    elements: Tensor | int | None = None
    rows: int = 1


@dataclass(frozen=True)
class SolveInfo:
    """What happened in one forward solve.

    Statistics stay on the device until someone reads them. :meth:`jacobian_penalty` and
    :meth:`spectral_radius` are computed when called; for that the record keeps the equilibrium and
    the inputs alive, so drop it when you no longer need it. Copies (pickle, deepcopy) keep the
    statistics only.

    Attributes:
        fuse: statistics (...) of the fuse block, or of the single block that ``DEQ`` and
            ``ProFusion`` have; ``...`` are the leading dimensions of the input.
        cells: statistics (N, ...) of the modality cells; None where there is a single block.
        backend: name of the backend that ran, never "auto".
        blocks: for the Jacobian measurements, one function without arguments for each kind of
            block, which gives a :class:`SolvedMap`. () where there is no equilibrium or it is in
            closed form (J = 0), None in a copy, where nothing was kept to measure.
        penalty: ``(num_probes, probes=None)`` -> the whole layer's Jacobian penalty, a scalar of
            shape (), where there is an operator for it; None otherwise. Probes (num_probes, N + 1,
            B, d) take the place of drawn ones.
    """

    fuse: BlockInfo  # (...)
    cells: BlockInfo | None  # (N, ...)
    backend: str
    blocks: tuple[Callable[[], SolvedMap], ...] | None = field(
        default=(), repr=False, compare=False
    )
    penalty: Callable[..., Tensor] | None = field(default=None, repr=False, compare=False)

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
        """The same record with rows arranged as ``rows``.

        Args:
            *rows: new leading dimensions (...) in place of (B,); the cells' N stays in front.

        Returns:
            A record with these shapes.
        """
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
    def rescued(self) -> Tensor:
        """(...) bool: the solver gave up some block of the row, which continuation solved.

        Such an equilibrium may repel: :meth:`spectral_radius` tells.
        """
        if self.cells is None:
            return self.fuse.rescued
        return self.fuse.rescued | self.cells.rescued.any(0)

    @property
    def residual(self) -> Tensor:
        """(...) relative residual of the row's worst block; NaN if any block's is."""
        if self.cells is None:
            return self.fuse.residual
        return torch.maximum(self.fuse.residual, self.cells.residual.amax(0))  # NaN if any is

    @property
    def outcome(self) -> Tensor:
        """(...) int8, values of ``Outcome``: of the row's first block that failed, cells first.

        Where none failed, RESCUED if one was, or else CONVERGED.
        """
        found = self.fuse.outcome
        if self.cells is not None:
            for block in reversed(self.cells.outcome.unbind()):
                told = ~failed(found) & (block == int(Outcome.RESCUED))
                found = torch.where(failed(block) | told, block, found)
        return found

    @property
    def nfe(self) -> Tensor:
        """(...) int32: evaluations of the row's slowest block."""
        if self.cells is None:
            return self.fuse.nfe
        return torch.maximum(self.fuse.nfe, self.cells.nfe.amax(0))

    def jacobian_penalty(self, num_probes: int = 1, *, probability: float = 1.0) -> Tensor:
        """Jacobian penalty: the size of the map's Jacobian at the equilibrium, a term for the loss.

        ``sum_b |J_bb^T v|^2 / (B (N+1) d)`` over the blocks b with Gaussian probes v: a random
        estimate of the squared Frobenius norms per feature (Bai et al., "Stabilizing Equilibrium
        Models by Jacobian Regularization", arXiv 2106.14342). In the loss it keeps the layer
        contractive in training, so that rows go on converging.

        Differentiable where gradients are on, a plain number under ``torch.no_grad()``. The
        equilibrium is held constant (its own dependence on the parameters is not followed), as in
        the authors' released code. For the equations of the paper and of the released code it is
        one operator, which computes value and gradients together in closed form (in float32 on the
        ``cpu`` backend from 128 features on with products of fewer digits, relative error some
        1e-4, far below the noise of the probes); for given cells, ablations, ``DEQ`` and
        ``ProFusion`` it is one double VJP per probe and block. Blocks in closed form
        count as 0, and so does ``ProFusion(steps=)``; with ``weight_tied_steps`` it is the Jacobian
        of one more step.

        Args:
            num_probes: probes v per row and block, at least 1, drawn from torch's default
                generator; more of them make the estimate less noisy.
            probability: chance in (0, 1] that the penalty is computed at all; otherwise a 0 without
                a graph is returned. What is computed is divided by it, so that the expectation is
                the same. Less than 1 in eager mode only.

        Returns:
            Scalar of shape (), in the dtype of the solve.

        Raises:
            TypeError: ``num_probes`` is no integer, ``probability`` no number.
            ValueError: ``num_probes`` is less than 1, ``probability`` outside (0, 1], or less than
                1 under ``torch.compile`` or ``torch.func``.
            RuntimeError: the solve or this call under ``torch.inference_mode()``; or this record is
                a copy, which keeps nothing to measure.
            DoubleBackwardError: later, where the operator's gradient is differentiated again.
        """
        from deqfuse.diagnostics.jacobian import check_differentiable, jacobian_penalty

        checks.positive_int("num_probes", num_probes)
        if not 0 < checks.positive_float("probability", probability) <= 1:
            raise ValueError(f"probability: expected a number in (0, 1], got {probability!r}")
        blocks = self._measurable("jacobian_penalty")
        check_differentiable("jacobian_penalty", self.fuse.residual)
        if probability < 1:
            if in_transform() or traced(self.fuse.residual):
                raise ValueError(
                    "probability: expected 1 under torch.compile and torch.func, got "
                    f"{probability}: what is recorded decides nothing. Remedy: decide outside"
                )
            if torch.rand(()) >= probability:
                return self.fuse.residual.new_zeros(())
        if blocks and self.penalty is not None:
            return self.penalty(num_probes) / probability
        maps = [block() for block in blocks]
        value = jacobian_penalty([(m.f, m.z) for m in maps], num_probes) / probability
        if all(m.elements is None for m in maps):
            return value
        counts = [m.z.numel() if m.elements is None else m.elements for m in maps]
        return value * sum(m.z.numel() for m in maps) / sum(counts)

    def spectral_radius(self, num_iters: int = 60) -> Tensor:
        """Largest ``|eigenvalue|`` of each row's Jacobian J_bb of each block, by power iteration.

        Below 1 the plain iteration ``z <- f(z)`` converges near the equilibrium.

        Args:
            num_iters: products with J^T, at least 2; the estimate is the mean growth over the
                second half of them.

        Returns:
            (blocks, ...): the cells first, the fuse block last; blocks in closed form are left out,
            absent cells are 0.

        Raises:
            TypeError: ``num_iters`` is no integer.
            ValueError: ``num_iters`` is less than 2.
            RuntimeError: as for :meth:`jacobian_penalty`.
        """
        from deqfuse.diagnostics.jacobian import check_differentiable, radius_of, spectral_radius

        rows, radii = self.fuse.residual.shape, []
        for block in self._measurable("spectral_radius"):
            f, z, linearize, _, each = block()
            check_differentiable("spectral_radius", z)
            if linearize is None:
                radius = spectral_radius(f, z, num_iters)
            else:
                radius = radius_of(linearize(), z, num_iters)
            radii.append(radius.repeat_interleave(each, -1) if each != 1 else radius)
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
