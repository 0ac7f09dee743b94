"""Fusion per proposal in a detector's head: ``python examples/detector_head.py`` (random data).

In the manner of arXiv 2306.16645 on SUN RGB-D: a detector of objects in rooms proposes P boxes per
scene, and has image features and point features of each. They are fused before the last layers,
which name the object and move the box.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, SolveInfo

WIDTHS, DIM = (20, 12), 32  # of image and point features
SCENES, PROPOSALS, CLASSES = 128, 8, 4  # class 0: nothing there


class Head(nn.Module):
    """Proposals (B, P, width) -> class scores (B, P, classes) and shifts of the boxes (B, P, 3)."""

    def __init__(self) -> None:
        super().__init__()
        # Any leading dimensions: each proposal has an equilibrium of its own, none sees another.
        self.fusion = DEQFusion(DIM, 2, in_dims=WIDTHS)
        self.scores, self.shifts = nn.Linear(DIM, CLASSES), nn.Linear(DIM, 3)

    def forward(self, image: Tensor, points: Tensor) -> tuple[Tensor, Tensor, SolveInfo]:
        fused, info = self.fusion([image, points], return_info=True)  # (B, P, d)
        return self.scores(fused), self.shifts(fused), info


def data() -> tuple[list[Tensor], Tensor, Tensor]:
    """Features of which each tells half of the class, and the points the shift."""
    classes = torch.randint(CLASSES, (SCENES, PROPOSALS))
    shifts = torch.randn(SCENES, PROPOSALS, 3)
    image, points = (torch.randn(SCENES, PROPOSALS, width) for width in WIDTHS)
    image[..., 0] += 4 * (classes % 2)
    points[..., 0] += 4 * (classes // 2)
    points[..., 1:4] += 3 * shifts
    return [image, points], classes, shifts


def loss_of(scores: Tensor, moved: Tensor, classes: Tensor, shifts: Tensor) -> Tensor:
    """Cross-entropy of all proposals, smooth L1 of the boxes that hold something."""
    held = classes > 0
    named = nn.functional.cross_entropy(scores.flatten(0, 1), classes.flatten())
    return named + nn.functional.smooth_l1_loss(moved[held], shifts[held])


def main(steps: int = 80) -> tuple[float, float]:
    """Train, and return accuracy and mean error of the boxes on other scenes."""
    torch.manual_seed(0)
    model, (views, classes, shifts) = Head(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        scores, moved, info = model(*views)
        loss = loss_of(scores, moved, classes, shifts) + info.jacobian_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    views, classes, shifts = data()
    with torch.no_grad():
        scores, moved, info = model.eval()(*views)
    hits = (scores.argmax(-1) == classes).double().mean().item()
    held = classes > 0
    error = (moved[held] - shifts[held]).abs().mean().item()
    print(
        f"classes: {hits:.0%} right; boxes: off by {error:.2f}, unmoved {shifts.abs().mean():.2f}"
    )
    print(
        f"proposals {tuple(info.converged.shape)}, {info.converged.double().mean():.0%} converged"
    )
    return hits, error


if __name__ == "__main__":
    main()
