"""DEQ Fusion in a loop of Hugging Face's Accelerate: ``pip install accelerate``, then run this.

On several processes: ``accelerate launch examples/accelerate_loop.py``. The penalty is computed
inside the model's forward, which is where sharded parameters are whole.
Data: the handwritten numerals that ship with deqfuse, six views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deqfuse import DEQFusion
from deqfuse.data import split_numerals

DIM, PENALTY = 64, 60.0


class Classifier(nn.Module):
    """DEQ Fusion and a linear head; returns scores, penalty and the share of converged rows."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.fusion = DEQFusion(DIM, len(widths), in_dims=widths)
        self.head = nn.Linear(DIM, num_classes)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        fused, info = self.fusion(views, return_info=True)
        penalty = info.jacobian_penalty() if torch.is_grad_enabled() else fused.new_zeros(())
        return self.head(fused), penalty, info.converged.float().mean()


def main(epochs: int = 10) -> tuple[float, float]:
    """Train; returns accuracy and share of converged rows on the validation rows."""
    set_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = split_numerals()
    model: nn.Module = Classifier(data.train.widths, data.train.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    rows = TensorDataset(*data.train.views, data.train.labels)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(rows, batch_size=100, shuffle=True)
    )
    for _ in range(epochs):
        model.train()
        for *views, labels in loader:
            scores, penalty, _ = model(views)
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(scores, labels) + PENALTY * penalty)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.eval()
    held = data.validation.to(accelerator.device)
    with torch.no_grad():
        scores, _, converged = model(held.views)
    return float((scores.argmax(1) == held.labels).float().mean()), float(converged)


if __name__ == "__main__":
    print("accuracy {:.1%}, converged {:.1%}".format(*main()))
