"""Classification metrics, by their textbook formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "METRIC_NAMES",
    "accuracy",
    "auc",
    "calibration_error",
    "evaluate_metrics",
    "f1_scores",
    "probability_metrics",
]

BINS = 15  # of the calibration error

# Of what evaluate_metrics() computes, as headers of a table.
METRIC_NAMES = {
    "accuracy": "accuracy %",
    "f1": "F1 %",
    "auc": "AUC %",
    "weighted_f1": "weighted F1 %",
    "macro_f1": "macro F1 %",
}


def accuracy(scores: Tensor, labels: Tensor) -> float:  # (B, classes); (B,) int64
    """Share of rows whose highest score is that of their class; NaN if a score is not finite."""
    if not scores.isfinite().all():
        return float("nan")  # argmax would call NaN the highest
    return (scores.argmax(1) == labels).double().mean().item()


def f1_scores(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Per class ``F1 = 2 TP / (2 TP + FP + FN)`` (0 where that is 0/0), and the class's row count.

    Returns:
        Two float64 tensors (num_classes,).
    """
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes).double()  # rows: truth
    hits = confusion.diagonal()
    support = confusion.sum(1)
    total = support + confusion.sum(0)  # 2 TP + FP + FN
    return torch.where(total > 0, 2 * hits / total.clamp(min=1), 0.0), support


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: chance that a positive row outranks a negative one, ties half.

    Args:
        scores: (B,) floating point, higher means more positive.
        positive: (B,) bool.

    Returns:
        The area, NaN when one of the two classes has no rows or a score is not finite.
    """
    up, down = scores[positive].double(), scores[~positive].double()
    if not len(up) or not len(down) or not scores.isfinite().all():
        return float("nan")
    ordered = down.sort().values
    below = torch.searchsorted(ordered, up)
    not_above = torch.searchsorted(ordered, up, right=True)
    return ((below + not_above).double() / 2).mean().item() / len(down)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy, in probability.

    Rows fall into ``bins`` equal intervals of their highest probability; the differences between
    the mean of it and the accuracy in an interval are averaged over the rows (Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, Eq. 3).

    Args:
        logits: (B, classes).
        labels: (B,) int64.
        bins: number of intervals, closed above: the first is (0, 1/bins].

    Returns:
        0 for perfect calibration, at most 1; NaN if a logit is not finite.
    """
    if not logits.isfinite().all():
        return float("nan")
    confidence, predicted = logits.double().softmax(1).max(1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = confidence - (predicted == labels).double()
    return gaps.new_zeros(bins).index_add(0, which, gaps).abs().sum().item() / len(labels)


def probability_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``cross_entropy`` (nats) and ``ece``, what :func:`calibration_error` gives.

    Args:
        logits: (B, classes).
        labels: (B,) int64.
    """
    loss = F.cross_entropy(logits.double(), labels).item()
    return {"cross_entropy": loss, "ece": calibration_error(logits, labels)}


def evaluate_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and F1 of (B, classes) logits, as shares of 1.

    The keys are ``accuracy``, for two classes ``f1`` (of class 1) and ``auc``, and ``weighted_f1``
    (classes weighted by their rows) and ``macro_f1`` (all classes alike). All are NaN if a logit is
    not finite.
    """
    num_classes = logits.shape[1]
    f1, support = f1_scores(logits.argmax(1), labels, num_classes)
    if not logits.isfinite().all():
        f1 = torch.full_like(f1, float("nan"))
    metrics = {"accuracy": accuracy(logits, labels)}
    if num_classes == 2:
        metrics["f1"] = f1[1].item()
        metrics["auc"] = auc(logits[:, 1] - logits[:, 0], labels == 1)
    metrics["weighted_f1"] = ((f1 * support).sum() / support.sum().clamp(min=1)).item()
    metrics["macro_f1"] = f1.mean().item()
    return metrics
