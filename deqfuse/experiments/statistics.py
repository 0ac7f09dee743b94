"""Means, spreads and paired differences over seeds, as numbers and as table cells."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

__all__ = ["NOTHING", "describe", "percent", "spread", "versus"]

NOTHING = "-"  # a cell without a meaning


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
    known = [scale * v for v in values if v is not None]
    if not known or len(known) < len(values):
        return NOTHING
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{fmean(known):.{digits}f} ± {stdev(known):.{digits}f}"


def percent(values: Sequence[float | None]) -> str:
    """Shares as percentages with their spread."""
    return spread(values, digits=1, scale=100.0)


def versus(ours: Sequence[float], theirs: Sequence[float], scale: float = 1.0) -> str:
    """Paired differences over seeds: mean ± standard error, and how many seeds gained or lost."""
    differences = [scale * (a - b) for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else NOTHING
    error = stdev(differences) / len(differences) ** 0.5
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return f"{fmean(differences):+.1f} ± {error:.1f} ({up} up, {down} down)"
