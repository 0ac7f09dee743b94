"""DEQ Fusion in a Lightning module: ``pip install lightning``, then run this file.

Nothing about the layer is special: it is a module in a module. The Jacobian penalty joins the loss,
and the share of converged rows is logged beside it, since it is the number to watch.
Data: the handwritten numerals that ship with deqfuse, six views.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deqfuse import DEQFusion
from deqfuse.data import MultiviewData, split_numerals

DIM, PENALTY = 64, 60.0


class FusionModule(lightning.LightningModule):
    """One Linear per view inside the layer, DEQ Fusion, a linear head."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.fusion = DEQFusion(DIM, len(widths), in_dims=widths)
        self.head = nn.Linear(DIM, num_classes)

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        *views, labels = batch
        fused, info = self.fusion(views, return_info=True)
        loss = F.cross_entropy(self.head(fused), labels)
        self.log_dict({"loss": loss, "converged": info.converged.float().mean()}, prog_bar=True)
        return loss + PENALTY * info.jacobian_penalty()

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        *views, labels = batch
        scores = self.head(self.fusion(views))
        self.log("accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)


def loader(data: MultiviewData, *, shuffle: bool) -> DataLoader:
    return DataLoader(TensorDataset(*data.views, data.labels), batch_size=100, shuffle=shuffle)


def main(epochs: int = 10, folder: Path = Path("lightning-run")) -> dict[str, float]:
    """Train, and return what was logged last."""
    lightning.seed_everything(0)
    data = split_numerals()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, gradient_clip_val=1.0,
        logger=False, log_every_n_steps=1, enable_progress_bar=False,
    )  # fmt: skip
    model = FusionModule(data.train.widths, data.train.num_classes)
    trainer.fit(model, loader(data.train, shuffle=True), loader(data.validation, shuffle=False))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
