"""Train on rows that lack modalities: ``python examples/missing_modalities.py`` (random data)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, ModalityDropout, Outcome, SolveInfo, present_from_nan

WIDTHS, DIM, ROWS = (20, 12, 6), 32, 256


class Classifier(nn.Module):
    """Projections and fusion in one layer, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = ModalityDropout(0.2)  # so that it learns to do without
        self.fusion = DEQFusion(DIM, num_modalities=len(WIDTHS), in_dims=WIDTHS)
        self.head = nn.Linear(DIM, 2)

    def forward(self, views: list[Tensor]) -> tuple[Tensor, SolveInfo]:
        present = self.drop(views, present_from_nan(views))
        fused, info = self.fusion(views, present=present, return_info=True)
        return self.head(fused), info


def data() -> tuple[list[Tensor], Tensor]:
    """Views with NaN where a row lacks them, and labels."""
    labels = torch.arange(ROWS) % 2
    present = torch.rand(len(WIDTHS), ROWS, 1) > 0.3
    present[0] |= ~present.any(0)  # a row with nothing is refused
    views = [torch.randn(ROWS, width) + 0.7 * labels[:, None] for width in WIDTHS]
    return [v.where(here, torch.nan) for v, here in zip(views, present, strict=True)], labels


def main(steps: int = 60) -> float:
    """Train, print the accuracy per number of views, and return it for all rows."""
    torch.manual_seed(0)
    model, (views, labels) = Classifier(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits, info = model(views)
        loss = nn.functional.cross_entropy(logits, labels) + info.jacobian_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    views, labels = data()
    with torch.no_grad():
        logits, info = model.eval()(views)
    hits, counts = (logits.argmax(1) == labels).double(), present_from_nan(views).sum(1)
    for n in counts.unique().tolist():
        print(f"{n} views: {hits[counts == n].mean():.0%} of {(counts == n).sum()} rows")
    print("cells without anything to solve:", int((info.cells.outcome == Outcome.ABSENT).sum()))
    return hits.mean().item()


if __name__ == "__main__":
    main()
