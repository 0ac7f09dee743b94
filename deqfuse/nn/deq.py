"""``DEQ(f)``: the equilibrium of any callable as a module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from deqfuse import checks, functional
from deqfuse.nn.inspection import modules_behind, refusing_at_first
from deqfuse.reporting import OnFailure
from deqfuse.result import SolvedMap, SolveInfo
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import GradientOption, Implicit, SolverOption

State = Tensor | tuple[Tensor, ...]
RowsMode = Literal["separate", "joint"]


class DEQ(nn.Module):
    """Solves ``z = f(z, *args)`` and differentiates the solution implicitly.

    The gradient is that of the implicit function theorem (Theorem 1 of arXiv 2306.16645); memory
    does not grow with the number of steps.

    Args:
        f: callable or module. Its state z is a tensor (B, ...) or a tuple of tensors that share B
            (a named tuple stays one); it returns a state of the same structure and shapes. It is
            called at every evaluation of the solve, some ten times a forward, and what it writes
            (running statistics of batch norm) moves on as often.
        rows: "separate": row b of f's output depends on row b of its input only; every row is a
            problem of its own and stops on its own. "joint": rows may see each other (batch
            statistics, attention or a graph over the batch), and the whole state is one problem
            with one residual; its tensors may have any shapes.
        solver: forward solver and tolerance.
        adjoint: how gradients pass; they reach ``args`` and everything that f closes over.
        on_failure: "warn", "raise" or "ignore" when rows do not converge, forward or backward.

    A module, or a bound method of one, as f is copied with its owner (``deepcopy``, EMA, SWA); a
    lambda that closes over ``self`` goes on with the original's parameters.

    An f that couples rows in the separate mode is refused where batch norm uses the statistics of
    the batch; other couplings show where they spoil the answer: a row that had stopped, and whose
    residual later steps of other rows moved off the tolerance, ends as ``Outcome.COUPLED``.

    Raises:
        TypeError: f is not callable, or an option is of a wrong type.
        ValueError: options that do not go together.

    Example:
        >>> import torch
        >>> from deqfuse import DEQ
        >>> weight = torch.nn.Parameter(0.1 * torch.randn(16, 16))
        >>> deq = DEQ(lambda z, x: torch.tanh(z @ weight + x))
        >>> x = torch.randn(8, 16)
        >>> z, info = deq(torch.zeros_like(x), x)  # z (8, 16)
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        rows: RowsMode = "separate",
        solver: SolverOption = Anderson(),  # noqa: B008 - frozen
        adjoint: GradientOption = Implicit(),  # noqa: B008 - frozen
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"f: expected a callable f(z, *args), got {type(f).__name__}")
        checks.one_of("rows", rows, get_args(RowsMode))
        checks.options(solver, adjoint, on_failure)
        self.f, self.rows = f, rows
        self.solver, self.adjoint, self.on_failure = solver, adjoint, on_failure

    @overload
    def forward(self, z0: Tensor, *args: Any) -> tuple[Tensor, SolveInfo]: ...

    @overload
    def forward(
        self, z0: tuple[Tensor, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], SolveInfo]: ...

    def forward(self, z0: State, *args: Any) -> tuple[State, SolveInfo]:
        """Equilibrium and statistics.

        Args:
            z0: start, tensor (B, ...) or tuple of such, of one floating dtype, with
                ``rows="joint"`` of any shapes; no gradient flows to it.
            *args: passed on to f.

        Returns:
            The equilibrium, structured like ``z0``, (B, ...) each, and a :class:`SolveInfo` whose
            ``fuse`` block has shape (B,), with ``rows="joint"`` (1,): one problem. Always both,
            since not every f converges; for ``nn.Sequential`` write a module that keeps the first.

        Raises:
            TypeError: z0, or what f returned, has a wrong type or dtype.
            ValueError: z0, or what f returned, has a wrong shape or device; f takes batch
                statistics over separate rows.
            NotImplementedError: inside a ``torch.func`` transform or forward-mode differentiation.
            ConvergenceError: rows failed and ``on_failure="raise"``.
        """
        layout = _Layout(z0, joint=self.rows == "joint")

        def rows(z: Tensor) -> Tensor:
            return layout.flatten(self.f(layout.unflatten(z), *args), "f(z, *args)")

        if self.rows == "separate" and layout.count > 1:
            remedy = "rows='joint', eval() for this module, or LayerNorm or GroupNorm instead"
            rows = refusing_at_first(rows, lambda: modules_behind(self.f), "f", remedy)

        z, block, backend = functional.fixed_point(
            rows,
            layout.flatten(z0, "z0"),
            solver=self.solver,
            adjoint=self.adjoint,
            on_failure=self.on_failure,
        )
        star = z.detach()
        info = SolveInfo(block, None, backend, (lambda: SolvedMap(rows, star),))
        return layout.unflatten(z), info


class _Layout:
    """How a state is laid out as rows (B, n), or as one row (1, n) where it is joint, and back."""

    def __init__(self, z0: State, joint: bool) -> None:
        self.is_tuple = isinstance(z0, tuple)
        # A tuple's own type: f finds the fields of a named one.
        self.build: Callable[[Any], Any] = getattr(type(z0), "_make", type(z0))
        parts = z0 if isinstance(z0, tuple) else (z0,)
        if not parts:
            raise ValueError("z0: expected a tensor or a non-empty tuple of tensors, got ()")
        if isinstance(z0, list):
            raise TypeError("z0: expected a tensor or a tuple of them, got list. Remedy: tuple(z0)")
        for i, part in enumerate(parts):
            name = f"z0[{i}]" if self.is_tuple else "z0"
            checks.tensor(name, part, like=parts[0] if i else None)
            if not joint and (part.dim() < 1 or part.shape[0] != parts[0].shape[0]):
                raise ValueError(
                    f"{name}: expected shape (B, ...) with one row per sample"
                    f"{f' and B = {parts[0].shape[0]}' if i else ''}, got {tuple(part.shape)}. "
                    "Remedy: rows='joint' for a state that is one problem"
                )
        self.like = parts[0]  # for dtype and device
        self.shapes = [tuple(part.shape) for part in parts]
        self.count = 1 if joint else self.shapes[0][0]
        self.sizes = [math.prod(shape if joint else shape[1:]) for shape in self.shapes]

    def flatten(self, state: Any, name: str) -> Tensor:
        """State -> rows (B, n), one row where it is joint."""
        parts = state if isinstance(state, tuple) else (state,)
        if isinstance(state, tuple) != self.is_tuple or len(parts) != len(self.shapes):
            wanted = f"a tuple of {len(self.shapes)} tensors" if self.is_tuple else "a tensor"
            if self.is_tuple and isinstance(state, list):
                raise TypeError(f"{name}: expected {wanted}, got list. Remedy: return a tuple")
            raise TypeError(f"{name}: expected {wanted} like z0, got {type(state).__name__}")
        for i, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            entry = f"{name}[{i}]" if self.is_tuple else name
            checks.tensor(entry, part, like=self.like)
            checks.shape(entry, part, shape, "the shape of z0")
        rows = [p.reshape(self.count, n) for p, n in zip(parts, self.sizes, strict=True)]
        return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]

    def unflatten(self, rows: Tensor) -> Any:
        """The inverse of :meth:`flatten`."""
        if not self.is_tuple:
            return rows.reshape(self.shapes[0])
        # Not split(): torch forbids in-place use of its views.
        bounds = [0, *itertools.accumulate(self.sizes)]
        return self.build(
            rows[:, start:stop].reshape(shape)
            for (start, stop), shape in zip(itertools.pairwise(bounds), self.shapes, strict=True)
        )
