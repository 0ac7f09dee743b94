"""How models are trained: the epoch that is kept, the end, the batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deqfuse.data import MultiviewData
from deqfuse.experiments.training import Recipe, fit


class Constant(nn.Module):
    """Scores that gradient descent cannot change much; one parameter that counts the steps."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores
        self.step = nn.Parameter(torch.zeros(()))

    def loss(self, batch: MultiviewData) -> tuple[Tensor, None]:
        return -self.step, None

    def logits(self, views: list[Tensor]) -> tuple[Tensor, None]:
        """Right for the share of rows that the list gives for the current step."""
        rows = len(views[0])
        right = round(rows * self.scores[round(self.step.item()) - 1])
        truth = torch.arange(rows) < right
        return torch.stack([truth.float(), (~truth).float()], dim=1), None


@pytest.mark.parametrize(
    ("scores", "chosen"), [([0.2, 0.9, 0.4], 2), ([0.9, 0.4, 0.2], 1), ([0.1, 0.5, 0.5], 2)]
)
def test_best_epoch_on_validation_rows_is_kept(scores: list[float], chosen: int) -> None:
    data = MultiviewData(
        [torch.zeros(10, 1)], torch.zeros(10, dtype=torch.int64), ("a",), ("0", "1")
    )
    model = Constant(scores)
    # Adam's first steps have length lr: the parameter is the number of the step.
    recipe = Recipe(
        epochs=3, learning_rate=1.0, weight_decay=0.0, clip_norm=9.0, schedule="step", decay_every=9
    )
    history = fit(model, data, data, recipe, seed=0)
    assert history.chosen_epoch == chosen
    assert history.validation == scores
    assert history.train_loss == pytest.approx([0.0, -1.0, -2.0], abs=1e-3)  # before each step
    assert round(model.step.item()) == chosen


def test_epochs_are_chosen_by_cross_entropy_where_the_recipe_says_so() -> None:
    """Accuracy prefers the second epoch, cross-entropy the third, which is less sure of errors."""

    class Sure(Constant):
        def logits(self, views: list[Tensor]) -> tuple[Tensor, None]:
            logits, _ = super().logits(views)
            return logits * [9.0, 9.0, 1.0][round(self.step.item()) - 1], None

    data = MultiviewData(
        [torch.zeros(10, 1)], torch.zeros(10, dtype=torch.int64), ("a",), ("0", "1")
    )
    recipe = Recipe(3, 1.0, 0.0, 9.0, schedule="step", decay_every=9)
    chosen = {}
    for choose_by in ("accuracy", "cross_entropy"):
        model = Sure([0.5, 0.9, 0.8])
        history = fit(model, data, data, replace(recipe, choose_by=choose_by), seed=0)
        chosen[choose_by] = history.chosen_epoch
        assert round(model.step.item()) == history.chosen_epoch
        assert history.rank == max(
            replace(recipe, choose_by=choose_by).rank(*pair)
            for pair in zip(history.validation, history.validation_loss, strict=True)
        )
    assert chosen == {"accuracy": 2, "cross_entropy": 3}
    by_loss = replace(recipe, choose_by="cross_entropy")
    assert by_loss.rank(math.nan, math.nan) < by_loss.rank(
        0.0, 1e9
    )  # any finite answers are better


def test_training_ends_when_patience_does() -> None:
    data = MultiviewData(
        [torch.zeros(10, 1)], torch.zeros(10, dtype=torch.int64), ("a",), ("0", "1")
    )
    recipe = Recipe(9, 1.0, 0.0, 9.0, schedule="step", decay_every=99, patience=2)
    scores = [0.2, 0.9, 0.4, 0.3, 1.0, 1.0, 1.0, 1.0, 1.0]
    history = fit(Constant(scores), data, data, recipe, seed=0)
    assert (history.chosen_epoch, history.epochs) == (2, 4)
    model = Constant(scores)
    history = fit(model, data, None, recipe, seed=0)  # no rows to choose by: the last epoch
    assert (history.chosen_epoch, history.epochs, round(model.step.item())) == (9, 9, 9)
    assert history.values()["validation_accuracy"] is None


def test_batches_depend_on_the_seed_only() -> None:
    seen: list[list[float]] = []

    class Records(Constant):
        def loss(self, batch: MultiviewData) -> tuple[Tensor, None]:
            seen.append(batch.views[0].flatten().tolist())
            return self.step * 0, None

        def logits(self, views: list[Tensor]) -> tuple[Tensor, None]:
            return torch.zeros(len(views[0]), 2), None

    labels = torch.zeros(7, dtype=torch.int64)
    data = MultiviewData([torch.arange(7.0)[:, None]], labels, ("a",), ("0", "1"))
    recipe = Recipe(2, 1.0, 0.0, 1.0, batch_size=3)
    for seed in (0, 0, 1):
        torch.manual_seed(len(seen))
        fit(Records([]), data, data, recipe, seed)
    first, again, other = seen[:6], seen[6:12], seen[12:]
    assert first == again
    assert first != other
    assert sorted(x for batch in first[:3] for x in batch) == list(range(7))
    assert first[:3] != first[3:]  # a new order every epoch
