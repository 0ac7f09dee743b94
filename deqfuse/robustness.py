"""Robustness to noise: paired noise, performance curves, and what papers compute from them.

    curve = robustness_curve(evaluate, features, levels, modalities=[0], seed=0)
    robust_auc(curve, baseline_curve, levels)

Noise depends on the seed, the modality and the shapes only, never on the model: curves of several
models with one seed are paired, and their difference is not a difference between draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deqfuse import checks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "add_noise",
    "effective_robustness",
    "plot_curves",
    "relative_robustness",
    "robust_auc",
    "robustness_curve",
]

Values = Tensor | Sequence[float]
STREAMS = 1_000_003  # modalities between two seeds, so that no two streams coincide


def add_noise(
    features: Sequence[Tensor],  # N tensors of any shapes
    level: float,
    *,
    modalities: Sequence[int] | int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """``x_i + level * e_i``, e_i standard normal, for the chosen modalities; the others as given.

    A modality is one kind of input, here one tensor of ``features``. The e_i do not depend on
    ``level``, and are drawn on the CPU, so that every level, model, device and dtype sees the same
    ones.

    Args:
        features: N floating-point tensors (...) of any shapes, one per modality.
        level: >= 0, in units of the features: standardise them to read it as standard deviations;
            0 leaves every value as it is.
        modalities: indices (or one) that get noise; all when not given.
        seed: of the noise.

    Returns:
        N tensors of the shapes (...), dtypes and devices of ``features``.

    Raises:
        TypeError: ``features`` is no sequence of floating-point tensors.
        ValueError: a negative level, or an index out of range.
    """
    checks.sequence("features", features, "tensors")
    for i, x in enumerate(features):
        checks.tensor(f"features[{i}]", x)
    if not level >= 0:
        raise ValueError(f"level: expected a number >= 0, got {level!r}")
    noisy = list(features)
    for i in _indices(modalities, len(noisy)):
        generator = torch.Generator().manual_seed(STREAMS * seed + i)
        noise = torch.randn(noisy[i].shape, generator=generator)
        noisy[i] = noisy[i] + level * noise.to(noisy[i])
    return noisy


@torch.no_grad()
def robustness_curve(
    evaluate: Callable[[list[Tensor]], float],
    features: Sequence[Tensor],  # N tensors of any shapes
    levels: Sequence[float],
    *,
    modalities: Sequence[int] | int | None = None,
    seed: int = 0,
) -> Tensor:  # (levels,) float64
    """Performance at every noise level, of a model in evaluation mode.

    Args:
        evaluate: performance (accuracy, mean squared error, ...) of a model on these features, a
            number.
        features: N floating-point tensors (...) of any shapes, one per modality.
        levels: noise levels, increasing, in units of the features.
        modalities: indices (or one) that get noise; all when not given.
        seed: of the noise; curves of one seed are paired.

    Returns:
        (levels,) float64, what ``evaluate`` gave at each level.

    Raises:
        TypeError: ``features`` is no sequence of floating-point tensors.
        ValueError: levels that do not increase, or an index out of range.
    """
    _grid(levels)
    scores = [
        float(evaluate(add_noise(features, level, modalities=modalities, seed=seed)))
        for level in levels
    ]
    return torch.tensor(scores, dtype=torch.float64)


def robust_auc(
    curve: Values,  # (..., levels)
    baseline: Values,  # (..., levels)
    levels: Sequence[float],
    *,
    higher_is_better: bool = True,
) -> Tensor:  # (...) float64
    """RobustAUC, ``integral of Perf(f, s) - Perf(baseline, s) ds``; positive: f is more robust.

    Appendix C.1 of Shankar et al., *Progressive Fusion for Multimodal Integration* (arXiv
    2209.00302), by the trapezoidal rule. Exactly 0 for equal curves.

    Args:
        curve: (..., levels) performance of f per level.
        baseline: (..., levels) performance of the baseline per level, on the same noise.
        levels: noise levels s, increasing.
        higher_is_better: False for errors, which flips the sign.

    Returns:
        (...) float64, in units of performance times level.

    Raises:
        TypeError: ``higher_is_better`` is no bool.
        ValueError: levels that do not increase, or curves of another length.
    """
    own, other = _curves(levels, curve=curve, baseline=baseline)
    return _signed(_integral(own - other, levels), higher_is_better)


def relative_robustness(
    curve: Values,  # (..., levels)
    levels: Sequence[float],
    *,
    higher_is_better: bool = True,
) -> Tensor:  # (...) float64
    """Area under the performance curve: performance under noise as such.

    MultiBench (Liang et al., arXiv 2107.07502), ``eval_scripts/robustness.py``: the trapezoidal
    rule over the noise levels. MultiBench then rescales the areas of all methods in its own table
    onto [0, 1]; here they are as they are. Errors get a minus sign: more is better.

    Args:
        curve: (..., levels) performance per level.
        levels: noise levels, increasing.
        higher_is_better: False for errors, which flips the sign.

    Returns:
        (...) float64, in units of performance times level.

    Raises:
        TypeError: ``higher_is_better`` is no bool.
        ValueError: levels that do not increase, or a curve of another length.
    """
    (own,) = _curves(levels, curve=curve)
    return _signed(_integral(own, levels), higher_is_better)


def effective_robustness(
    curve: Values,  # (..., levels)
    baseline: Values,  # (..., levels)
    levels: Sequence[float],
    *,
    higher_is_better: bool = True,
) -> Tensor:  # (...) float64
    """How much slower performance falls than the baseline's, apart from its start.

    The area between the curve and the baseline moved to the same clean performance,
    ``integral of f(s) - (b(s) + f(0) - b(0))``. MultiBench (arXiv 2107.07502,
    ``eval_scripts/robustness.py``) takes late fusion as the baseline and sums over its equidistant
    levels where this integrates; it too rescales the result over its table of methods.

    Args:
        curve: (..., levels) performance of f per level.
        baseline: (..., levels) performance of the baseline b per level, on the same noise.
        levels: noise levels s, increasing from 0.
        higher_is_better: False for errors, which flips the sign.

    Returns:
        (...) float64, in units of performance times level.

    Raises:
        TypeError: ``higher_is_better`` is no bool.
        ValueError: ``levels`` does not start at 0 or increase, or curves of another length.
    """
    own, other = _curves(levels, curve=curve, baseline=baseline)
    if levels[0] != 0:
        raise ValueError(f"levels: expected to start at 0, the clean data, got {levels[0]!r}")
    moved = other + (own[..., :1] - other[..., :1])
    return _signed(_integral(own - moved, levels), higher_is_better)


def plot_curves(
    curves: Mapping[str, Values],  # (levels,) or (runs, levels) each
    levels: Sequence[float],
    *,
    title: str = "",
    ylabel: str = "performance",
) -> Figure:
    """Performance against noise as a matplotlib figure: mean over runs, shaded from low to high.

    Needs matplotlib, which is imported only here; ``figure.savefig(path)`` writes it.

    Args:
        curves: by label of the legend, performance (levels,) or, of several runs, (runs, levels).
        levels: noise levels, increasing.
        title: of the figure.
        ylabel: what performance is measured in.

    Returns:
        The figure, a ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: levels that do not increase, or curves of another length.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    styles = ("-", "--", "-.", ":")
    for i, (label, values) in enumerate(curves.items()):
        runs = _curves(levels, **{f"curves[{label!r}]": values})[0].reshape(-1, len(levels))
        style, colour = styles[i % len(styles)], f"C{i % 10}"
        if len(runs) > 1:
            axis.fill_between(levels, runs.amin(0), runs.amax(0), color=colour, alpha=0.15, lw=0)
        axis.plot(levels, runs.mean(0), style, color=colour, marker="o", ms=3, label=label)
    axis.set(xlabel="noise level", ylabel=ylabel, title=title)
    axis.grid(True, color="#e4e4e4", linewidth=0.7)
    axis.legend(frameon=False)
    return figure


