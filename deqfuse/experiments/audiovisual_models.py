"""The models of the audiovisual study.

Encoders are those of AVMNIST in MultiBench, LeNets of 4 and 6 convolutions (the first one 5 x 5,
the others 3 x 3) on 28 x 28 images and 112 x 112 spectrograms, with GroupNorm instead of batch
norm: the rows of an equilibrium must not depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqfuse import Anderson, DEQFusion, ProFusion, SolveInfo
from deqfuse.experiments.models import DIM, PRO_EQUILIBRIA, Joined, StudyModel

__all__ = ["LABELS", "AudiovisualModel"]

CHANNELS, IMAGE_LAYERS, AUDIO_LAYERS = 6, 4, 6
LABELS = {
    "image": "image only",
    "audio": "recording only",
    "base": "concatenation + layer",
    "pro 2": "Pro-Fusion, R = 2",
    "pro 3": "Pro-Fusion, R = 3",
    "pro equilibrium": "Pro-Fusion, equilibrium",
    "pro penalised": "Pro-Fusion, equilibrium, penalty",
    "deq": "DEQ Fusion",
}


class Encoder(nn.Module):
    """Convolutions that double the channels and halve the side, then a layer onto ``DIM``."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = 1
        for k in range(layers):
            out = CHANNELS * 2**k
            side = 5 if k == 0 else 3
            blocks += [nn.Conv2d(width, out, side, padding=side // 2, bias=False)]
            blocks += [nn.GroupNorm(2, out)]
            blocks += [nn.ReLU(), nn.MaxPool2d(2)]
            width = out
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.project = nn.Linear(width, DIM)  # the injection site: the rest is computed once

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, d)
        return torch.relu(self.project(self.features(x)))


class AudiovisualModel(StudyModel):
    """A classifier of the study; ``key`` is one of ``LABELS``."""

    def __init__(self, key: str, num_classes: int = 10) -> None:
        super().__init__()
        self.key = key
        encoders = [Encoder(IMAGE_LAYERS), Encoder(AUDIO_LAYERS)]
        self.chosen = {"image": (0,), "audio": (1,)}.get(key, (0, 1))
        encoders = [encoders[i] for i in self.chosen]
        self.fusion: nn.Module
        if key == "deq":
            self.encoders = nn.ModuleList(encoders)
            self.fusion, self.head = DEQFusion(DIM, 2), nn.Linear(DIM, num_classes)
            return
        how: dict[str, Any] = {"steps": int(key.split()[1]) if key[-1].isdigit() else 1}
        if key in PRO_EQUILIBRIA:
            how = {"solver": Anderson()}
        joined, head = Joined(len(encoders)), nn.Linear(DIM, num_classes)
        self.fusion = ProFusion(
            encoders, joined, DIM, sites=["project"] * len(encoders), head=head, **how
        )

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Images (B, 1, 28, 28) and spectrograms (B, 1, 112, 112) -> (B, C)."""
        chosen = [views[i] for i in self.chosen]
        if self.key == "deq":
            encodings = [e(x) for e, x in zip(self.encoders, chosen, strict=True)]
            fused, info = self.fusion(encodings, return_info=True)
            return self.head(fused), info
        if self.key in PRO_EQUILIBRIA:
            return self.fusion(chosen, return_info=True)
        return self.fusion(chosen), None
