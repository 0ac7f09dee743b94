"""What models learn, and by which numbers their answers are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from deqfuse.experiments.metrics import (
    accuracy,
    error_metrics,
    evaluate_metrics,
    multilabel_metrics,
    probability_metrics,
    sentiment_metrics,
)

__all__ = ["CLASSES", "LABELS", "LOSSES", "NUMBERS", "SENTIMENT", "Task"]

LOSSES = ("cross_entropy", "mae", "mse")  # of the numbers to choose an epoch by: less is better


@dataclass(frozen=True)
class Task:
    """One kind of answer; all functions take answers (B, outputs) and the rows' labels.

    Args:
        score: name of a number of which more is better.
        loss: name of one of which less is better.
        judge: both of them, on validation rows.
        objective: what training minimises, a tensor ().
        metrics: all that is reported on test rows.
    """

    score: str
    loss: str
    judge: Callable[[Tensor, Tensor], tuple[float, float]]
    objective: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor], dict[str, float]]


def _judge_classes(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return accuracy(logits, labels), F.cross_entropy(logits, labels).item()


def _class_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return evaluate_metrics(logits, labels) | probability_metrics(logits, labels)


def _judge_labels(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    loss = F.binary_cross_entropy_with_logits(logits, labels).item()
    return multilabel_metrics(logits, labels)["macro_f1"], loss


def _judge_sentiment(answers: Tensor, labels: Tensor) -> tuple[float, float]:
    found = sentiment_metrics(answers, labels)
    return found["acc2"], found["mae"]


def _judge_numbers(answers: Tensor, labels: Tensor) -> tuple[float, float]:
    found = error_metrics(answers, labels)
    return found["r2"], found["mse"]


# One class per row: labels (B,) int64.
CLASSES = Task("accuracy", "cross_entropy", _judge_classes, F.cross_entropy, _class_metrics)
# Any number of labels per row: (B, labels) float32 of 0 and 1.
LABELS = Task(
    "macro_f1",
    "cross_entropy",
    _judge_labels,
    F.binary_cross_entropy_with_logits,
    multilabel_metrics,
)
# A number from -3 to 3 per row: (B, 1) float32.
SENTIMENT = Task("acc2", "mae", _judge_sentiment, F.l1_loss, sentiment_metrics)
# Numbers: (B, outputs) float32.
NUMBERS = Task("r2", "mse", _judge_numbers, F.mse_loss, error_metrics)
