"""The models under comparison: same encoders, same head, one of five fusions in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, ProFusion, SolveInfo

__all__ = ["FUSIONS", "FusionClassifier", "FusionKind", "build_fusion"]

DIM = 64
GROUPS = 4
TIED_STEPS = 5
PROGRESSIVE_STEPS = 2
DROPOUT = 0.3


@dataclass(frozen=True)
class FusionKind:
    """One row of the comparison."""

    key: Literal["concat", "weighted", "progressive", "tied", "deq"]
    label: str
    what: str  # half a sentence for the report
    steps: int = 0  # fixed number of applications of the map; 0 if there is none


FUSIONS = (
    FusionKind("concat", "concatenation", "the encodings side by side, no parameters of its own"),
    FusionKind("weighted", "weighted sum", "one learned weight per view"),
    FusionKind(
        "progressive",
        "Pro-Fusion",
        f"the weighted sum fed back into every encoder's hidden layer, {PROGRESSIVE_STEPS} steps",
        steps=PROGRESSIVE_STEPS,
    ),
    FusionKind(
        "tied",
        f"{TIED_STEPS} tied steps",
        f"the map of DEQ Fusion applied {TIED_STEPS} times, gradients through the steps",
        steps=TIED_STEPS,
    ),
    FusionKind(
        "deq",
        "DEQ Fusion",
        "the map's equilibrium, gradients by the implicit function theorem, Jacobian penalty",
    ),
)


class Concatenation(nn.Module):
    """Late fusion without parameters: ``z_f = [x_1, ..., x_N]``."""

    def forward(self, xs: Sequence[Tensor]) -> Tensor:  # N x (B, d) -> (B, N d)
        return torch.cat(tuple(xs), dim=-1)


def build_fusion(kind: FusionKind, encoders: nn.ModuleList) -> nn.Module:
    """The fusion module of ``kind`` for encodings of width ``DIM``.

    It takes the encodings; progressive fusion, which calls the encoders itself, takes the views.
    """
    num_views = len(encoders)
    if kind.key == "concat":
        return Concatenation()
    if kind.key == "weighted":
        return DEQFusion(DIM, num_views, combine="weighted_sum")
    if kind.key == "progressive":
        late = DEQFusion(DIM, num_views, combine="weighted_sum")
        # Into the ReLU: the Linear, which is most of the work, sees the views only.
        sites, widths = ["1"] * num_views, [DIM] * num_views
        steps = PROGRESSIVE_STEPS
        return ProFusion(list(encoders), late, DIM, steps=steps, sites=sites, in_dims=widths)
    if kind.key == "tied":
        return DEQFusion(DIM, num_views, num_groups=GROUPS, weight_tied_steps=TIED_STEPS)
    return DEQFusion(DIM, num_views, num_groups=GROUPS)


class FusionClassifier(nn.Module):
    """One encoder per view, a fusion, a linear head.

    Args:
        kind: which fusion.
        widths: features of each view.
        num_classes: outputs of the head.
    """

    def __init__(self, kind: FusionKind, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.kind = kind
        # Encoders first: under one seed they start from the same values whatever the fusion.
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(width, DIM), nn.ReLU(), nn.Dropout(DROPOUT)) for width in widths
        )
        self.fusion = build_fusion(kind, self.encoders)
        self.head = nn.Linear(DIM * len(widths) if kind.key == "concat" else DIM, num_classes)

    def encode(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Per view (B, features) -> (B, d)."""
        return [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]

    def forward(self, views: Sequence[Tensor]) -> Tensor:  # N x (B, d_i) -> (B, classes)
        given = views if self.kind.key == "progressive" else self.encode(views)
        logits: Tensor = self.head(self.fusion(given))
        return logits

    def forward_with_info(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Logits, and for an equilibrium how its solve went (None for the other fusions)."""
        if self.kind.key != "deq":
            return self(views), None
        fused, info = self.fusion(self.encode(views), return_info=True)
        return self.head(fused), info
