"""What studies measure: metrics, calibration, rivals of the best, curves, warnings counted."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from deqfuse import ConvergenceWarning
from deqfuse.experiments import metrics, training
from deqfuse.experiments.comparison import KINDS, Run
from deqfuse.experiments.comparison_tables import comparison_text
from deqfuse.experiments.measurements import Curve
from deqfuse.reports import charts


def test_metrics_against_hand_counted_values() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    f1, support = metrics.f1_scores(predicted, labels, 4)
    assert f1.tolist() == pytest.approx([0.8, 0.5, 2 / 3, 0.0])
    assert support.tolist() == [3, 2, 1, 0]
    logits = torch.nn.functional.one_hot(predicted, 3).double()
    scores = metrics.evaluate_metrics(logits, labels)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["macro_f1"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert scores["weighted_f1"] == pytest.approx((3 * 0.8 + 2 * 0.5 + 2 / 3) / 6)


def test_calibration_error_against_hand_counted_values() -> None:
    """Of 15 bins, 0.61 to 0.65 share one and 0.9 has its own."""
    sure = torch.tensor([0.61, 0.65, 0.65, 0.9]).double()
    logits = torch.stack([sure, 1 - sure], 1).log()
    labels = torch.tensor([0, 0, 1, 1])
    expected = (abs(0.61 + 0.65 + 0.65 - 2) + abs(0.9 - 0)) / 4
    assert metrics.calibration_error(logits, labels) == pytest.approx(expected)
    one = metrics.calibration_error(logits, labels, bins=1)
    assert one == pytest.approx(abs(0.61 + 0.65 + 0.65 + 0.9 - 2) / 4)
    scores = metrics.probability_metrics(logits, labels)
    assert scores["ece"] == pytest.approx(expected)
    chances = 0.61 * 0.65 * (1 - 0.65) * (1 - 0.9)
    assert scores["cross_entropy"] == pytest.approx(-math.log(chances) / 4)
    certain = torch.tensor([[0.0, 500.0]])  # probability 1: the last bin holds it
    assert metrics.calibration_error(certain, torch.tensor([1])) == 0.0


def test_auc_counts_pairs_and_halves_ties() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8])
    positive = torch.tensor([False, False, True, True])
    assert metrics.auc(scores, positive) == pytest.approx(3.5 / 4)
    assert metrics.auc(-scores, positive) == pytest.approx(0.5 / 4)
    nothing = metrics.auc(scores, torch.zeros(4, dtype=torch.bool))
    assert nothing != nothing


def test_rivals_of_the_best_are_listed() -> None:
    """Whoever lies within the spread of the best mean is named with it."""
    scores = {"concat": 0.95, "weighted": 0.949, "progressive": 0.951, "tied": 0.8, "deq": 0.948}
    runs = [
        Run(kind, seed, torch.nn.Identity(), training.History(), {"accuracy": scores[kind.key] + d})  # type: ignore[arg-type]
        for kind in KINDS
        for seed, d in enumerate((-0.005, 0.005))
    ]
    text = comparison_text(runs)
    assert "Pro-Fusion (concatenation, weighted sum and DEQ Fusion within the spread of it)" in text
    assert "lowest: 5 tied steps, 15.1 points below" in text


def test_curve_holds_the_last_residual_of_stopped_rows() -> None:
    nan = float("nan")
    trace = torch.tensor([[0.5, 0.4, 0.3], [nan, 0.2, 0.1], [nan, nan, 0.01]])
    curve = Curve.of("Anderson", "fuse", trace)
    assert curve.median.tolist() == pytest.approx([0.4, 0.2, 0.2])
    assert trace.isnan().sum() == 3  # the caller's trace is left alone


def test_convergence_warnings_are_counted_and_others_pass() -> None:
    def count() -> list[str]:
        with training.collect_warnings(ConvergenceWarning) as messages:
            for category in (ConvergenceWarning, ConvergenceWarning, RuntimeWarning):
                warnings.warn(f"a {category.__name__}", category, stacklevel=1)
        return messages

    with pytest.warns(RuntimeWarning, match="a RuntimeWarning"):
        seen = count()
    assert seen == ["a ConvergenceWarning"] * 2


@pytest.mark.parametrize("label", ["short", "GN(relu(x_f)), injections as they come"])
def test_legends_stay_inside_the_picture(label: str) -> None:
    drawn = [charts.Line(f"{label} {k}", [0, 1], [[k, 2 * k]]) for k in range(7)]
    figure = charts.lines([charts.Panel("", "x", "y", drawn)] * 2, columns=2)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
