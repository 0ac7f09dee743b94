"""Paired noise and the metrics computed from performance curves, against hand-made values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from deqfuse.robustness import (
    add_noise,
    effective_robustness,
    plot_curves,
    relative_robustness,
    robust_auc,
    robustness_curve,
)

LEVELS = (0.0, 0.5, 1.0, 2.0)


def features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(400, 5, dtype=dtype), torch.ones(400, 2, 3, dtype=dtype)]


def test_noise_is_seeded_and_paired() -> None:
    xs = features()
    one, again = add_noise(xs, 1.0, seed=3), add_noise(xs, 1.0, seed=3)
    for a, b in zip(one, again, strict=True):
        assert torch.equal(a, b)
    other = add_noise(xs, 1.0, seed=4)
    assert not torch.equal(other[0], one[0])
    # The same draw at every level and in every dtype, whatever else gets noise.
    torch.testing.assert_close(add_noise(xs, 2.5, seed=3)[0], 2.5 * one[0])
    assert torch.equal(add_noise(xs, 1.0, modalities=1, seed=3)[1], one[1])
    double = add_noise(features(torch.float64), 1.0, seed=3)
    assert torch.equal(double[0].float(), one[0])
    assert torch.equal(xs[0], torch.zeros(400, 5)), "the input is left alone"


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    add_noise(features(), 1.0)
    assert torch.equal(torch.rand(2), expected)


def test_noise_goes_where_it_should() -> None:
    xs = features()
    noisy = add_noise(xs, 2.0, modalities=[1])
    assert noisy[0] is xs[0]
    e = (noisy[1] - xs[1]) / 2
    assert abs(float(e.mean())) < 4 / e.numel() ** 0.5
    assert abs(float(e.std()) - 1) < 4 / (2 * e.numel()) ** 0.5
    both = add_noise(xs, 1.0)
    flat = [(n - x).flatten()[:2000] for n, x in zip(both, xs, strict=True)]
    assert not torch.equal(*flat), "modalities get different noise"
    for clean, x in zip(add_noise(xs, 0.0), xs, strict=True):
        assert torch.equal(clean, x)


def test_seeds_and_modalities_never_share_noise() -> None:
    xs = [torch.zeros(8)] * 3
    draws = [x for seed in range(4) for x in add_noise(xs, 1.0, seed=seed)]
    assert len({tuple(x.tolist()) for x in draws}) == len(draws)


def test_curve_is_the_performance_at_every_level() -> None:
    xs, seen = features(), []

    def evaluate(noisy: list[Tensor]) -> float:
        seen.append(noisy)
        assert not torch.is_grad_enabled()
        return float((noisy[0] - xs[0]).abs().mean())

    curve = robustness_curve(evaluate, xs, LEVELS, modalities=0, seed=2)
    assert curve.dtype == torch.float64
    assert curve[0] == 0
    torch.testing.assert_close(curve / curve[2], torch.tensor(LEVELS, dtype=torch.float64))
    for level, noisy in zip(LEVELS, seen, strict=True):
        assert torch.equal(noisy[0], add_noise(xs, level, modalities=0, seed=2)[0])


def test_robust_auc_by_hand() -> None:
    curve, baseline = [0.9, 0.8, 0.6, 0.2], [0.9, 0.7, 0.6, 0.4]
    area = 0.5 * (0 + 0.1) / 2 + 0.5 * (0.1 + 0) / 2 + 1.0 * (0 - 0.2) / 2
    assert float(robust_auc(curve, baseline, LEVELS)) == pytest.approx(area, abs=1e-15)


def test_robust_auc_of_identical_models_is_exactly_zero() -> None:
    curve = torch.rand(7, len(LEVELS))
    for higher in (True, False):
        assert (robust_auc(curve, curve.clone(), LEVELS, higher_is_better=higher) == 0).all()


def test_robust_auc_changes_sign_with_the_metrics_direction() -> None:
    accuracy, baseline = torch.rand(3, 4).double(), torch.rand(3, 4).double()
    gained = robust_auc(accuracy, baseline, LEVELS)
    assert gained.shape == (3,)
    assert torch.equal(robust_auc(accuracy, baseline, LEVELS, higher_is_better=False), -gained)
    # Errors of the same models rank them the same way.
    errors = robust_auc(1 - accuracy, 1 - baseline, LEVELS, higher_is_better=False)
    torch.testing.assert_close(errors, gained)


def test_relative_robustness_by_hand() -> None:
    """MultiBench's own spacing: levels a tenth apart."""
    levels = [0.0, 0.1, 0.2]
    area = (0.8 + 0.6) * 0.1 / 2 + (0.6 + 0.5) * 0.1 / 2
    assert float(relative_robustness([0.8, 0.6, 0.5], levels)) == pytest.approx(area, abs=1e-15)
    error = relative_robustness([0.8, 0.6, 0.5], levels, higher_is_better=False)
    assert float(error) == pytest.approx(-area, abs=1e-15)


def test_effective_robustness_ignores_the_clean_performance() -> None:
    late = torch.tensor([0.7, 0.6, 0.5, 0.3], dtype=torch.float64)
    assert effective_robustness(late, late, LEVELS) == 0
    torch.testing.assert_close(
        effective_robustness(late + 0.2, late, LEVELS),
        torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15,
    )  # fmt: skip
    curve = [0.9, 0.85, 0.7, 0.5]
    area = 0.5 * (0 + 0.05) / 2 + 0.5 * (0.05 + 0) / 2 + 1.0 * 0 / 2
    assert float(effective_robustness(curve, late, LEVELS)) == pytest.approx(area, abs=1e-15)
    flipped = effective_robustness(curve, late, LEVELS, higher_is_better=False)
    assert float(flipped) == pytest.approx(-area, abs=1e-15)


def test_refusals() -> None:
    xs = features()
    with pytest.raises(ValueError, match="level: expected a number >= 0, got -1"):
        add_noise(xs, -1)
    with pytest.raises(ValueError, match="level: expected a number >= 0, got nan"):
        add_noise(xs, float("nan"))
    with pytest.raises(ValueError, match="modalities: expected indices from 0 to 1, got 2"):
        add_noise(xs, 1, modalities=[0, 2])
    with pytest.raises(TypeError, match=r"features\[0\]: expected a floating-point dtype"):
        add_noise([torch.zeros(3, dtype=torch.long)], 1)
    for levels in ([0.0], [0.0, 0.0], [1.0, 0.5]):
        with pytest.raises(ValueError, match="levels: expected at least two increasing numbers"):
            relative_robustness([1.0] * len(levels), levels)
    with pytest.raises(ValueError, match=r"baseline: expected one value for each of 4 levels"):
        robust_auc([1.0] * 4, [1.0] * 3, LEVELS)
    with pytest.raises(ValueError, match=r"levels: expected to start at 0.*got 0\.5"):
        effective_robustness([1.0] * 2, [1.0] * 2, [0.5, 1.0])


def test_plot() -> None:
    figure = plot_curves(
        {"late": torch.rand(3, 4), "progressive": [0.9, 0.8, 0.7, 0.6]}, LEVELS, ylabel="accuracy"
    )
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["late", "progressive"]
    assert axis.lines[1].get_ydata().tolist() == [0.9, 0.8, 0.7, 0.6]
    assert len(axis.collections) == 1, "a band where there are several runs"


def test_matplotlib_is_imported_only_for_plots() -> None:
    code = "import sys, deqfuse.robustness; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
