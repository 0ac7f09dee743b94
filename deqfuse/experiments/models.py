"""The models of `deqfuse demo` and of the numerals study: what joins the same encoders differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    DEQFusion,
    ModalityDropout,
    ProFusion,
    SolveInfo,
    present_from_nan,
)
from deqfuse.data import MultiviewData
from deqfuse.experiments.tasks import CLASSES, Task

__all__ = [
    "ABLATIONS",
    "FUSIONS",
    "LABELS",
    "MASKED",
    "MODELS",
    "PRO_EQUILIBRIA",
    "Fill",
    "FusionClassifier",
    "Joined",
    "StudyModel",
    "count_parameters",
]

DIM = 64
GROUPS = 4
TIED_STEPS = 5
PROGRESSIVE_STEPS = 2  # of "progressive"
DROPOUT = 0.3
# The models of the numerals study; the demonstration has "progressive" besides.
LABELS = {
    "concat": "concatenation",
    "weighted": "weighted sum",
    "tied": f"{TIED_STEPS} weight-tied steps",
    "deq": "DEQ Fusion",
    "base": "concatenation + layer",
    "pro 2": "Pro-Fusion, R = 2",
    "pro 3": "Pro-Fusion, R = 3",
    "pro equilibrium": "Pro-Fusion, equilibrium",
    "pro penalised": "Pro-Fusion, equilibrium, penalty",
    "no cell": "no cell (z_i = x_i)",
    "no combine": "no combine (z_f = sum z_i)",
    "no gate": "no gate",
}
PRO_EQUILIBRIA = ("pro equilibrium", "pro penalised")
FUSIONS = ("concat", "weighted", "tied", "deq", "base", "pro 2", "pro 3", *PRO_EQUILIBRIA)
# Tables 6 and 7 of arXiv 2306.16645; "tied" has no equilibrium, "weighted" nothing but x_f.
ABLATIONS = ("weighted", "tied", "no cell", "no combine", "no gate", "deq")
MODELS = tuple(LABELS)
# Those that are told which views a row has; the others get something in place of an absent one.
MASKED = ("weighted", "tied", "deq", "no cell", "no combine", "no gate")
Fill = Literal["mean", "zeros"]


class Encoder(nn.Sequential):
    """(B, features) -> (B, d): linear, ReLU, dropout; zeros for rows whose features are all NaN."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, DIM), nn.ReLU(), nn.Dropout(DROPOUT))

    def forward(self, x: Tensor) -> Tensor:
        absent = x.isnan().all(-1, keepdim=True)  # also where Pro-Fusion has added a context
        return super().forward(torch.where(absent, 0.0, x)).masked_fill(absent, 0.0)


class Joined(nn.Module):
    """Late fusion by a layer on the concatenation: N x (B, width) -> (B, d)."""

    def __init__(self, count: int, width: int = DIM, dim: int = DIM) -> None:
        super().__init__()
        self.layer = nn.Linear(count * width, dim)

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.relu(self.layer(torch.cat(tuple(xs), dim=-1)))


def count_parameters(model: nn.Module) -> int:
    """Numbers that a model uses: a single application has no use for back-projections."""
    once = [m for m in model.modules() if isinstance(m, ProFusion) and m.steps == 1]
    unused = sum(p.numel() for m in once for p in m.back_projections.parameters())
    return sum(p.numel() for p in model.parameters()) - unused


