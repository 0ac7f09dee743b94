"""Checks on what ``DEQFusion.forward`` receives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deqfuse import checks
from deqfuse.nn.fast import plain_lead
from deqfuse.torch_private import can_look


def check_features(
    features: Sequence[Tensor],
    widths: Sequence[int],
    like: Tensor | None,
) -> torch.Size:
    """Leading dimensions of the features: one tensor (..., width) per modality.

    Args:
        widths: expected last dimension of each.
        like: a parameter, whose dtype and device the features must have; None without parameters.
    """
    lead = plain_lead(features, widths, like)
    if lead is not None:
        return lead
    if not isinstance(features, Tensor):
        checks.sequence("features", features, "tensors")
    if isinstance(features, Tensor) or len(features) != len(widths):
        got = "a single tensor" if isinstance(features, Tensor) else f"{len(features)} tensors"
        raise ValueError(
            f"features: expected a sequence of num_modalities={len(widths)} tensors, got {got}"
        )
    for i, (feature, width) in enumerate(zip(features, widths, strict=True)):
        checks.tensor(f"features[{i}]", feature, like=features[0] if like is None else like)
        if feature.dim() == 0:
            raise ValueError(f"features[{i}]: expected shape (..., {width}), got a scalar")
        lead = features[0].shape[:-1]
        checks.shape(
            f"features[{i}]", feature, (*lead, width), "(*leading dims of features[0], width)"
        )
    return features[0].shape[:-1]


def check_present(present: Tensor, expected: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Which modalities rows have, (..., N) bool, as (N, B, 1); None where it is seen that all do.

    Args:
        present: as the user gave it.
        expected: its shape.
        like: a feature, on whose device it must be.
    """
    checks.present("present", present, like, expected, "(..., N)")
    rows = present.reshape(-1, expected[-1])
    seen = can_look(rows)
    if seen and rows.all():
        return None
    if seen and not (some := rows.any(1)).all():
        raise ValueError(
            f"present: expected at least one modality in every row, got none in "
            f"{int((~some).sum())} of {len(rows)} rows. Remedy: leave these rows out"
        )
    # A copy, which the penalty may read when theirs has changed.
    return rows.mT[..., None].clone()


def check_start(
    z0: tuple[Tensor, Tensor] | None,
    num_modalities: int,
    lead: torch.Size,
    dim: int,
    like: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """A warm start as rows: fused (B, d) and cells (N, B, d), or two times None."""
    if z0 is None:
        return None, None
    if not (isinstance(z0, (tuple, list)) and len(z0) == 2):
        raise TypeError(f"z0: expected a pair (fused, cells), got {type(z0).__name__}")
    fused, cells = z0
    checks.operand("z0[0]", fused, like, (*lead, dim), "(..., dim)")
    checks.operand("z0[1]", cells, like, (num_modalities, *lead, dim), "(N, ..., dim)")
    return fused.reshape(-1, dim), cells.reshape(num_modalities, -1, dim)
