"""``deqfuse experiment stability``: what keeps the layer's rows convergent in training.

MM-Dynamics with DEQ Fusion on data in MOGONET layout, trained alike but for one treatment
(``treatments.py``). The learning rate is fixed and every training has the same number of steps; the
epoch is chosen as in the omics study, by the cross-entropy on validation rows. Test rows are
measured for that epoch and for the last one, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from deqfuse import ConvergenceWarning
from deqfuse.data import MultiviewData
from deqfuse.experiments import omics, omics_data, stability_report
from deqfuse.experiments.mmdynamics import ADJOINT, DROPOUT, LABELS, SOLVER, MMDynamics
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.experiments.training import collect_warnings, evaluate, fit, predict
from deqfuse.experiments.treatments import POWER_STEPS, TREATMENTS, Treated, treat
from deqfuse.reports.page import Report

__all__ = ["LAYERS", "RECIPE", "StabilityStudy"]

LAYERS = ("deq", "paper")  # keys of mmdynamics.LABELS: injections of unit size, or as they come
# W2 of norm 1 and injections as they come: so many rows have to be rescued that on ROSMAP the first
# training had not ended after three minutes of processor time, where the others took 5 to 40 s.
SKIPPED = (("paper", "norm one"),)
STUDY_VERSION = 1  # rises when the same settings give other results; older trials are refused

# The omics study's, with the same number of steps for every treatment and no penalty but its own.
RECIPE = Treated(
    **{**asdict(omics.RECIPE), "epochs": 100, "patience": None, "jacobian_weight": 0.0}
)


@dataclass(frozen=True)
class StabilityStudy(Study):
    """Every treatment of every layer, but for ``SKIPPED``, with ``seeds`` seeds.

    Args:
        folder: data in MOGONET layout.
        seeds: how many; a seed decides initial values, dropout and the validation rows.
        recipe: how to train, treatments apart.
        treatments: keys of ``treatments.TREATMENTS``; "none" is always among them.
        layers: some of ``LAYERS``.
        dim: width of the encodings, as in the omics study.
    """

    folder: Path
    seeds: int = 3
    recipe: Treated = field(default_factory=lambda: RECIPE)
    treatments: tuple[str, ...] = tuple(TREATMENTS)
    layers: tuple[str, ...] = LAYERS
    dim: int = 300
    name = "stability"

    def settings(self) -> dict[str, Any]:
        learning, test = omics_data.read(self.folder)
        treated = ("jacobian_weight", "radius_weight", "layer_rate")
        return {
            "version": STUDY_VERSION,
            "data": self.folder.resolve().name,
            "rows": [learning.num_rows, test.num_rows],
            "views": list(learning.widths),
            "sha256": omics_data.checksum(learning, test),
            "validation": omics_data.VALIDATION,
            "dim": self.dim,
            "dropout": DROPOUT,
            "solver": f"{SOLVER}, {ADJOINT}",
            "power_steps": POWER_STEPS,
            **{name: value for name, value in asdict(self.recipe).items() if name not in treated},
        }

    def trials(self) -> list[Trial]:
        # Seeds outside: an interrupted study has all rows of the tables for its first seeds.
        return [
            Trial(
                f"{LABELS[fusion]}, {treatment.label}, seed {seed}",
                {"fusion": fusion, "treatment": key, "seed": seed},
            )
            for seed in range(self.seeds)
            for fusion in self.layers
            for key, treatment in TREATMENTS.items()
            if key in ("none", *self.treatments) and (fusion, key) not in SKIPPED
        ]

    def run(self, trial: Trial) -> dict[str, Any]:
        fusion, key, seed = (trial.params[name] for name in ("fusion", "treatment", "seed"))
        treatment, splits = TREATMENTS[key], omics_data.split(self.folder, seed)
        torch.manual_seed(seed)
        model = MMDynamics(splits.train.widths, splits.train.num_classes, fusion, self.dim)
        assert model.fusion is not None
        treat(model.fusion, treatment)
        recipe = replace(
            self.recipe,
            jacobian_weight=treatment.jacobian,
            radius_weight=treatment.radius,
            layer_rate=treatment.rate,
        )
        last: dict[str, Any] = {}

        def measure_last(epoch: int, score: float) -> None:
            if epoch == recipe.epochs:
                last.update(_on_test(model, splits.test))

        history = fit(model, splits.train, splits.validation, recipe, seed, measure_last)
        seconds = history.processor_seconds
        return {
            "test": _on_test(model, splits.test),
            "last_test": last,
            "processor_ms": 1000 * median(seconds),
            "processor_ms_mean": 1000 * fmean(seconds),
            **history.values(),
        }

    def report(self, records: Sequence[Record]) -> Report:
        learning, test = omics_data.read(self.folder)
        return stability_report.build(records, self.settings(), learning, test)

    def files(self) -> list[str]:
        return [*stability_report.FILES]


def _on_test(model: MMDynamics, test: MultiviewData) -> dict[str, Any]:
    """Scores, rows that converged and spectral radii of a model as it is."""
    with collect_warnings(ConvergenceWarning):  # the share of converged rows says it
        info = predict(model, test)[1]
    assert info is not None
    radius = info.spectral_radius().amax(0)  # of each row's worst block
    return {
        **evaluate(model, test),
        "rescued": info.rescued.double().mean().item(),
        "radius_max": radius.max().item(),
        "radius_median": radius.median().item(),
    }