class StudyModel(nn.Module):
    """A model that trains by the objective of its task; ``key`` says which one it is."""

    key: str
    task: Task = CLASSES

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Answers (B, outputs), and how the solve went; None where there is no equilibrium."""
        raise NotImplementedError

    def loss(self, batch: MultiviewData) -> tuple[Tensor, SolveInfo | None]:
        """The objective; "pro equilibrium" alone gets no Jacobian penalty for its solve."""
        logits, info = self.logits(batch.views)
        if info is not None and self.key == "pro equilibrium":
            info = dataclasses.replace(info, blocks=())
        return self.task.objective(logits, batch.labels), info

    @property
    def num_parameters(self) -> int:
        """Numbers that the model uses."""
        return count_parameters(self)


class FusionClassifier(StudyModel):
    """One encoder per view, a fusion, a linear head.

    A row lacks a view where all of its features are NaN. Fusions of ``MASKED`` are told so; for the
    others something has to stand in its place.

    Args:
        key: one of ``MODELS``, or "progressive".
        widths: features of each view, standardised on the training rows.
        num_classes: C.
        fill: in place of an absent view, "mean": the training rows' mean of its features, which is
            0; "zeros": zeros for its encoding.
        modality_dropout: probability of a view to be absent in training.
    """

    def __init__(
        self,
        key: str,
        widths: Sequence[int],
        num_classes: int,
        fill: Fill = "mean",
        modality_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.key, self.fill = key, fill
        self.drop = ModalityDropout(modality_dropout)
        # Encoders first: under one seed they start from the same values whatever joins them.
        encoders = [Encoder(width) for width in widths]
        count = len(widths)
        self.pro: ProFusion | None = None
        if key == "base" or key.startswith("pro"):
            self.pro = _progressive(key, encoders, num_classes)
            return
        self.encoders = nn.ModuleList(encoders)
        self.fusion = None if key == "concat" else _FUSION[key](count)
        self.head = nn.Linear(DIM * count if key == "concat" else DIM, num_classes)

    def encode(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Per view (B, features), with ``fill`` in place of absent ones, -> (B, d)."""
        if self.fill == "mean":
            views = [torch.where(view.isnan(), 0.0, view) for view in views]
        return [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Per view (B, features) -> (B, C); the solve of an equilibrium."""
        present = self.drop(views, present_from_nan(views))
        if self.key not in MASKED:
            filler = 0.0 if self.fill == "mean" else torch.nan
            views = [
                torch.where(here[:, None], view, filler)
                for view, here in zip(views, present.T, strict=True)
            ]
        if self.pro is not None:
            if self.pro.solver is None:
                return self.pro(views), None
            return self.pro(views, return_info=True)
        encodings = self.encode(views)
        if self.fusion is None:
            return self.head(torch.cat(encodings, dim=-1)), None
        fused, info = self.fusion(encodings, present=present, return_info=True)
        return self.head(fused), None if self.key in ("weighted", "tied") else info


def _layer(count: int, **options: Any) -> DEQFusion:
    """With the papers' equations; the encoders' ReLU gives injections of about unit size."""
    return DEQFusion(DIM, count, num_groups=GROUPS, injection_norm=False, **options)


_FUSION: dict[str, Callable[[int], DEQFusion]] = {
    "weighted": lambda n: _layer(n, combine="weighted_sum"),
    "tied": lambda n: _layer(n, weight_tied_steps=TIED_STEPS),
    "deq": _layer,
    "no cell": lambda n: _layer(n, cell="identity"),
    "no combine": lambda n: _layer(n, combine="sum"),
    "no gate": lambda n: _layer(n, gate=False),
}


def _progressive(key: str, encoders: list[Encoder], num_classes: int) -> ProFusion:
    count = len(encoders)
    if key == "progressive":
        # Into the ReLU: the Linear, which is most of the work, sees the views only.
        late, sites, widths = _FUSION["weighted"](count), ["1"] * count, [DIM] * count
        steps = PROGRESSIVE_STEPS
        pro = ProFusion(encoders, late, DIM, steps=steps, sites=sites, in_dims=widths)
        pro.head = nn.Linear(DIM, num_classes)  # drawn last, as the heads of its rivals are
        return pro
    fusion, head = Joined(count), nn.Linear(DIM, num_classes)
    if key in PRO_EQUILIBRIA:
        return ProFusion(encoders, fusion, DIM, solver=Anderson(), head=head)
    steps = 1 if key == "base" else int(key.split()[1])
    return ProFusion(encoders, fusion, DIM, steps=steps, head=head)
