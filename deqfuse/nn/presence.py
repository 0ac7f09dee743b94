"""Masks of what is present: from NaN in the data, and by dropping modalities in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deqfuse import checks

__all__ = ["ModalityDropout", "present_from_nan"]


def present_from_nan(
    features: Sequence[Tensor],  # N tensors (..., d_i)
    absent: Literal["all", "any"] = "all",
) -> Tensor:  # (..., N)
    """Which modalities rows have, where absent ones are given as NaN.

    Args:
        features: N floating tensors (..., d_i) with equal leading dimensions.
        absent: a modality is absent in a row if "all" of its numbers are NaN, or if "any" is.

    Returns:
        (..., N) bool, what ``DEQFusion`` takes as ``present``.

    Raises:
        TypeError: a feature that is no floating tensor.
        ValueError: leading dimensions that differ, or another ``absent``.

    Example:
        >>> import torch
        >>> from deqfuse import present_from_nan
        >>> present_from_nan([torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]), torch.ones(2, 3)])
        tensor([[ True,  True],
                [False,  True]])
    """
    _check(features)
    checks.one_of("absent", absent, ("all", "any"))
    missing = [f.isnan().all(-1) if absent == "all" else f.isnan().any(-1) for f in features]
    return ~torch.stack(missing, -1)


def _check(features: Sequence[Tensor]) -> None:
    """At least one tensor, with features to lack, and the same rows in all of them."""
    checks.sequence("features", features, "tensors")
    if not features or any(isinstance(f, Tensor) and f.dim() == 0 for f in features):
        got = "none" if not features else "a scalar"
        raise ValueError(f"features: expected tensors (..., d_i), got {got}")
    for i, feature in enumerate(features):
        checks.tensor(f"features[{i}]", feature)
        lead = (*features[0].shape[:-1], feature.shape[-1])
        checks.shape(f"features[{i}]", feature, lead, "(*leading dims of features[0], d_i)")


class ModalityDropout(nn.Module):
    """Leaves whole modalities of single rows out in training, so that a model learns to do without.

    Every modality of every row is dropped with probability p, on its own; where all would be, one
    of them, drawn at random, stays. Random numbers are those of torch's default generator. In
    evaluation mode nothing is dropped. (Neverova et al., "ModDrop", arXiv 1501.00102.)

    Args:
        p: probability in [0, 1) of a modality to be dropped.

    Raises:
        TypeError: ``p`` is no number.
        ValueError: ``p`` outside [0, 1).

    Example:
        >>> import torch
        >>> from deqfuse import DEQFusion, ModalityDropout
        >>> fusion, drop = DEQFusion(64, num_modalities=2), ModalityDropout(0.3)
        >>> xs = [torch.randn(8, 64) for _ in range(2)]
        >>> z = fusion(xs, present=drop(xs))
    """

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"p: expected a number, got {p!r}")
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p: expected a probability in [0, 1), got {p!r}")
        self.p = float(p)

    def forward(
        self,
        features: Sequence[Tensor],  # N tensors (..., d_i)
        present: Tensor | None = None,  # (..., N)
    ) -> Tensor:  # (..., N)
        """Which modalities rows keep.

        Args:
            features: N tensors (..., d_i), of which shapes and device are looked at.
            present: (..., N) bool, what rows have to begin with; all when not given.

        Returns:
            (..., N) bool, on the device of the features.

        Raises:
            TypeError: ``features`` is no sequence of floating tensors, or ``present`` no bool
                tensor.
            ValueError: leading dimensions that differ, or ``present`` has another shape or device.
        """
        _check(features)
        like, shape = features[0], (*features[0].shape[:-1], len(features))
        if present is None:
            present = torch.ones(shape, dtype=torch.bool, device=like.device)
        else:
            checks.present("present", present, like, shape, "(..., N)")
        if not self.training or self.p == 0:
            return present
        draw = torch.rand(shape, device=like.device)
        kept = present & (draw >= self.p)
        # Of what is present the largest draw: without the rest it would have been dropped, too.
        last = torch.where(present, draw, -1.0).argmax(-1, keepdim=True)
        one = torch.zeros_like(present).scatter(-1, last, True) & present
        return torch.where(kept.any(-1, keepdim=True), kept, one)

    def extra_repr(self) -> str:
        return f"p={self.p}"
