"""Saying that a solve did not converge: at once on the CPU, without a synchronisation on a GPU."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqfuse.errors import ConvergenceError, ConvergenceWarning
from deqfuse.outcome import Outcome
from deqfuse.solvers.options import GradientOption, Implicit, NewtonKrylov, SolverOption

ON_FAILURE = ("warn", "raise", "ignore")
CELLS, FUSE = LAYER_BLOCKS = ("the modality cells", "the fuse block")
NEAR_ROUNDING = 1e-5  # where float32 residuals of wide layers end
ROUNDING = "That is near float32 rounding. Remedy: a larger tol, or float64."


@dataclass
class _Late:
    """A summary on its way from the device, to be reported once it has arrived."""

    summary: Tensor
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
        on_failure: "warn", "raise" or "ignore". Under ``torch.compile`` always "ignore".
    """
    if torch.compiler.is_compiling():
        return
    flush()
    if on_failure == "ignore" or outcome.numel() == 0:
        return
    if outcome.device.type != "cuda" or on_failure == "raise":
        if outcome.any():  # CONVERGED is 0; the summary is for those who need it
            _say(what, _summarise(outcome, residual).tolist(), option, on_failure)
        return
    if torch.cuda.is_current_stream_capturing():
        return
    summary = _summarise(outcome, residual).to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    with _lock:
        _late.append(_Late(summary, arrived, what, option))


def report_layer(
    outcome: Tensor,  # (N + 1, B) int8, the fuse block last
    residual: Tensor,  # (N + 1, B)
    option: SolverOption | GradientOption,
    on_failure: str,
    *,
    backward: bool = False,
) -> None:
    """:func:`report` for each kind of block, in the order in which they were solved."""
    if torch.compiler.is_compiling():
        return
    flush()
    if on_failure == "ignore" or (outcome.device.type == "cpu" and not outcome.any()):
        return
    blocks: list[tuple[str, Any]] = [(CELLS, slice(None, -1)), (FUSE, -1)]
    for name, at in reversed(blocks) if backward else blocks:
        what = f"the backward solve of {name}" if backward else name
        report(what, outcome[at], residual[at], option, on_failure)


def flush() -> None:
    """Report what has arrived from devices since the last look. Never waits."""
    if torch.compiler.is_compiling():
        return
    while True:
        with _lock:
            if not _late or not _late[0].arrived.query():
                return
            item = _late.popleft()
        _say(item.what, item.summary.tolist(), item.option, "warn")


def _summarise(outcome: Tensor, residual: Tensor) -> Tensor:
    """[rows, failed by max_iter, by stalling, by NaN, worst residual among the failed]."""
    failed = outcome != int(Outcome.CONVERGED)
    kinds = [(outcome == int(kind)).sum() for kind in Outcome if kind is not Outcome.CONVERGED]
    finite = failed & torch.isfinite(residual)
    worst = torch.where(finite, residual, 0.0).amax()
    total = torch.tensor(outcome.numel(), device=outcome.device)
    return torch.stack([t.to(torch.float64) for t in (total, *kinds, worst)])


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
        remedies.append("init='contractive'")
    return f"Remedies: {', '.join(remedies)}, or info.jacobian_penalty() in the loss."
