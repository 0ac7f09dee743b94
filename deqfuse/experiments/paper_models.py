"""Models of the studies on MM-IMDB and CMU-MOSI: an encoder per view, a fusion, a linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, SolveInfo
from deqfuse.experiments.models import GROUPS, StudyModel
from deqfuse.experiments.tasks import Task

__all__ = ["LAYERS", "MaxoutEncoder", "SequenceEncoder", "TwoViews"]

DROPOUT = 0.3
# Arguments of DEQFusion by key; other keys are concatenation and the names of single views.
LAYERS: dict[str, dict[str, Any]] = {
    "weighted": {"combine": "weighted_sum", "injection_norm": False},
    "paper": {"injection_norm": False},
    "released": {"variant": "released-mmimdb", "injection_norm": False},
    "deq": {},
}


class MaxoutEncoder(nn.Sequential):
    """(B, width) -> (B, out): two maxout layers with batch norms, as in MultiBench's MM-IMDB.

    The batch norms are no obstacle here: they stand before the equilibrium, not inside.
    """

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(nn.BatchNorm1d(width, eps=1e-4), *_maxout(width, hidden))
        self.extend(_maxout(hidden, out))


def _maxout(width: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, 2 * out), _Max(), nn.BatchNorm1d(out), nn.Dropout(DROPOUT)]


class _Max(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (B, 2 d) -> (B, d), the larger of neighbours
        return x.unflatten(-1, (-1, 2)).amax(-1)


class SequenceEncoder(nn.Module):
    """(B, T, width) -> (B, out): a GRU's last state, where sequences are filled up in front."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, out, batch_first=True)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.gru(x)[1][-1])


class TwoViews(StudyModel):
    """The model of a study.

    Args:
        key: a key of ``LAYERS``, "concat", or the name of one of the views.
        task: what it learns.
        encoders: by the name of their view, each (B, ...) -> (B, dim).
        dim: width d of the encodings.
        outputs: of the head.
    """

    def __init__(
        self, key: str, task: Task, encoders: Mapping[str, nn.Module], dim: int, outputs: int
    ) -> None:
        super().__init__()
        self.key, self.task = key, task
        self.chosen = [i for i, name in enumerate(encoders) if key in (name, *LAYERS, "concat")]
        self.encoders = nn.ModuleList([*encoders.values()][i] for i in self.chosen)
        count = len(self.chosen)
        self.fusion: DEQFusion | None = None
        if key in LAYERS:
            self.fusion = DEQFusion(dim, count, num_groups=GROUPS, **LAYERS[key])
        self.head = nn.Linear(dim if self.fusion is not None else dim * count, outputs)

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """Views (B, ...) -> (B, outputs)."""
        encoded = [e(views[i]) for e, i in zip(self.encoders, self.chosen, strict=True)]
        if self.fusion is None:
            return self.head(torch.cat(encoded, dim=-1)), None
        fused, info = self.fusion(encoded, return_info=True)
        return self.head(fused), None if self.key == "weighted" else info
