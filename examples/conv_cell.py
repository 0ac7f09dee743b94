"""Cells of one's own: 1x1 convolutions over sequences. ``python examples/conv_cell.py``.

In the manner of the authors' code for CMU-MOSI (arXiv 2306.16645), whose cell is two 1x1
convolutions around a norm, on features (B, T, d) of words and sound aligned at T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, SolveInfo

WIDTHS, DIM, T, ROWS = (20, 5), 16, 6, 64  # of text and of audio


class ConvCell(nn.Module):
    """``z <- relu(W2 norm(W1 z + x))``; a convolution of width 1 is the same map at each position.

    The norm is a GroupNorm, over the features of a group at all positions of one sample. The
    authors' is a BatchNorm, over the batch: samples then see each other, so that no sample has an
    equilibrium of its own, and the running averages move with every evaluation. It is refused.
    """

    def __init__(self, dim: int, num_groups: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, dim, 1), nn.Conv1d(dim, dim, 1)
        self.norm = nn.GroupNorm(num_groups, dim)
        nn.init.normal_(self.conv2.weight, std=0.3 / dim**0.5)  # small: so that z -> z contracts

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One step for samples z and x (R, T, d); a convolution wants (R, d, T)."""
        return torch.relu(self.conv2(self.norm(self.conv1(z.mT) + x.mT))).mT


class Sentiment(nn.Module):
    """Fusion at every position, a mean over them, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        # With cell_dims=2 a cell gets whole samples (R, T, d), and converges per sample.
        self.fusion = DEQFusion(
            DIM, 2, in_dims=WIDTHS, cells=[ConvCell(DIM), ConvCell(DIM)], cell_dims=2
        )
        self.head = nn.Linear(DIM, 2)

    def forward(self, text: Tensor, audio: Tensor) -> tuple[Tensor, SolveInfo]:
        fused, info = self.fusion([text, audio], return_info=True)  # (B, T, d)
        return self.head(fused.mean(1)), info


def data() -> tuple[list[Tensor], Tensor]:
    """Sequences (B, T, width) that lean towards their label."""
    labels = torch.arange(ROWS) % 2
    return [torch.randn(ROWS, T, w) + 0.3 * labels[:, None, None] for w in WIDTHS], labels


def main(steps: int = 30) -> float:
    """Train, print how the cells converge, and return the accuracy on other data."""
    torch.manual_seed(0)
    model, (views, labels) = Sentiment(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits, info = model(*views)
        loss = nn.functional.cross_entropy(logits, labels) + info.jacobian_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    views, labels = data()
    with torch.no_grad():
        logits, info = model.eval()(*views)
    hits = (logits.argmax(1) == labels).double().mean().item()
    print(f"accuracy {hits:.0%}; {info.converged.double().mean():.0%} of all rows converged")
    print("evaluations per sample:", info.cells.nfe[..., 0].double().mean(1).tolist())
    return hits


if __name__ == "__main__":
    main()
