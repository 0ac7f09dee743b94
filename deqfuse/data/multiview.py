"""What a multi-view data set is here, how it is split, and how it is standardised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqfuse.nn.presence import present_from_nan

__all__ = ["MultiviewData", "Splits", "checked", "split_stratified"]


@dataclass(frozen=True)
class MultiviewData:
    """The same rows seen through several feature sets.

    Row ``r`` of every view and of ``labels`` is the same sample. A sample that lacks a view has NaN
    for all of its features.
    """

    views: list[Tensor]  # per view (rows, features of that view), float32
    labels: Tensor  # (rows,) int64, an index into class_names; or (rows, outputs) float32
    view_names: tuple[str, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.views or len(self.views) != len(self.view_names):
            raise ValueError(
                f"MultiviewData: expected one name per view and at least one view, got "
                f"{len(self.views)} views and {len(self.view_names)} names."
            )
        rows = [view.shape[0] for view in self.views]
        if any(count != self.labels.shape[0] for count in rows):
            raise ValueError(
                f"MultiviewData: expected the same rows in every view, got {rows} rows in the "
                f"views and {self.labels.shape[0]} labels."
            )

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return self.labels.shape[0]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of features of each view."""
        return tuple(view.shape[1] for view in self.views)

    @property
    def present(self) -> Tensor:
        """Which views the samples have: (rows, views) bool."""
        return present_from_nan([view.flatten(1) for view in self.views])

    def rows(self, index: Tensor) -> MultiviewData:
        """The samples at ``index`` (int64 positions), in that order."""
        return replace(self, views=[view[index] for view in self.views], labels=self.labels[index])

    def to(self, device: torch.device | str) -> MultiviewData:
        """The same data on ``device``."""
        views = [view.to(device) for view in self.views]
        return replace(self, views=views, labels=self.labels.to(device))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test rows of one data set."""

    train: MultiviewData
    validation: MultiviewData
    test: MultiviewData

    def standardized(self) -> Splits:
        """Every feature shifted and scaled to mean 0 and variance 1 **on the training rows**.

        Validation and test rows get the training rows' shift and scale: statistics of their own
        would tell the model about data that it is not supposed to have seen. A feature that is
        constant in the training rows is only shifted. Samples that lack a view have no part in its
        statistics, and lack it afterwards.

        Raises:
            ValueError: a standardised value is not finite in float32, or no training row has a
                view.
        """
        moments = []
        train = self.train
        for name, view, here in zip(train.view_names, train.views, train.present.T, strict=True):
            if not here.any():
                raise ValueError(
                    f"view {name}: expected training rows that have it, got none of {len(here)}. "
                    "Remedy: leave the view out, or hold out fewer rows for validation."
                )
            mean = view[here].double().mean(0)
            std = view[here].double().std(0, correction=0)
            constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)  # float32 rounding of a constant
            moments.append((mean, torch.where(constant, torch.ones_like(std), std)))

        def apply(part: MultiviewData) -> MultiviewData:
            pairs = zip(part.views, moments, strict=True)
            views = [((view.double() - mean) / std).float() for view, (mean, std) in pairs]
            return checked(replace(part, views=views))

        return Splits(apply(self.train), apply(self.validation), apply(self.test))

    def to(self, device: torch.device | str) -> Splits:
        """The same splits on ``device``."""
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device))


def checked(scaled: MultiviewData) -> MultiviewData:
    """The data as given, if scaling by the training rows has left every value finite.

    Raises:
        ValueError: it has not; the message names the view and the feature.
    """
    named = zip(scaled.view_names, scaled.views, scaled.present.T, strict=True)
    for name, view, here in named:
        broken = torch.nonzero(~view[here].isfinite().all(0)).flatten()
        if len(broken):
            raise ValueError(
                f"view {name}, column {int(broken[0]) + 1}: expected values that stay within the "
                "range of float32 (3.4e38) when scaled by the training rows' spread, got some that "
                "do not. Remedy: look for outliers, or leave the feature out."
            )
    return scaled


def split_stratified(
    labels: Tensor,  # (rows,), int64
    fractions: Sequence[float],
    *,
    seed: int = 0,
    keep_first: Tensor | None = None,  # (rows,), bool
) -> list[Tensor]:
    """Split rows at random, class by class, into one part per fraction.

    Args:
        labels: class of each row.
        fractions: positive numbers with sum 1. Part ``k`` gets ``fractions[k]`` of each class,
            rounded so that the parts of a class add up; a class of two rows or more reaches at
            least the first two parts.
        seed: of the shuffle; the same seed gives the same split on every machine.
        keep_first: rows that must end up in the first part, as far as it has room.

    Returns:
        One tensor of int64 row positions per fraction, each in rising order.

    Raises:
        ValueError: if the fractions are not positive or do not add up to 1.
    """
    if not fractions or any(f <= 0 for f in fractions) or not math.isclose(sum(fractions), 1.0):
        raise ValueError(
            f"fractions: expected positive numbers that add up to 1, got {list(fractions)}."
        )
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        if keep_first is not None:
            first = keep_first[members]
            members = torch.cat([members[first], members[~first]])
        start = 0
        bounds = _bounds(len(members), fractions)
        for part, stop in zip(parts, bounds, strict=True):
            part.append(members[start:stop])
            start = stop
    return [torch.cat(part).sort().values for part in parts]


def _bounds(count: int, fractions: Sequence[float]) -> list[int]:
    """Ends of the parts of a class of ``count`` rows."""
    bounds = [round(count * sum(fractions[: k + 1])) for k in range(len(fractions))]
    if len(bounds) > 1 and count > 1:
        bounds[0] = min(max(bounds[0], 1), count - 1)
        bounds[1:] = [max(bound, bounds[0] + 1) for bound in bounds[1:]]
    return bounds
