"""``WarmStart``: solves of a training that begin where those of the last epochs ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deqfuse import checks
from deqfuse.backends.problem import compute_dtype
from deqfuse.nn.fusion import DEQFusion
from deqfuse.outcome import Outcome
from deqfuse.result import SolveInfo
from deqfuse.torch_private import traced

__all__ = ["WarmStart"]

_NEVER = -torch.inf


class _Table(NamedTuple):
    """What is remembered, of every sample and block: the cells, then the fuse step.

    Sample r has two places, r and R + r, and takes them in turns.
    """

    states: Tensor  # (N + 1, 2 R, d)
    times: Tensor  # (N + 1, 2 R), by the clock when they were found
    turn: Tensor  # (R,) int64, which place is the newer one, 0 or 1
    clock: Tensor  # (1,), samples handed in; compilers take numbers, and tensors (), for constants

    def places(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Of the samples ``at`` (B,): where the newer states lie, and where the older ones."""
        turn, count = self.turn[at], len(self.turn)
        return at + turn * count, at + (1 - turn) * count


class WarmStart(nn.Module):
    """A :class:`DEQFusion` whose training solves start from what their samples had before.

    From epoch to epoch the equilibrium of a sample moves little, and nearly in a straight line. A
    table keeps the last two equilibria of every sample, of all N cells and of the fuse step; a
    solve starts where the line through them leads. The answer is found to the same tolerance as
    ever, in fewer evaluations. Where a sample has several equilibria, the start decides which of
    them is found: a warm start follows the one that training has followed.

    Only training mode uses the table: evaluation starts cold, so that its answers depend on the
    inputs alone. The backward solve always starts at its right-hand side, which costs it nothing.

    Args:
        fusion: the layer; its parameters and its options stay its own.
        num_rows: R, how many samples there are. The table takes ``2 R (N + 1) d`` numbers.
        dtype: of the table; that of the features when not given. bfloat16 halves the memory of
            float32, and its rounding costs up to one evaluation where starts are good.
        max_age: epochs (R samples handed in) after which an unused entry is not a start any more.

    The table is no buffer: it is made by the first training call, on the device of the features;
    under DDP each process has its own, for the samples that its sampler gives it (one that gives a
    process the same samples in every epoch makes most of it). ``state_dict`` leaves it out: the
    first epoch after a restart is cold.

    Raises:
        TypeError: ``fusion`` is no :class:`DEQFusion`; a number or a dtype that is none.
        ValueError: a layer that solves for nothing; a number out of range.

    Example:
        >>> import torch
        >>> from deqfuse import DEQFusion, WarmStart
        >>> fusion = WarmStart(DEQFusion(64, num_modalities=2), num_rows=1000)
        >>> rows = torch.randint(1000, (8,))  # which samples of the data set these are
        >>> z = fusion([torch.randn(8, 64), torch.randn(8, 64)], rows)
    """

    def __init__(
        self,
        fusion: DEQFusion,
        num_rows: int,
        *,
        dtype: torch.dtype | None = None,
        max_age: float = 3.0,
    ) -> None:
        super().__init__()
        if not isinstance(fusion, DEQFusion):
            raise TypeError(f"fusion: expected a DEQFusion, got {type(fusion).__name__}")
        if fusion.weight_tied_steps is not None or fusion.combine_kind == "weighted_sum":
            raise ValueError(
                "fusion: expected a layer that solves for an equilibrium, got "
                f"weight_tied_steps={fusion.weight_tied_steps}, combine={fusion.combine_kind!r}"
            )
        if dtype is not None and dtype not in checks.FLOATING:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype!r}")
        self.fusion, self.dtype = fusion, dtype
        self.num_rows = checks.positive_int("num_rows", num_rows)
        self.max_age = checks.positive_float("max_age", max_age)
        self.reset()

    def reset(self) -> None:
        """Forgets all equilibria: the next solves start cold."""
        self._table: _Table | None = None

    def forward(
        self,
        features: Sequence[Tensor],  # N tensors (..., d_i)
        rows: Tensor,  # (...)
        *,
        present: Tensor | None = None,  # (..., N)
        return_info: bool = False,
        return_cells: bool = False,
    ) -> Any:
        """Fused features, as :meth:`DEQFusion.forward` gives them.

        Args:
            features: one tensor (..., d_i) per modality.
            rows: (...) int64, which sample each row is: a number in [0, R). A sample that comes
                twice in a call is remembered once.
            present: (..., N) bool, which modalities a row has; all when not given.
            return_info: also return a :class:`SolveInfo`.
            return_cells: also return the modality equilibria (N, ..., d).

        Returns:
            z (..., d); with the flags a tuple ``(z, zs)``, ``(z, info)`` or ``(z, zs, info)``.

        Raises:
            TypeError: as :meth:`DEQFusion.forward`, or ``rows`` is no int64 tensor.
            ValueError: as :meth:`DEQFusion.forward`, or ``rows`` has another shape or device; on
                the CPU also a number outside [0, R).
        """
        if not self.training:
            return self.fusion(
                features, present=present, return_info=return_info, return_cells=return_cells
            )
        at = self._checked(rows, features)
        table = self._table_for(features[0])
        z0 = self._start(table, at, features)
        z, zs, info = self.fusion(
            features, present=present, z0=z0, return_info=True, return_cells=True
        )
        _remember(table, at, z, zs, info)
        outputs = [z, *([zs] if return_cells else []), *([info] if return_info else [])]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _checked(self, rows: Tensor, features: Sequence[Tensor]) -> Tensor:
        """The numbers of the samples as (B,)."""
        checks.sequence("features", features, "tensors")
        like = features[0]
        checks.counts("rows", rows, like, tuple(like.shape[:-1]), "(...), as the features have")
        at = rows.reshape(-1)
        if at.device.type == "cpu" and at.numel() and not traced(at):
            low, high = (int(v) for v in torch.aminmax(at))
            if low < 0 or high >= self.num_rows:
                raise ValueError(
                    f"rows: expected numbers in [0, num_rows={self.num_rows}), got {low} to {high}"
                )
        return at

    def _table_for(self, like: Tensor) -> _Table:
        """The table; a new one where there is none on this device."""
        if self._table is None or self._table.states.device != like.device:
            blocks, places = self.fusion.num_modalities + 1, 2 * self.num_rows
            dtype = like.dtype if self.dtype is None else self.dtype
            on: dict[str, Any] = {"device": like.device}
            # What inference mode makes could not be changed in a training call.
            with torch.inference_mode(False):
                self._table = _Table(
                    torch.zeros(blocks, places, self.fusion.dim, dtype=dtype, **on),
                    torch.full((blocks, places), _NEVER, dtype=torch.float64, **on),
                    torch.zeros(self.num_rows, dtype=torch.int64, **on),
                    torch.zeros(1, dtype=torch.float64, **on),
                )
        return self._table

    @torch.no_grad()
    def _start(
        self, table: _Table, at: Tensor, features: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Where the solves of the samples ``at`` start: (..., d) and (N, ..., d), or cold."""
        places = table.places(at)
        newest, older = (table.times[:, place] for place in places)
        since = table.clock - newest
        usable = since <= self.max_age * self.num_rows
        # A cold start is cheaper than one from zeros. Elsewhere a look would wait for the device.
        if at.device.type == "cpu" and not traced(at) and not usable.any():
            return None
        # As far along the line as time has passed, at most as far as the last step went.
        length = (since / (newest - older).clamp(min=1.0)).clamp(max=1.0)
        length = torch.where(usable & (older > _NEVER), length, 0.0)[..., None]
        dtype = compute_dtype(features[0].dtype)
        now, before = (table.states.index_select(1, place).to(dtype) for place in places)
        start = torch.lerp(before, now, 1.0 + length.to(now.dtype))
        start = start.masked_fill_(~usable[..., None], 0.0)
        start = start.reshape(len(start), *features[0].shape[:-1], start.shape[-1])
        return start[-1], start[:-1]

    def extra_repr(self) -> str:
        return f"num_rows={self.num_rows}, dtype={self.dtype}, max_age={self.max_age}"


@torch.no_grad()
def _remember(table: _Table, at: Tensor, z: Tensor, zs: Tensor, info: SolveInfo) -> None:
    """What was found becomes the newest entry of the samples ``at`` (B,)."""
    assert info.cells is not None
    parts = [*zs.detach().reshape(len(zs), len(at), -1), z.detach().reshape(len(at), -1)]
    outcome = torch.cat([info.cells.outcome, info.fuse.outcome[None]]).reshape(len(parts), -1)
    # What failed is no good start; an absent cell keeps what it had.
    new = (outcome == int(Outcome.CONVERGED)) | (outcome == int(Outcome.RESCUED))
    all_new = at.device.type == "cpu" and not traced(at) and bool(new.all())
    newest, older = table.places(at)
    for part, own, state, time in zip(parts, new, table.states, table.times, strict=True):
        if not all_new:
            part = torch.where(own[:, None], part.to(state.dtype), state[newest])
        state.index_copy_(0, older, part.to(state.dtype))
        time.index_copy_(0, older, torch.where(own, table.clock, time[newest]))
    table.turn[at] = 1 - table.turn[at]
    table.clock.add_(at.numel())
