"""Saying that a solve did not converge: at once on the CPU, without a synchronisation on a GPU."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deqfuse.errors import ConvergenceError, ConvergenceWarning
from deqfuse.outcome import Outcome
from deqfuse.solvers.options import GradientOption, Implicit, NewtonKrylov, SolverOption

OnFailure = Literal["warn", "raise", "ignore"]
ON_FAILURE: tuple[OnFailure, ...] = get_args(OnFailure)
CELLS, FUSE = LAYER_BLOCKS = ("the modality cells", "the fuse block")
Blocks = tuple[tuple[str, Any], ...]  # a block's name, and where its statistics are
_FORWARD: Blocks = ((CELLS, slice(None, -1)), (FUSE, -1))
_BACKWARD: Blocks = tuple((f"the backward solve of {name}", at) for name, at in reversed(_FORWARD))
NEAR_ROUNDING = 1e-5  # where float32 residuals of wide layers end
ROUNDING = "That is near float32 rounding. Remedy: a larger tol, or float64."


class _Statistics(NamedTuple):
    """A block's outcomes and residuals on their way to the host, to be looked at once there."""

    outcome: Tensor
    residual: Tensor

    def tolist(self) -> list[float]:
        return _summary(*self)


@dataclass
class _Late:
    """A report on its way from the device, to be made once it has arrived."""

    summary: _Statistics | Tensor  # whose list is that of _summary
    arrived: Any  # torch.cuda.Event
    what: str
    option: SolverOption | GradientOption


_late: deque[_Late] = deque(maxlen=64)
_lock = threading.Lock()


def report(
    what: str,
    outcome: Tensor,  # int8, any shape
    residual: Tensor,  # the same shape
    option: SolverOption | GradientOption,
    on_failure: str,
) -> None:
    """Warn or raise when rows of a solve failed.

    Args:
        what: the solve in words, e.g. "the fuse block".
        outcome, residual: per row, as in ``BlockInfo``.
        option: the solver or gradient option, whose knobs the message names.
        on_failure: "warn", "raise" or "ignore". Under ``torch.compile``, and while a CUDA graph is
            captured, always "ignore".
    """
    _report(((what, ...),), outcome, residual, option, on_failure)


def report_layer(
    outcome: Tensor,  # (N + 1, B) int8, the fuse block last
    residual: Tensor,  # (N + 1, B)
    option: SolverOption | GradientOption,
    on_failure: str,
    all_converged: bool = False,  # known already
    *,
    backward: bool = False,
) -> None:
    """:func:`report` for each kind of block, in the order in which they were solved."""
    if all_converged:
        flush()
    else:
        _report(_BACKWARD if backward else _FORWARD, outcome, residual, option, on_failure)


def _report(
    blocks: Blocks,
    outcome: Tensor,
    residual: Tensor,
    option: SolverOption | GradientOption,
    on_failure: str,
) -> None:
    if torch.compiler.is_compiling():
        return
    flush()
    if on_failure == "ignore" or outcome.numel() == 0:
        return
    if outcome.is_cuda:
        if _capturing():
            return  # a replayed graph runs none of this
        if on_failure == "warn":
            _report_late(blocks, outcome, residual, option)
            return
    if outcome.any():  # CONVERGED is 0; the summary is for those who need it
        outcome, residual = outcome.cpu(), residual.detach().cpu()
        for what, at in blocks:
            _say(what, _summary(outcome[at], residual[at]), option, on_failure)


def _report_late(
    blocks: Blocks, outcome: Tensor, residual: Tensor, option: SolverOption | GradientOption
) -> None:
    """Two copies to pinned memory and an event, 5 bytes a row and block: no kernel, no waiting.

    Counting on the device would take more launches than the layer's forward has.
    """
    stream = torch.cuda.current_stream(outcome.device)
    outcome, residual = (t.to("cpu", non_blocking=True) for t in (outcome, residual))
    arrived = torch.cuda.Event()
    arrived.record(stream)
    with _lock:
        for what, at in blocks:
            _late.append(_Late(_Statistics(outcome[at], residual[at]), arrived, what, option))


def flush() -> None:
    """Report what has arrived from devices since the last look. Never waits.

    Does nothing while the current stream is captured: asking an event would end the capture.
    """
    if torch.compiler.is_compiling() or not _late or _capturing():
        return
    while True:
        with _lock:
            if not _late or not _late[0].arrived.query():
                return
            item = _late.popleft()
        _say(item.what, item.summary.tolist(), item.option, "warn")


def _capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph. False without CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _summary(outcome: Tensor, residual: Tensor) -> list[float]:
    """[rows, failed by max_iter, by stalling, by NaN, worst residual among the failed]."""
    total = float(outcome.numel())
    failed = outcome != int(Outcome.CONVERGED)
    if not failed.any():
        return [total, 0.0, 0.0, 0.0, 0.0]
    kinds = [
        float((outcome == int(kind)).sum()) for kind in Outcome if kind is not Outcome.CONVERGED
    ]
    finite = failed & torch.isfinite(residual)
    return [total, *kinds, float(torch.where(finite, residual, 0.0).amax())]


def _say(
    what: str,
    summary: list[float],
    option: SolverOption | GradientOption,
    on_failure: str,
) -> None:
    total, budget, stalled, poisoned, worst = summary
    failed = int(budget + stalled + poisoned)
    if failed == 0:
        return
    parts = [
        f"{int(count)} {text}"
        for count, text in (
            (budget, "used up their evaluations"),
            (stalled, "stalled"),
            (poisoned, "became NaN or infinite (check the input)"),
        )
        if count
    ]
    message = f"deqfuse: {failed} of {int(total)} rows of {what} did not converge: "
    message += ", ".join(parts)
    if budget or stalled:  # for rows that are merely poisoned no solver option is a remedy
        tol = getattr(option, "tol", float("nan"))
        message += f"; worst relative residual {worst:.1e}, tol {tol:.1e}. "
        message += ROUNDING if tol < worst < NEAR_ROUNDING else _remedy(what, option)
    else:
        message += "."
    message += " on_failure='ignore' silences this."
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """``stacklevel`` of the nearest frame outside deqfuse and torch: the user's own line."""
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("deqfuse", "torch"):
        if frame.f_back is None:  # the autograd engine's own thread
            break
        frame, level = frame.f_back, level + 1
    return level


def _remedy(what: str, option: SolverOption | GradientOption) -> str:
    name, budget = type(option).__name__, getattr(option, "max_iter", 0)
    if isinstance(option, Implicit):
        knob = "I - J is singular there" if option.solver == "dense" else ""
        knob = knob or f"Remedy: Implicit(max_iter={2 * budget}), a looser tol"
        return f"Their gradient is inexact. {knob}."
    remedies = [f"{name}(max_iter={2 * budget})"]
    if not getattr(option, "rescue", False):
        remedies.append("Anderson(rescue=True)")
    if not isinstance(option, NewtonKrylov):
        remedies.append("NewtonKrylov()")
    if what in LAYER_BLOCKS:
        remedies.append("init='contractive' where it is 'torch'")
    return f"Remedies: {', '.join(remedies)}, or info.jacobian_penalty() in the loss."
