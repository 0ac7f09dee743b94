"""DEQ Fusion under Hugging Face's Trainer: ``pip install transformers accelerate``, then run this.

The Trainer asks for a module that takes names from the data set and returns a dictionary with a
``loss``. The Jacobian penalty goes into that loss, so nothing of the Trainer is overridden. Data:
the handwritten numerals that ship with deqfuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from deqfuse import DEQFusion
from deqfuse.data import MultiviewData, split_numerals

DIM, PENALTY = 64, 60.0


class Rows(Dataset):
    """Samples as the dictionaries that the Trainer stacks into batches."""

    def __init__(self, data: MultiviewData) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.num_rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        views = zip(self.data.view_names, self.data.views, strict=True)
        return {**{name: view[row] for name, view in views}, "labels": self.data.labels[row]}


class Classifier(nn.Module):
    """DEQ Fusion of named views, and a linear head."""

    def __init__(self, names: Sequence[str], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.names = names
        self.fusion = DEQFusion(DIM, len(widths), in_dims=widths)
        self.head = nn.Linear(DIM, num_classes)

    def forward(self, labels: Tensor, **views: Tensor) -> dict[str, Tensor]:
        fused, info = self.fusion([views[name] for name in self.names], return_info=True)
        scores = self.head(fused)
        penalty = PENALTY * info.jacobian_penalty() if torch.is_grad_enabled() else 0.0
        return {"loss": F.cross_entropy(scores, labels) + penalty, "logits": scores}


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


def main(epochs: int = 10, folder: Path = Path("trainer-run")) -> dict[str, Any]:
    """Train, and return the validation scores."""
    data = split_numerals()
    options = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=100,
        learning_rate=2e-3, weight_decay=1e-2, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Classifier(data.train.view_names, data.train.widths, data.train.num_classes)
    trainer = Trainer(
        model, options, train_dataset=Rows(data.train), eval_dataset=Rows(data.validation),
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
