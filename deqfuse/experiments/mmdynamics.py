"""MM-Dynamics (Han et al., CVPR 2022), the omics baseline of DEQ Fusion, with either fusion.

Per view: a gate per feature, an encoder, a classifier, and a confidence that is trained to be the
probability which this classifier gives to the true class. Encodings times their confidence are
fused, by concatenation or by DEQ Fusion (Section 4.1 and Appendix B of arXiv 2306.16645), and
classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    DEQFusion,
    Implicit,
    ModalityDropout,
    SolveInfo,
    present_from_nan,
)
from deqfuse.data import MultiviewData

__all__ = ["MMDynamics"]

DROPOUT = 0.5  # of the encodings
SOLVER, ADJOINT = Anderson(tol=1e-4, max_iter=50), Implicit(tol=1e-4)  # the library's own


class MMDynamics(nn.Module):
    """The model; ``fusion`` is what the comparison is about.

    A row lacks a view where all of its features are NaN. DEQ Fusion is told so; concatenation gets
    something in its place.

    Args:
        widths: features of each view.
        num_classes: C.
        fusion: "concat" or "deq".
        dim: width d of the encodings.
        fuse_dropout: of W_f's output; DEQ Fusion only.
        fused_gain: see :meth:`loss`.
        means: per view the training rows' mean (features,), which concatenation gets in place of
            an absent view; zeros in place of its encoding when not given.
        modality_dropout: probability of a view to be absent in training.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        fusion: Literal["concat", "deq"],
        dim: int = 300,
        fuse_dropout: float = 0.0,
        fused_gain: float = 1.0,
        means: Sequence[Tensor] | None = None,
        modality_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fused_gain, self.means = fused_gain, means
        self.drop = ModalityDropout(modality_dropout)
        # Everything that the fusions share first: under one seed it starts from the same values.
        self.gates = nn.ModuleList(_linear(width, width) for width in widths)
        self.encoders = nn.ModuleList(_linear(width, dim) for width in widths)
        self.classifiers = nn.ModuleList(_linear(dim, num_classes) for _ in widths)
        self.confidences = nn.ModuleList(_linear(dim, 1) for _ in widths)
        self.fusion: DEQFusion | None = None
        if fusion == "deq":
            self.fusion = DEQFusion(
                dim, len(widths), dropout=fuse_dropout, solver=SOLVER, adjoint=ADJOINT
            )
        self.head = _linear(dim * (1 if fusion == "deq" else len(widths)), num_classes)

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Per view (B, features) -> (B, C), and how the solve went."""
        views, present = self._seen(views)
        encodings = self._encodings(views, self._gates(views))
        return self._fuse(encodings, self._confidences(encodings), present)

    def loss(self, batch: MultiviewData) -> tuple[Tensor, SolveInfo | None]:
        """Cross-entropy of the fusion and of every view, mean gates, errors of the confidences.

        Han et al. (MM-Dynamics) add them up: ``fused_gain`` 1. The code of DEQ Fusion for BRCA adds
        them view after view and multiplies what is there by 1.5 before each, so that the fused
        loss counts 1.5^N and the first view 1.5^(N-1): ``fused_gain`` 1.5. The terms of a view are
        those of the rows that have it.
        """
        views, present = self._seen(batch.views)
        gates = self._gates(views)
        encodings = self._encodings(views, gates)
        confidences = self._confidences(encodings)
        logits, info = self._fuse(encodings, confidences, present)
        total = F.cross_entropy(logits, batch.labels)
        for gate, encoding, confidence, classifier, here in zip(
            gates, encodings, confidences, self.classifiers, present.T, strict=True
        ):
            total = self.fused_gain * total
            if not here.any():
                continue
            labels, own = batch.labels[here], classifier(encoding[here])
            of_truth = own.softmax(1).gather(1, labels[:, None])
            total = total + gate[here].mean()  # a small mean gate: few features
            total = total + F.mse_loss(confidence[here], of_truth) + F.cross_entropy(own, labels)
        return total, info

    def _seen(self, views: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The views without NaN, and which of them the fusion is to count: (B, N)."""
        present = self.drop(views, present_from_nan(views))
        means = self.means or [view.new_zeros(()) for view in views]
        seen = [
            torch.where(here[:, None], view, mean)
            for view, here, mean in zip(views, present.T, means, strict=True)
        ]
        return seen, present if self.means is None else torch.ones_like(present)

    def _gates(self, views: Sequence[Tensor]) -> list[Tensor]:
        return [torch.sigmoid(gate(x)) for gate, x in zip(self.gates, views, strict=True)]

    def _encodings(self, views: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
        return [
            F.dropout(F.relu(encoder(x * gate)), DROPOUT, self.training)
            for encoder, x, gate in zip(self.encoders, views, gates, strict=True)
        ]

    def _confidences(self, encodings: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.confidences, encodings, strict=True)]

    def _fuse(
        self, encodings: Sequence[Tensor], confidences: Sequence[Tensor], present: Tensor
    ) -> tuple[Tensor, SolveInfo | None]:
        weighted = [x * c for x, c in zip(encodings, confidences, strict=True)]
        if self.fusion is None:
            weighted = [x * here[:, None] for x, here in zip(weighted, present.T, strict=True)]
            return self.head(torch.cat(weighted, dim=1)), None
        fused, info = self.fusion(weighted, present=present, return_info=True)
        return self.head(fused), info


def _linear(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
