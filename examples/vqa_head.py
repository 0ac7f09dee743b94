"""Fusion of a question and an image, then answers: ``python examples/vqa_head.py`` (made-up data).

In the manner of arXiv 2306.16645 on VQA-v2: one vector of the question, one of the image's regions,
the fusion, and a score per answer. Here a question asks for the colour or the shape of what a
picture shows, so that neither the question nor the picture alone tells the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deqfuse import DEQFusion, SolveInfo

WORDS, LENGTH, REGIONS, WIDTH, DIM = 12, 6, 5, 16, 32
COLOURS, SHAPES, ROWS = 4, 4, 512  # answers: first the colours, then the shapes


class VQA(nn.Module):
    """Words (B, T) and regions (B, R, width) -> scores of the answers (B, A)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM)
        self.question = nn.GRU(DIM, DIM, batch_first=True)
        self.regions, self.attention = nn.Linear(WIDTH, DIM), nn.Linear(2 * DIM, 1)
        self.fusion = DEQFusion(DIM, num_modalities=2)
        self.answers = nn.Linear(DIM, COLOURS + SHAPES)

    def forward(self, words: Tensor, regions: Tensor) -> tuple[Tensor, SolveInfo]:
        asked = self.question(self.words(words))[1][-1]  # (B, d)
        seen = torch.relu(self.regions(regions))  # (B, R, d)
        pairs = torch.cat([seen, asked[:, None].expand_as(seen)], dim=-1)
        seen = (self.attention(pairs).softmax(1) * seen).sum(1)  # where the question looks
        fused, info = self.fusion([asked, seen], return_info=True)
        return self.answers(fused), info


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Questions of random words with "colour" (0) or "shape" (1) among them, pictures, answers."""
    wanted = torch.randint(2, (ROWS,))
    words = torch.randint(2, WORDS, (ROWS, LENGTH))
    words[torch.arange(ROWS), torch.randint(LENGTH, (ROWS,))] = wanted
    colour, shape = torch.randint(COLOURS, (ROWS,)), torch.randint(SHAPES, (ROWS,))
    regions = 0.5 * torch.randn(ROWS, REGIONS, WIDTH)
    where = torch.randint(REGIONS, (ROWS,))  # the other regions are empty
    regions[torch.arange(ROWS), where, colour] += 3
    regions[torch.arange(ROWS), where, COLOURS + shape] += 3
    return words, regions, torch.where(wanted == 0, colour, COLOURS + shape)


def main(steps: int = 80) -> float:
    """Train, and return the share of right answers to other questions."""
    torch.manual_seed(0)
    model, (words, regions, answers) = VQA(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        scores, info = model(words, regions)
        loss = nn.functional.cross_entropy(scores, answers) + info.jacobian_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    words, regions, answers = data()
    with torch.no_grad():
        scores, info = model.eval()(words, regions)
    hits = (scores.argmax(1) == answers).double().mean().item()
    print(f"{hits:.0%} right; knowing only the question one could reach {1 / COLOURS:.0%}")
    print(f"{info.converged.double().mean():.0%} of the rows converged")
    return hits


if __name__ == "__main__":
    main()
