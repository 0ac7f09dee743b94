"""Metrics of labels, numbers and sentiment, and trainings that are judged by them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deqfuse.data import MultiviewData
from deqfuse.experiments import tasks
from deqfuse.experiments.metrics import error_metrics, multilabel_metrics, sentiment_metrics
from deqfuse.experiments.training import Recipe, evaluate, fit


def test_f1_of_labels_by_hand() -> None:
    labels = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    answered = torch.tensor([[1.0, -1, -1, 2], [3, 1, -1, -1], [-1, 1, -1, -1]])
    found = multilabel_metrics(answered, labels)
    # Per label 2 TP / (2 TP + FP + FN): 4/4, 2/4, 0/0 -> 0, 0/1.
    assert found["macro_f1"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 5))
    assert all(map(math.isnan, multilabel_metrics(answered * torch.nan, labels).values()))


def test_errors_by_hand() -> None:
    truth = torch.tensor([[0.0, 10], [2, 10], [4, 13]])
    assert error_metrics(truth, truth) == {"mse": 0.0, "r2": 1.0}
    # The variances are 8/3 and 2; answering the mean explains nothing.
    mean = error_metrics(truth.mean(0).expand(3, 2), truth)
    assert mean["mse"] == pytest.approx((8 / 3 + 2) / 2)
    assert mean["r2"] == pytest.approx(0.0)
    assert error_metrics(truth + 1, truth)["r2"] == pytest.approx(1 - 1 / ((8 / 3 + 2) / 2))
    assert math.isnan(error_metrics(truth, torch.ones(3, 2))["r2"])


def test_sentiment_by_hand() -> None:
    truth = torch.tensor([[-3.0], [-0.4], [0.0], [0.6], [2.4], [2.6]])
    answers = torch.tensor([[-5.0], [0.4], [-0.2], [1.2], [2.2], [2.4]])
    found = sentiment_metrics(answers, truth)
    # Rounded: -3 -3, 0 0, 0 0, 1 1, 2 2, 3 against 2; signs: only the second differs.
    assert found["acc7"] == pytest.approx(5 / 6)
    assert found["acc2"] == pytest.approx(5 / 6)
    # Above zero: 3 hits, 1 false; else: 2 hits, 1 missed; three rows of each.
    assert found["f1"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert found["mae"] == pytest.approx((2 + 0.8 + 0.2 + 0.6 + 0.2 + 0.2) / 6)
    a, t = answers.double().flatten(), truth.double().flatten()
    a, t = a - a.mean(), t - t.mean()
    assert found["corr"] == pytest.approx(float((a @ t) / (a.norm() * t.norm())))
    assert math.isnan(sentiment_metrics(truth * 0, truth)["corr"])
    assert all(map(math.isnan, sentiment_metrics(truth * torch.nan, truth).values()))


class Growing(nn.Module):
    """Adam's first steps have length lr: the answer is the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.zeros(()))

    def loss(self, batch: MultiviewData) -> tuple[Tensor, None]:
        return -self.step, None

    def logits(self, views: list[Tensor]) -> tuple[Tensor, None]:
        return self.step.expand(len(views[0]), 1), None


@pytest.mark.parametrize("task", [tasks.NUMBERS, tasks.SENTIMENT])
def test_epochs_are_chosen_by_the_loss_of_the_task(task: tasks.Task) -> None:
    truth = torch.tensor([[1.0], [2.0], [2.4]])
    data = MultiviewData([torch.zeros(3, 1)], truth, ("a",), ("y",))
    recipe = Recipe(4, 1.0, 0.0, 9.0, schedule="step", choose_by=task.loss)  # type: ignore[arg-type]
    model = Growing()
    history = fit(model, data, data, recipe, seed=0, task=task)
    assert history.chosen_epoch == 2
    assert round(model.step.item()) == 2
    values = history.values()
    metric = {"mse": (1 + 0.16) / 3, "mae": 1.4 / 3}[task.loss]
    assert values[f"validation_{task.loss}"] == pytest.approx(metric, abs=1e-5)
    assert f"validation_{task.score}" in values
    assert evaluate(model, data, task)[task.loss] == pytest.approx(metric, abs=1e-5)
