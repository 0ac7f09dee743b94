"""Models of the finance study: an LSTM per stock and what joins them; a transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, ProFusion, SolveInfo
from deqfuse.experiments.models import GROUPS, Joined, StudyModel
from deqfuse.experiments.tasks import NUMBERS

__all__ = ["LABELS", "FinanceModel"]

LABELS = {
    "transformer": "transformer (early fusion)",
    "late": "late fusion of LSTMs",
    "pro 2": "Pro-Fusion, R = 2",
    "deq": "DEQ Fusion",
}
EMBEDDED, HIDDEN, DIM = 8, 16, 32  # an LSTM's input and state, the fused vector
HEADS, LAYERS, DROPOUT = 4, 2, 0.1  # of the transformer


class StockEncoder(nn.Module):
    """Returns of one stock (B, T, 1) -> the LSTM's last state (B, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, EMBEDDED)
        self.lstm = nn.LSTM(EMBEDDED, HIDDEN, batch_first=True)  # the injection site

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.embed(x))[1][0][-1]


class EarlyTransformer(nn.Module):
    """Returns of all stocks, day by day (B, T, stocks) -> the last day's state (B, d)."""

    def __init__(self, stocks: int, window: int) -> None:
        super().__init__()
        self.embed = nn.Linear(stocks, DIM)
        self.positions = nn.Parameter(0.02 * torch.randn(window, DIM))
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, DROPOUT, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x) + self.positions)[:, -1]


class FinanceModel(StudyModel):
    """Windows of N stocks -> what their squared next returns will be.

    Args:
        key: a key of ``LABELS``.
        stocks: N.
        window: days T.
    """

    task = NUMBERS

    def __init__(self, key: str, stocks: int, window: int) -> None:
        super().__init__()
        self.key = key
        head = nn.Linear(DIM, stocks)
        if key == "transformer":
            self.body: nn.Module = EarlyTransformer(stocks, window)
            self.head = head
            return
        encoders = [StockEncoder() for _ in range(stocks)]
        if key == "deq":
            self.encoders = nn.ModuleList(encoders)
            self.body = DEQFusion(DIM, stocks, num_groups=GROUPS, in_dims=[HIDDEN] * stocks)
            self.head = head
            return
        steps = 1 if key == "late" else int(key.split()[1])
        joined = Joined(stocks, HIDDEN, DIM)
        sites = ["lstm"] * stocks
        self.body = ProFusion(encoders, joined, DIM, steps=steps, sites=sites, head=head)

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, SolveInfo | None]:
        """N windows (B, T, 1) -> (B, N)."""
        if self.key == "transformer":
            return self.head(self.body(torch.cat(tuple(views), dim=-1))), None
        if self.key != "deq":
            return self.body(views), None
        encodings = [e(x) for e, x in zip(self.encoders, views, strict=True)]
        fused, info = self.body(encodings, return_info=True)
        return self.head(fused), info
