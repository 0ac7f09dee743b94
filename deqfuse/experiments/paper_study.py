"""What the studies on MM-IMDB and CMU-MOSI share: one file of data, one table of fusions."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from deqfuse.data import Splits
from deqfuse.experiments.fusion_tables import (
    Metric,
    difference_table,
    on_test,
    score_table,
    solve_table,
    verdict,
)
from deqfuse.experiments.models import StudyModel
from deqfuse.experiments.statistics import describe, numbers
from deqfuse.experiments.study import Record, Study, Trial, select
from deqfuse.experiments.tasks import Task
from deqfuse.experiments.training import Recipe, evaluate, fit
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import Picture, Report, Section, file_name

__all__ = ["PaperStudy"]


@dataclass(frozen=True)
class PaperStudy(Study):
    """Every fusion with ``seeds`` seeds on the split that comes with the data.

    Args:
        data: the file.
        seeds: how many; a seed decides initial values, dropout and the order of the rows.
        recipe: how to train.
        rows: at most so many training, validation and test rows; all when None.
    """

    data: Path
    seeds: int
    recipe: Recipe
    rows: tuple[int, int, int] | None = None

    version: ClassVar[int]  # rises when the same settings give other results
    task: ClassVar[Task]
    labels: ClassVar[dict[str, str]]  # of the fusions
    metrics: ClassVar[dict[str, Metric]]  # the first one is drawn and decides the first line
    title: ClassVar[str]
    dim: ClassVar[int]

    @abstractmethod
    def splits(self) -> Splits:
        """The data; the same object at every call."""

    @abstractmethod
    def model(self, key: str, splits: Splits) -> StudyModel:
        """A model that is not trained."""

    @abstractmethod
    def method(self) -> tuple[str, ...]:
        """Paragraphs: data and model."""

    @abstractmethod
    def paper(self) -> tuple[str, ...]:
        """Paragraphs: what the paper reports on these data, and what it did otherwise."""

    def settings(self) -> dict[str, Any]:
        splits = self.splits()
        parts = (splits.train, splits.validation, splits.test)
        digest = hashlib.sha256()
        for part in parts:
            for tensor in (*part.views, part.labels):
                digest.update(tensor.numpy().data)
        return {
            "version": self.version,
            "sha256": digest.hexdigest()[:16],
            "rows": [part.num_rows for part in parts],
            "dim": self.dim,
            **asdict(self.recipe),
        }

    def trials(self) -> list[Trial]:
        return [
            Trial(f"{self.labels[key]}, seed {seed}", {"model": key, "seed": seed})
            for seed in range(self.seeds)
            for key in self.labels
        ]

    def run(self, trial: Trial) -> dict[str, Any]:
        key, seed = trial.params["model"], trial.params["seed"]
        splits = self.splits()
        torch.manual_seed(seed)
        model = self.model(key, splits)
        history = fit(model, splits.train, splits.validation, self.recipe, seed, task=self.task)
        return {
            "test": evaluate(model, splits.test, self.task),  # the only look at these rows
            "parameters": model.num_parameters,
            **history.values(),
        }

    def report(self, records: Sequence[Record]) -> Report:
        groups = {key: select(records, model=key) for key in self.labels}
        first = next(iter(self.metrics))
        metric = self.metrics[first]
        fusions = [key for key in self.labels if key != "concat"]
        note = (
            "seed by seed: mean, and in brackets two standard errors to either side. Shares in "
            "points. All seeds share the test rows, so the interval leaves out what other test "
            "rows would change."
        )
        values = [numbers(on_test(groups[key], first), metric.scale) for key in self.labels]
        figure = charts.dots("", metric.header, list(self.labels.values()), {"": values})
        sections = [
            Section(
                "Results",
                (),
                score_table(
                    groups,
                    self.labels,
                    self.metrics,
                    f"Test rows; mean ± standard error, seeds: {self.seeds}.",
                ),
                Picture(
                    to_png(figure), self._picture(), "Lines: mean over seeds. Dots: the seeds."
                ),
            ),
            Section("The paper's results", self.paper()),
            Section(
                "Difference to concatenation",
                (),
                difference_table(groups, fusions, "concat", self.labels, self.metrics, note),
            ),
            Section(
                "Convergence and cost",
                (),
                solve_table(
                    groups, self.labels, "step_ms", 1, "Ms per step: median over the steps."
                ),
            ),
            Section("What was done", (*self.method(), self._recipe())),
        ]
        name = metric.header.replace(" %", "")
        ours, theirs = on_test(groups["deq"], first), on_test(groups["concat"], first)
        lead = f"DEQ Fusion {verdict(ours, theirs, name)}."
        summary = {
            "test": {
                label: {name: describe(on_test(groups[key], name)) for name in self.metrics}
                for key, label in self.labels.items()
            }
        }
        return Report(self.title, lead, sections, summary)

    def files(self) -> list[str]:
        return [file_name(self._picture())]

    def _picture(self) -> str:
        header = self.metrics[next(iter(self.metrics))].header
        return f"{self.title}, {header.replace(' %', '')} on test rows"

    def _recipe(self) -> str:
        recipe = self.recipe
        return (
            f"AdamW, learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, "
            f"batches of {recipe.batch_size}, gradient norm clipped at {recipe.clip_norm:g}, "
            f"{recipe.epochs} epochs at most, ended after {recipe.patience} without a better one. "
            f"The epoch of best {recipe.choose_by} on the validation rows is kept and tested once. "
            f"Jacobian weight {recipe.jacobian_weight:g} where there is an equilibrium."
        )
