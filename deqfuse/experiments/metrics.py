"""Metrics of classes, of labels and of numbers, by their textbook formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "METRIC_NAMES",
    "accuracy",
    "auc",
    "calibration_error",
    "error_metrics",
    "evaluate_metrics",
    "f1_scores",
    "multilabel_metrics",
    "probability_metrics",
    "sentiment_metrics",
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


def multilabel_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``micro_f1`` and ``macro_f1`` of rows that may have several labels, as shares of 1.

    A label is answered where its probability is above one half. Micro counts all answers together;
    macro is the mean over the labels, 0 for one that is neither there nor answered.

    Args:
        logits: (B, labels); NaN scores if one is not finite.
        labels: (B, labels) of 0 and 1.
    """
    if not logits.isfinite().all():
        return {"micro_f1": float("nan"), "macro_f1": float("nan")}
    truth, answered = labels > 0.5, logits > 0
    hits = (truth & answered).sum(0).double()
    total = truth.sum(0).double() + answered.sum(0)  # 2 TP + FP + FN
    each = torch.where(total > 0, 2 * hits / total.clamp(min=1), 0.0)
    return {
        "micro_f1": (2 * hits.sum() / total.sum().clamp(min=1)).item(),
        "macro_f1": each.mean().item(),
    }


def error_metrics(answers: Tensor, truth: Tensor) -> dict[str, float]:
    """``mse``, and ``r2``: the share of the variance that the answers explain.

    ``r2`` is 1 minus the squared errors over those of the truth's own mean per output; below 0 the
    answers are worse than that mean, and it is NaN where the truth does not vary.

    Args:
        answers: (B, outputs).
        truth: the same shape.
    """
    answers, truth = answers.double(), truth.double()
    error = (answers - truth).square().mean().item()
    spread = (truth - truth.mean(0)).square().mean().item()
    return {"mse": error, "r2": 1 - error / spread if spread > 0 else float("nan")}


def sentiment_metrics(answers: Tensor, truth: Tensor) -> dict[str, float]:
    """What is reported of CMU-MOSI, of numbers from -3 (negative) to 3 (positive).

    ``acc7``: both rounded to the same of the seven whole numbers. ``acc2``: both above zero, or
    neither, over all rows (others leave out rows whose truth is 0). ``f1``: of these two classes,
    weighted by their rows. ``mae``: mean absolute error. ``corr``: Pearson's correlation, NaN where
    the answers or the truth do not vary. All are NaN if an answer is not finite.

    Args:
        answers: (B, 1).
        truth: (B, 1).
    """
    a, t = answers.double().flatten(), truth.double().flatten()
    if not a.isfinite().all():
        return dict.fromkeys(("acc7", "acc2", "f1", "mae", "corr"), float("nan"))
    f1, support = f1_scores((a > 0).long(), (t > 0).long(), 2)
    seven = a.clamp(-3, 3).round() == t.clamp(-3, 3).round()
    varies = len(a) > 1 and a.std() > 0 and t.std() > 0
    return {
        "acc7": seven.double().mean().item(),
        "acc2": ((a > 0) == (t > 0)).double().mean().item(),
        "f1": ((f1 * support).sum() / support.sum()).item(),
        "mae": (a - t).abs().mean().item(),
        "corr": torch.corrcoef(torch.stack([a, t]))[0, 1].item() if varies else float("nan"),
    }
