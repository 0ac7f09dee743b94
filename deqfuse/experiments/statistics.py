"""Means, spreads and paired differences over seeds, as numbers and as table cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any, NamedTuple

from deqfuse.reports.page import NOTHING

__all__ = [
    "Paired",
    "describe",
    "mean_error",
    "numbers",
    "paired",
    "percent",
    "spread",
    "versus",
]


def numbers(values: Sequence[float | None], scale: float = 1.0) -> list[float]:
    """The values times ``scale``, NaN for those that are undefined (None)."""
    return [nan if v is None else scale * v for v in values]


def describe(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (None for one value) and every single value, in seed order."""
    known = [v for v in values if v is not None]
    return {
        "mean": fmean(known) if known else None,
        "std": stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def spread(values: Sequence[float | None], digits: int = 3, scale: float = 1.0) -> str:
    """``mean ± standard deviation`` as text; the value alone when there is one."""
    return _mean(values, digits, scale, lambda count: 1.0)


def percent(values: Sequence[float | None]) -> str:
    """Shares as percentages with their spread."""
    return spread(values, digits=1, scale=100.0)


def mean_error(values: Sequence[float | None], digits: int = 3, scale: float = 1.0) -> str:
    """``mean ± standard error of the mean`` as text; the value alone when there is one."""
    return _mean(values, digits, scale, lambda count: count**-0.5)


def _mean(
    values: Sequence[float | None], digits: int, scale: float, factor: Callable[[int], float]
) -> str:
    """The mean and, times ``factor(count)``, the standard deviation."""
    known = [v for v in numbers(values, scale) if isfinite(v)]
    if not known or len(known) < len(values):
        return NOTHING
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{fmean(known):.{digits}f} ± {factor(len(known)) * stdev(known):.{digits}f}"


class Paired(NamedTuple):
    """Differences of two models, seed by seed."""

    mean: float
    error: float | None  # standard error of the mean; None for one seed
    up: int  # seeds that gained
    down: int  # seeds that lost

    @property
    def sign(self) -> int:
        """1 or -1 where the mean is further than two standard errors from zero, else 0."""
        if self.error is None or abs(self.mean) <= 2 * self.error:
            return 0
        return 1 if self.mean > 0 else -1

    def interval(self, digits: int = 1) -> str:
        """``mean [low, high]``: two standard errors to either side; one seed has no interval."""
        if self.error is None:
            return f"{self.mean:+.{digits}f}"
        low, high = self.mean - 2 * self.error, self.mean + 2 * self.error
        return f"{self.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} ± {self.error:.1f} ({self.up} up, {self.down} down)"


def paired(
    ours: Sequence[float | None], theirs: Sequence[float | None], scale: float = 1.0
) -> Paired | None:
    """Ours minus theirs over the seeds that have both values; None if there is no such seed."""
    pairs = zip(numbers(ours), numbers(theirs), strict=True)
    differences = [scale * (a - b) for a, b in pairs if isfinite(a - b)]
    if not differences:
        return None
    count = len(differences)
    return Paired(
        fmean(differences),
        stdev(differences) / count**0.5 if count > 1 else None,
        sum(d > 0 for d in differences),
        sum(d < 0 for d in differences),
    )


def versus(ours: Sequence[float | None], theirs: Sequence[float | None], scale: float = 1.0) -> str:
    """Paired differences over seeds: mean ± standard error, and how many seeds gained or lost."""
    result = paired(ours, theirs, scale)
    return NOTHING if result is None else str(result)
