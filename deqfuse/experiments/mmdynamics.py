"""MM-Dynamics (Han et al., CVPR 2022), the omics baseline of DEQ Fusion, with any fusion.

Per view: a gate per feature, an encoder, a classifier, and a confidence that is trained to be the
probability which this classifier gives to the true class. Encodings times their confidence are
fused (Section 4.1 and Appendix B of arXiv 2306.16645: by concatenation or by DEQ Fusion), and
classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    DEQFusion,
    Implicit,
    ModalityDropout,
    ProFusion,
    SolveInfo,
    present_from_nan,
)
from deqfuse.data import MultiviewData
from deqfuse.experiments.models import GROUPS, TIED_STEPS, Fill, Joined

__all__ = ["ABLATIONS", "DROPOUT", "FUSIONS", "LABELS", "MASKED", "SOLVED", "MMDynamics"]

DROPOUT = 0.5  # of the encodings
# The library's own, but for the rescue's budget: what trials were made with must not move with it.
SOLVER, ADJOINT = Anderson(tol=1e-4, max_iter=50, max_jacobians=10_000), Implicit(tol=1e-4)

LABELS = {
    "concat": "concatenation",
    "weighted": "weighted sum",
    "base": "concatenation + layer",
    "pro": "Pro-Fusion, R = 2",
    "norm": "GN(relu(x_f)), injections as they come",
    "unit-norm": "GN(relu(x_f)), injections of unit size",
    "tied": f"{TIED_STEPS} tied steps",
    "paper": "DEQ Fusion, papers' equations",
    "deq": "DEQ Fusion",
    "no-cell": "no cell (z_i = x_i)",
    "no-combine": "no combine (z_f = sum z_i)",
    "no-gate": "no-gate",
}
# Arguments of DEQFusion; x_f is the weighted sum. The papers' equations take injections as they
# come, so "norm" is the control of "paper" and "unit-norm" that of "deq".
_LAYERS: dict[str, dict[str, Any]] = {
    "weighted": {"combine": "weighted_sum", "injection_norm": False},
    "norm": {"combine": "weighted_sum", "injection_norm": False},
    "unit-norm": {"combine": "weighted_sum"},
    "tied": {"weight_tied_steps": TIED_STEPS},
    "paper": {"injection_norm": False},
    "deq": {},
    "no-cell": {"cell": "identity"},
    "no-combine": {"combine": "sum"},
    "no-gate": {"gate": False},
}
_PRO_STEPS = {"base": 1, "pro": 2}  # the late fusion that Pro-Fusion starts from is one step
FUSIONS = ("weighted", "base", "pro", "norm", "unit-norm", "tied", "paper")  # and "concat", "deq"
ABLATIONS = ("no-cell", "no-combine", "no-gate")  # of "deq": Tables 6 and 7 of arXiv 2306.16645
SOLVED = ("paper", "deq", *ABLATIONS)  # those with an equilibrium
MASKED = tuple(_LAYERS)  # those that are told which views a row has


class MMDynamics(nn.Module):
    """The model; ``fusion`` is what the comparison is about.

    A row lacks a view where all of its features are NaN; the view's own terms of the loss leave it
    out. Every fusion is told so but concatenation, for which something has to stand in its place.

    Args:
        widths: features of each view.
        num_classes: C.
        fusion: a key of ``LABELS``.
        dim: width d of the encodings.
        means: per view (features,), of the training rows; only where views may be absent.
        fill: in place of an absent view, where the fusion takes no mask: "mean": ``means``;
            "zeros": zeros for its encoding (concatenation only).
        modality_dropout: probability of a view to be absent in training.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        fusion: str,
        dim: int,
        means: Sequence[Tensor] = (),
        fill: Fill = "mean",
        modality_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.key, self.means, self.fill = fusion, means, fill
        self.drop = ModalityDropout(modality_dropout)
        # Everything that the fusions share first: under one seed it starts from the same values.
        self.gates = nn.ModuleList(_linear(width, width) for width in widths)
        self.encoders = nn.ModuleList(
            nn.Sequential(_linear(width, dim), nn.ReLU(), nn.Dropout(DROPOUT)) for width in widths
        )
        self.classifiers = nn.ModuleList(_linear(dim, num_classes) for _ in widths)
        self.confidences = nn.ModuleList(_linear(dim, 1) for _ in widths)
        self.fusion: DEQFusion | None = None
        self.pro: ProFusion | None = None
        if fusion in _PRO_STEPS:
            late = _Weighted(self.confidences, Joined(len(widths), dim, dim))
            self.pro = ProFusion(list(self.encoders), late, dim, steps=_PRO_STEPS[fusion])
        elif fusion != "concat":
            how: dict[str, Any] = {"num_groups": GROUPS, "solver": SOLVER, "adjoint": ADJOINT}
            self.fusion = DEQFusion(dim, len(widths), **how, **_LAYERS[fusion])
        self.norm: nn.Module = nn.Identity()
        if fusion in ("norm", "unit-norm"):
            self.norm = nn.Sequential(nn.ReLU(), nn.GroupNorm(GROUPS, dim))
        self.head = _linear(dim * (len(widths) if fusion == "concat" else 1), num_classes)

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Per view (B, features) -> (B, C), and how the solve went."""
        views, present = self._filled(views)
        gated = self._gated(views, self._gates(views))
        encodings = self._encodings(gated)
        return self._fuse(gated, encodings, self._confidences(encodings), present)

    def loss(self, batch: MultiviewData) -> tuple[Tensor, SolveInfo | None]:
        """Cross-entropy of the fusion and of every view, mean gates, errors of the confidences.

        Han et al. (MM-Dynamics) add them up, and so does this. The code of DEQ Fusion for BRCA adds
        them view after view and multiplies what is there by 1.5 before each.
        """
        views, present = self._filled(batch.views)
        gates = self._gates(views)
        gated = self._gated(views, gates)
        encodings = self._encodings(gated)
        confidences = self._confidences(encodings)
        logits, info = self._fuse(gated, encodings, confidences, present)
        total = F.cross_entropy(logits, batch.labels)
        for k, classifier in enumerate(self.classifiers):
            gate, encoding, confidence, labels = (
                of_rows if present is None else of_rows[present[:, k]]
                for of_rows in (gates[k], encodings[k], confidences[k], batch.labels)
            )
            own = classifier(encoding)
            of_truth = own.softmax(1).gather(1, labels[:, None])
            total = total + gate.mean()  # a small mean gate: few features
            total = total + F.mse_loss(confidence, of_truth) + F.cross_entropy(own, labels)
        return total, info

    def _filled(self, views: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
        """Finite views, and which are present (B, N); None: all of every row."""
        present = self.drop(views, present_from_nan(views))
        if bool(present.all()):
            return views, None
        fills = self.means
        if self.fusion is not None or self.fill == "zeros":
            fills = [view.new_zeros(()) for view in views]  # anything finite
        filled = [
            torch.where(here[:, None], view, fill)
            for here, view, fill in zip(present.T, views, fills, strict=True)
        ]
        return filled, present

    def _gates(self, views: Sequence[Tensor]) -> list[Tensor]:
        return [torch.sigmoid(gate(x)) for gate, x in zip(self.gates, views, strict=True)]

    def _gated(self, views: Sequence[Tensor], gates: Sequence[Tensor]) -> list[Tensor]:
        return [x * gate for x, gate in zip(views, gates, strict=True)]

    def _encodings(self, gated: Sequence[Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, gated, strict=True)]

    def _confidences(self, encodings: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.confidences, encodings, strict=True)]

    def _fuse(
        self,
        gated: Sequence[Tensor],
        encodings: Sequence[Tensor],
        confidences: Sequence[Tensor],
        present: Tensor | None,
    ) -> tuple[Tensor, SolveInfo | None]:
        if self.pro is not None:  # encodes by itself, at every step
            return self.head(self.pro(gated)), None
        weighted = [x * c for x, c in zip(encodings, confidences, strict=True)]
        if self.fusion is None:
            if present is not None and self.fill == "zeros":
                weighted = [x * here[:, None] for x, here in zip(weighted, present.T, strict=True)]
            return self.head(torch.cat(weighted, dim=1)), None
        fused, info = self.fusion(weighted, present=present, return_info=True)
        return self.head(self.norm(fused)), info if self.key in SOLVED else None


class _Weighted(nn.Module):
    """Late fusion of encodings times their confidence: N x (B, d) -> (B, d)."""

    def __init__(self, confidences: nn.ModuleList, layer: nn.Module) -> None:
        super().__init__()
        self.confidences, self.layer = confidences, layer

    def forward(self, encodings: Sequence[Tensor]) -> Tensor:
        pairs = zip(encodings, self.confidences, strict=True)
        return self.layer([x * confidence(x) for x, confidence in pairs])


def _linear(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