def _indices(modalities: Sequence[int] | int | None, count: int) -> Sequence[int]:
    if modalities is None:
        return range(count)
    chosen = [modalities] if isinstance(modalities, int) else list(modalities)
    for i in chosen:
        if not 0 <= i < count:
            raise ValueError(f"modalities: expected indices from 0 to {count - 1}, got {i!r}")
    return chosen


def _grid(levels: Sequence[float]) -> Tensor:
    grid = torch.as_tensor(levels, dtype=torch.float64)
    if grid.dim() != 1 or len(grid) < 2 or not (grid.diff() > 0).all():
        raise ValueError(f"levels: expected at least two increasing numbers, got {levels!r}")
    return grid


def _curves(levels: Sequence[float], **named: Values) -> list[Tensor]:
    count, found = len(_grid(levels)), []
    for name, values in named.items():
        found.append(torch.as_tensor(values, dtype=torch.float64))
        if found[-1].dim() == 0 or found[-1].shape[-1] != count:
            raise ValueError(
                f"{name}: expected one value for each of {count} levels in the last dimension, "
                f"got shape {tuple(found[-1].shape)}"
            )
    return found


def _integral(values: Tensor, levels: Sequence[float]) -> Tensor:
    return torch.trapezoid(values, _grid(levels), dim=-1)


def _signed(area: Tensor, higher_is_better: bool) -> Tensor:
    checks.flag("higher_is_better", higher_is_better)
    return area if higher_is_better else -area
