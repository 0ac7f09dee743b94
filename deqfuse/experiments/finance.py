"""``deqfuse experiment finance``: stocks of a sector, after arXiv 2209.00302, Appendix C.

A stock is a modality: the window of its last daily returns. What is to be said, as in MultiBench:
the squared return of the next day.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqfuse import ConvergenceWarning, ProFusion
from deqfuse.data import MultiviewData, Splits
from deqfuse.data.prices import Prices, load_prices
from deqfuse.experiments import finance_report
from deqfuse.experiments.finance_models import LABELS, FinanceModel
from deqfuse.experiments.metrics import error_metrics
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.experiments.training import Recipe, collect_warnings, evaluate, fit, predict
from deqfuse.reports.errors import UserError
from deqfuse.reports.page import Report
from deqfuse.robustness import robustness_curve

__all__ = ["FinanceStudy", "make_windows"]

STUDY_VERSION = 1  # rises when the same settings give other results; older trials are refused
# Of the windows; MultiBench's 3200, 500 and some 1000 of another period are these shares.
TRAIN, VALIDATION = 0.68, 0.11
NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0)  # standard deviations of a return
RECIPE = Recipe(
    epochs=10,
    learning_rate=2e-3,
    weight_decay=1e-4,
    clip_norm=1.0,
    batch_size=128,
    choose_by="mse",
)


@dataclass(frozen=True)
class FinanceStudy(Study):
    """Every model on every sector.

    Args:
        prices: folder with open.csv and sectors.csv.
        seeds: how many; a seed decides initial values, dropout, noise and the order of the rows.
        recipe: how to train.
        window: days T that a model sees.
    """

    prices: Path
    seeds: int = 3
    recipe: Recipe = field(default_factory=lambda: RECIPE)
    window: int = 500
    name = "finance"

    def settings(self) -> dict[str, Any]:
        prices = _read(self.prices)
        digest = hashlib.sha256(prices.opens.numpy().tobytes())
        first = next(iter(prices.sectors))
        splits = _splits(self.prices, first, self.window)
        return {
            "version": STUDY_VERSION,
            "sha256": digest.hexdigest()[:16],
            "days": [prices.days[0], prices.days[-1], len(prices.days)],
            "sectors": {name: len(stocks) for name, stocks in prices.sectors.items()},
            "window": self.window,
            "rows": [p.num_rows for p in (splits.train, splits.validation, splits.test)],
            "noise_levels": list(NOISE_LEVELS),
            **asdict(self.recipe),
        }

    def trials(self) -> list[Trial]:
        return [
            Trial(
                f"{sector}, {LABELS[key]}, seed {seed}",
                {"sector": sector, "model": key, "seed": seed},
            )
            for seed in range(self.seeds)
            for sector in _read(self.prices).sectors
            for key in LABELS
        ]

    def run(self, trial: Trial) -> dict[str, Any]:
        sector, key, seed = (trial.params[name] for name in ("sector", "model", "seed"))
        splits = _splits(self.prices, sector, self.window)
        train, test = splits.train, splits.test
        torch.manual_seed(seed)
        model = FinanceModel(key, len(train.views), self.window)
        history = fit(model, train, splits.validation, self.recipe, seed, task=model.task)

        def score(noisy: list[Tensor]) -> float:
            with collect_warnings(ConvergenceWarning):
                answers, _ = predict(model, replace(test, views=noisy))
            return error_metrics(answers, test.labels)["mse"]

        # The test rows are read from here on, when the epoch has been chosen.
        mean = train.labels.mean(0).expand_as(test.labels)
        pro = model.body if isinstance(model.body, ProFusion) and key != "late" else None
        return {
            "test": evaluate(model, test, model.task),
            "mean_mse": error_metrics(mean, test.labels)["mse"],
            "noise": robustness_curve(score, test.views, NOISE_LEVELS, seed=seed).tolist(),
            "parameters": model.num_parameters,
            "overhead": None if pro is None else pro.parameter_overhead,
            **history.values(),
        }

    def report(self, records: Sequence[Record]) -> Report:
        return finance_report.build(records, self.settings(), self.seeds)

    def files(self) -> list[str]:
        return list(finance_report.FILES)


def make_windows(opens: Tensor, window: int) -> Splits:
    """Windows of returns and what follows them, split in the order of time.

    Returns are divided by their standard deviation over the training windows, targets (squared
    returns of the next day) by theirs over the training rows.

    Args:
        opens: (days, stocks) float64 prices.
        window: days T.

    Returns:
        Per stock a view (rows, T, 1); labels (rows, stocks).

    Raises:
        ValueError: too few days for one row in each part.
    """
    returns = (opens[1:] / opens[:-1]).log()
    count = len(returns) - window
    bounds = [0, int(TRAIN * count), int((TRAIN + VALIDATION) * count), count]
    if count < 1 or any(b <= a for a, b in itertools.pairwise(bounds)):
        raise ValueError(
            f"expected more days than the window of {window} and some to train, validate and test "
            f"on, got {len(opens)} days. Remedy: a shorter --window, or more days."
        )
    targets = returns[window:].square()
    returns = returns / returns[: window + bounds[1]].std()
    targets = (targets / targets[: bounds[1]].std()).float()
    rows = returns.float().unfold(0, window, 1)[:count]  # (rows, stocks, T)
    names = tuple(map(str, range(rows.shape[1])))
    return Splits(
        *(
            MultiviewData(
                [stock[:, :, None].contiguous() for stock in rows[a:b].unbind(1)],
                targets[a:b],
                names,
                names,
            )
            for a, b in itertools.pairwise(bounds)
        )
    )


@functools.lru_cache(maxsize=1)
def _read(folder: Path) -> Prices:
    try:
        return load_prices(folder)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


@functools.lru_cache(maxsize=1)
def _splits(folder: Path, sector: str, window: int) -> Splits:
    prices = _read(folder)
    try:
        return make_windows(prices.opens[:, list(prices.sectors[sector])], window)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
