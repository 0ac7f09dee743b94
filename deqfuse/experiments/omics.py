"""``deqfuse experiment omics``: MM-Dynamics with concatenation against MM-Dynamics with DEQ Fusion.

Section 4.1, Table 1 and Appendix B of arXiv 2306.16645, on any data in MOGONET layout.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deqfuse import ConvergenceWarning
from deqfuse.backends import BackendName
from deqfuse.data import MultiviewData, Splits, load_mogonet, split_stratified
from deqfuse.data.multiview import checked
from deqfuse.experiments import absence, omics_report
from deqfuse.experiments.mmdynamics import ADJOINT, DROPOUT, SOLVER, MMDynamics
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.experiments.training import (
    History,
    Recipe,
    collect_warnings,
    evaluate,
    fit,
    train_step,
)
from deqfuse.reports.errors import UserError
from deqfuse.reports.page import Report

__all__ = ["OmicsStudy"]

VALIDATION = 0.2  # of the training rows, drawn anew for every seed
TIMED_STEPS = 15

STUDY_VERSION = 2  # rises when the same settings give other results; older trials are refused
FUSED_GAIN = 1.0  # of both fusions: Han et al.'s plain sum, see MMDynamics.loss
# The paper's text asks for dropout in the fuse map without giving its rate; the block of its code
# has 0.2 by default, and the branches that its code builds have none. Both are run.
FUSE_DROPOUT = {"deq": 0.2, "deq without dropout": 0.0}
# Trained as MM-Dynamics was released; what they are otherwise.
RELEASED = {"released": "concat", "deq released": "deq"}

# The paper's: Adam with 1e-4, times 0.2 every 500 epochs, Jacobian weight 20, 1000 epochs. Weight
# decay and clipping are those of the authors' code. Ending after 200 epochs without a better one
# is ours; the epoch that is kept is one of the epochs before.
PAPER = Recipe(
    epochs=1000,
    patience=200,
    learning_rate=1e-4,
    weight_decay=1e-4,
    clip_norm=30.0,
    schedule="step",
    evaluate_every=10,
)


@dataclass(frozen=True)
class OmicsStudy(Study):
    """Every subset of the views, both fusions, ``seeds`` seeds; one timing of the step.

    A single view has nothing to fuse: it is run once per seed, as MM-Dynamics of one view. With all
    views there are more rows: DEQ Fusion without dropout in the fuse map, and both fusions trained
    as the authors of MM-Dynamics released it (all training rows, the last epoch). Absent views, of
    all, are measured on models of trials of their own; the data have to be complete.

    Args:
        folder: data in MOGONET layout.
        seeds: how many; a seed decides initial values, dropout and the validation rows.
        recipe: how to train.
        dim: width of the encodings; 300 in the paper's ROSMAP, 500 in its BRCA configuration.
    """

    folder: Path
    seeds: int = 10
    recipe: Recipe = field(default_factory=lambda: PAPER)
    dim: int = 300
    name = "omics"

    def settings(self) -> dict[str, Any]:
        learning, test = _read(self.folder)
        return {
            "version": STUDY_VERSION,
            "data": self.folder.resolve().name,
            "rows": [learning.num_rows, test.num_rows],
            "views": list(learning.widths),
            "sha256": _checksum(learning, test),
            "validation": VALIDATION,
            "dim": self.dim,
            "dropout": DROPOUT,
            "fuse_dropout": FUSE_DROPOUT,
            "fused_gain": FUSED_GAIN,
            "solver": f"{SOLVER}, {ADJOINT}",
            **asdict(self.recipe),
        }

    def trials(self) -> list[Trial]:
        count = len(_read(self.folder)[0].views)
        subsets = [
            list(chosen)
            for size in range(count, 0, -1)
            for chosen in itertools.combinations(range(count), size)
        ]
        # Seeds outside: an interrupted study has all rows of the table for its first seeds.
        runs = [
            Trial(
                f"views {_name(views)}, {fusion}, seed {seed}",
                {"views": views, "fusion": fusion, "seed": seed},
            )
            for seed, views, fusion in itertools.product(
                range(self.seeds), subsets, (*RELEASED, "concat", *FUSE_DROPOUT)
            )
            if fusion == "concat"
            or (len(views) > 1 if fusion == "deq" else len(views) == count > 1)
        ]
        absent = absence.absence_trials(("concat", "deq"), omics_report.LABELS, self.seeds)
        runs += absent if count > 1 else []
        return [*runs, Trial("time of a training step", {"timing": True}, alone=True)]

    def run(self, trial: Trial) -> dict[str, Any]:
        if trial.params.get("timing"):
            return self._time_steps()
        if "absent" in trial.params:
            return self._absent(*(trial.params[name] for name in ("absent", "dropout", "seed")))
        views, fusion, seed = (trial.params[name] for name in ("views", "fusion", "seed"))
        released = fusion in RELEASED
        splits = self._splits(views, seed, hold_out=not released)
        torch.manual_seed(seed)
        model = self._model(splits.train, RELEASED.get(fusion, fusion))
        validation = None if released else splits.validation
        history = fit(model, splits.train, validation, self.recipe, seed)
        parameters = sum(p.numel() for p in model.parameters())
        # The only place that reads the test rows.
        test = evaluate(model, splits.test)
        return {"test": test, "parameters": parameters, **history.values()}

    def report(self, records: Sequence[Record]) -> Report:
        learning, test = _read(self.folder)
        return omics_report.build(records, self.settings(), learning, test)

    def files(self) -> list[str]:
        return [*omics_report.FILES, absence.FILE]

    def _absent(self, fusion: str, dropout: bool, seed: int) -> dict[str, Any]:
        """Accuracy against the number of absent views, for everything that may replace them."""
        splits = self._splits(range(len(_read(self.folder)[0].views)), seed)
        means = [view.mean(0) for view in splits.train.views]
        p = absence.MODALITY_DROPOUT if dropout else 0.0
        replaced = {"mask": None} if fusion == "deq" else {"zeros": None, "mean": means}
        curves, model = {}, None
        for name, filler in replaced.items():
            if model is None or dropout:  # complete rows: trained alike
                torch.manual_seed(seed)
                model = self._model(splits.train, fusion, means=filler, modality_dropout=p)
                fit(model, splits.train, splits.validation, self.recipe, seed)
            model.means = filler
            curves[name] = absence.absence_curve(model, splits.test, seed)
        return {"curves": curves}

    def _model(self, train: MultiviewData, fusion: str, **how: Any) -> MMDynamics:
        return MMDynamics(
            train.widths,
            train.num_classes,
            "deq" if fusion in FUSE_DROPOUT else "concat",
            self.dim,
            fuse_dropout=FUSE_DROPOUT.get(fusion, 0.0),
            fused_gain=FUSED_GAIN,
            **how,
        )

    def _splits(self, views: Sequence[int], seed: int, hold_out: bool = True) -> Splits:
        """Scaled; without ``hold_out`` all rows are for training, none for validation."""
        learning, test = _read(self.folder)
        if not hold_out:
            splits = Splits(learning, learning.rows(torch.arange(0)), test)
            return Splits(*(_take(part, views) for part in _scaled(splits)))
        kept, held = split_stratified(learning.labels, (1 - VALIDATION, VALIDATION), seed=seed)
        splits = Splits(learning.rows(kept), learning.rows(held), test)
        return Splits(*(_take(part, views) for part in _scaled(splits)))

    def _time_steps(self) -> dict[str, Any]:
        """The same training step of DEQ Fusion on both backends, and of concatenation."""
        splits = self._splits(range(len(_read(self.folder)[0].views)), 0)
        train = splits.train
        most = torch.get_num_threads()
        values: dict[str, Any] = {}
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            runs = {}
            models: tuple[tuple[str, BackendName], ...]
            models = (("concat", "auto"), ("cpu", "cpu"), ("reference", "reference"))
            for name, backend in models:
                torch.manual_seed(0)
                model = self._model(train, "concat" if name == "concat" else "deq")
                if model.fusion is not None:
                    model.fusion.backend = backend
                optimizer = torch.optim.Adam(model.parameters(), lr=self.recipe.learning_rate)
                runs[name] = (model, optimizer, History())
            with collect_warnings(ConvergenceWarning):  # these steps are for their times only
                for _ in range(TIMED_STEPS):  # taking turns: a slow moment slows all of them
                    for model, optimizer, history in runs.values():
                        model.train()
                        train_step(model, train, optimizer, self.recipe, history)
            for name, (_, _, history) in runs.items():
                values[f"{name}, {threads}"] = 1000 * median(history.step_seconds[3:])
        torch.set_num_threads(most)
        return {"ms": values, "rows": train.num_rows, "dim": self.dim}


@functools.lru_cache(maxsize=1)
def _read(folder: Path) -> tuple[MultiviewData, MultiviewData]:
    try:
        learning, test = load_mogonet(folder)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if int(learning.labels.bincount().min()) < 2:
        raise UserError(f"{folder}: expected at least 2 training rows of every class.")
    for part, data in (("tr", learning), ("te", test)):
        lacking = torch.nonzero(~data.present)
        if len(lacking):
            row, view = lacking[0].tolist()
            raise UserError(
                f"{folder / f'{data.view_names[view]}_{part}.csv'}, line {row + 1}: expected "
                "complete data, since the study compares sets of views and leaves views out by "
                f"itself, got a sample without the view; there are {len(lacking)} such lines. "
                "Remedy: `deqfuse train` takes such data; or leave these samples out of all files."
            )
    return learning, test


def _scaled(splits: Splits) -> list[MultiviewData]:
    """Every feature to [0, 1] on the training rows, as the authors do."""
    parts = (splits.train, splits.validation, splits.test)
    moments = [(view.amin(0), view.amax(0)) for view in splits.train.views]
    scaled = []
    for part in parts:
        pairs = zip(part.views, moments, strict=True)
        views = [(view - low) / (high - low).clamp(min=1e-10) for view, (low, high) in pairs]
        try:
            scaled.append(checked(replace(part, views=views)))
        except ValueError as error:
            raise UserError(str(error)) from error
    return scaled


def _take(data: MultiviewData, views: Sequence[int]) -> MultiviewData:
    names = tuple(data.view_names[i] for i in views)
    return replace(data, views=[data.views[i] for i in views], view_names=names)


def _name(views: Sequence[int]) -> str:
    return "+".join(str(i + 1) for i in views)


def _checksum(learning: MultiviewData, test: MultiviewData) -> str:
    digest = hashlib.sha256()
    for part in (learning, test):
        for tensor in (*part.views, part.labels):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
