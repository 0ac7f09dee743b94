"""DEQ Fusion as a scikit-learn estimator, by skorch: ``pip install skorch``, then run this file.

skorch's ``NeuralNetClassifier`` gives a module ``fit``, ``predict``, ``score``, cross-validation
and grid search. Views travel as a dictionary of arrays. One method is overridden: the loss gets the
Jacobian penalty. Data: the handwritten numerals that ship with deqfuse, six views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from deqfuse import DEQFusion
from deqfuse.data import split_numerals

PENALTY = 60.0


class Classifier(nn.Module):
    """DEQ Fusion of the views, and a linear head: scores, with the penalty in training."""

    def __init__(self, widths: Sequence[int], num_classes: int, dim: int = 64) -> None:
        super().__init__()
        self.fusion = DEQFusion(dim, len(widths), in_dims=widths)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, **views: Tensor) -> tuple[Tensor, Tensor]:
        fused, info = self.fusion(list(views.values()), return_info=True)
        penalty = info.jacobian_penalty() if torch.is_grad_enabled() else fused.new_zeros(())
        return self.head(fused), penalty


class FusionClassifier(NeuralNetClassifier):
    """A scikit-learn classifier whose loss has the Jacobian penalty in it."""

    def get_loss(self, y_pred: Any, y_true: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores, penalty = y_pred
        return super().get_loss(scores, y_true, *args, **kwargs) + PENALTY * penalty


def main(epochs: int = 10) -> float:
    """Fit; returns the accuracy on the validation rows."""
    torch.manual_seed(0)
    data = split_numerals()
    names = data.train.view_names
    train, held = (
        {name: view.numpy() for name, view in zip(names, part.views, strict=True)}
        for part in (data.train, data.validation)
    )
    estimator = FusionClassifier(
        Classifier, module__widths=data.train.widths, module__num_classes=data.train.num_classes,
        criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, optimizer__weight_decay=1e-2,
        lr=2e-3, batch_size=100, max_epochs=epochs, train_split=None, verbose=0,
    )  # fmt: skip
    estimator.fit(train, data.train.labels.numpy())
    return float((estimator.predict(held) == data.validation.labels.numpy()).mean())


if __name__ == "__main__":
    print(f"accuracy {main():.1%}")
