"""``deqfuse experiment numerals``: fusions and ablations on the handwritten numerals.

What the shipped data can say about arXiv 2306.16645 (Tables 6, 7 and 9, Figure 3) and 2209.00302
(Figure 10b, Appendices C.1 and G), and what becomes of every fusion when views are absent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqfuse import Anderson, ConvergenceWarning, Implicit, ProFusion
from deqfuse.data import MultiviewData, Splits, load_numerals, split_numerals, split_stratified
from deqfuse.experiments import absence, measurements, numerals_measured, numerals_report
from deqfuse.experiments.comparison import RECIPE
from deqfuse.experiments.models import (
    DIM,
    DROPOUT,
    FUSIONS,
    LABELS,
    MASKED,
    MODELS,
    PRO_EQUILIBRIA,
    TIED_STEPS,
    Fill,
    FusionClassifier,
)
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.experiments.training import (
    History,
    Recipe,
    collect_warnings,
    evaluate,
    fit,
    predict,
    train_step,
)
from deqfuse.reports.page import Report

__all__ = ["NumeralsStudy"]

NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)  # standard deviations of the feature
STUDY_VERSION = 2  # rises when the same settings give other results; older trials are refused
STEPS = (1, 2, 3, 4, 6, 8)  # R of the cost measurement
TRACE_STEPS = 20  # of the residual curves


@dataclass(frozen=True)
class NumeralsStudy(Study):
    """All fusions and ablations, two sizes of the training set, ``seeds`` seeds each.

    Absent views are measured with the first of these sizes, on models of trials of their own.

    Args:
        seeds: how many; a seed decides initial values, batches, dropout, noise, and which rows a
            small training set gets.
        recipe: how to train.
        train_rows: sizes of the training set, of 500 rows.
        held_rows: at most so many validation and test rows (None: all).
        models: keys of ``LABELS``.
        timed: repetitions of the cost measurement.
    """

    seeds: int = 5
    recipe: Recipe = RECIPE
    train_rows: tuple[int, ...] = (500, 100)
    held_rows: int | None = None
    models: tuple[str, ...] = MODELS
    timed: int = 30
    name = "numerals"

    def settings(self) -> dict[str, Any]:
        return {
            "version": STUDY_VERSION,
            "dim": DIM,
            "dropout": DROPOUT,
            "tied_steps": TIED_STEPS,
            "solver": f"{Anderson()}, {Implicit()}",
            "train_rows": list(self.train_rows),
            "held_rows": self.held_rows,
            "noise_levels": list(NOISE_LEVELS),
            **asdict(self.recipe),
        }

    def trials(self) -> list[Trial]:
        runs = [
            Trial(
                f"{rows} rows, {LABELS[model]}, seed {seed}",
                {"rows": rows, "model": model, "seed": seed},
            )
            for seed in range(self.seeds)
            for rows in self.train_rows
            for model in self.models
        ]
        fusions = [model for model in FUSIONS if model in self.models]
        absent = absence.absence_trials(fusions, LABELS, self.seeds)
        return [*runs, *absent, Trial("cost against R", {"cost": True}, alone=True)]

    def run(self, trial: Trial) -> dict[str, Any]:
        if trial.params.get("cost"):
            return self._cost()
        if "absent" in trial.params:
            return self._absent(*(trial.params[name] for name in ("absent", "dropout", "seed")))
        rows, key, seed = (trial.params[name] for name in ("rows", "model", "seed"))
        splits = self._splits(rows, seed)
        model, history = self._trained(key, splits, seed)
        # The test rows are read from here on, when the epoch has been chosen.
        values = {
            "test": evaluate(model, splits.test),
            "parameters": model.num_parameters,
            **history.values(),
        }
        if key in FUSIONS:
            values["noise"] = _noise(model, splits, seed)
        if model.pro is not None and key != "base":
            values["overhead"] = model.pro.parameter_overhead
            values["probes"] = measurements.probe_steps(model, splits)
        if key in ("deq", *PRO_EQUILIBRIA):
            values["residuals"] = _residuals(model, splits.test)
            values["stopped"] = measurements.stopped_accuracy(model, splits.test)
        return values

    def report(self, records: Sequence[Record]) -> Report:
        return numerals_report.build(records, self.settings())

    def files(self) -> list[str]:
        return [*numerals_measured.FILES, absence.FILE]

    def _trained(
        self, key: str, splits: Splits, seed: int, **how: Any
    ) -> tuple[FusionClassifier, History]:
        """A model by the recipe, and how training went."""
        torch.manual_seed(seed)
        model = FusionClassifier(key, splits.train.widths, splits.train.num_classes, **how)
        rows = splits.train.num_rows
        batch_size = min(self.recipe.batch_size or rows, max(rows // 5, 1))
        recipe = replace(self.recipe, batch_size=batch_size)
        return model, fit(model, splits.train, splits.validation, recipe, seed)

    def _absent(self, key: str, dropout: bool, seed: int) -> dict[str, Any]:
        """Accuracy against the number of absent views, for everything that may replace them."""
        splits = self._splits(self.train_rows[0], seed)
        fills: tuple[Fill, ...] = ("mean",) if key in MASKED else ("zeros", "mean")
        p = absence.MODALITY_DROPOUT if dropout else 0.0
        curves, model = {}, None
        for fill in fills:
            if model is None or dropout:  # complete rows: trained alike
                model, _ = self._trained(key, splits, seed, fill=fill, modality_dropout=p)
            model.fill = fill
            name = "mask" if key in MASKED else fill
            curves[name] = absence.absence_curve(model, splits.test, seed)
        return {"curves": curves}

    def _splits(self, rows: int, seed: int) -> Splits:
        splits = _numerals()
        train, held = splits.train, self.held_rows
        if rows < train.num_rows:
            share = rows / train.num_rows
            train = train.rows(split_stratified(train.labels, (share, 1 - share), seed=seed)[0])
        parts = [train, splits.validation, splits.test]
        if held is not None:
            # Evenly, as rows are sorted by class.
            parts[1:] = [
                p.rows(torch.arange(0, p.num_rows, -(-p.num_rows // held))) for p in parts[1:]
            ]
        return Splits(*parts).standardized()

    def _cost(self) -> dict[str, Any]:
        """Time of a training step and of a forward against R, at one batch of the recipe."""
        splits = self._splits(self.train_rows[0], 0)
        train = splits.train
        batch = train.rows(torch.arange(min(train.num_rows, self.recipe.batch_size or 100)))
        steps: dict[str, Callable[[], Any]] = {}
        forwards: dict[str, Callable[[], Any]] = {}
        names = [*(f"R = {r}" for r in STEPS), *PRO_EQUILIBRIA, "concat", "tied", "deq"]
        for name in names:
            torch.manual_seed(0)
            key = "pro 2" if name.startswith("R") else name
            model = FusionClassifier(key, train.widths, train.num_classes)
            if name.startswith("R"):
                assert isinstance(model.pro, ProFusion)
                model.pro.steps = int(name.split()[2])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            steps[name] = functools.partial(_one_step, model, batch, optimizer, self.recipe)
            forwards[name] = functools.partial(predict, model, batch)
        with collect_warnings(ConvergenceWarning):
            return {
                "step_ms": measurements.median_ms(steps, self.timed),
                "forward_ms": measurements.median_ms(forwards, self.timed),
                "rows": batch.num_rows,
                "tol": Anderson().tol,
            }


def _one_step(
    model: FusionClassifier, batch: MultiviewData, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> None:
    model.train()
    train_step(model, batch, optimizer, recipe, History())


def _residuals(model: FusionClassifier, test: MultiviewData) -> dict[str, list[list[float]]]:
    """Relative residual per solver step: "block, solver" -> [median, 97.5th percentile]."""
    return {
        f"{curve.block}, {curve.label}": [
            [float(f"{v:.3g}") for v in values.tolist()] for values in (curve.median, curve.high)
        ]
        for curve in measurements.residual_curves(model, test, TRACE_STEPS)
    }


def _noise(model: FusionClassifier, splits: Splits, seed: int) -> dict[str, list[float]]:
    """Test accuracy per noise level: on all views at once, and on one view (mean over views)."""

    def curve(view: int | None) -> Tensor:
        return measurements.noise_curve(model, splits.test, NOISE_LEVELS, view, seed)

    single = torch.stack([curve(i) for i in range(len(splits.test.views))])
    return {"all views": curve(None).tolist(), "one view": single.mean(0).tolist()}


@functools.lru_cache(maxsize=1)
def _numerals() -> Splits:
    return split_numerals(load_numerals())
