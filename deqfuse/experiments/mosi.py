"""``deqfuse experiment mosi``: sentiment from words and voice (arXiv 2306.16645, CMU-MOSI)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deqfuse.data import Splits
from deqfuse.data.mosi import load_mosi
from deqfuse.experiments.fusion_tables import Metric
from deqfuse.experiments.models import StudyModel
from deqfuse.experiments.paper_models import SequenceEncoder, TwoViews
from deqfuse.experiments.paper_study import PaperStudy
from deqfuse.experiments.tasks import SENTIMENT
from deqfuse.experiments.training import Recipe
from deqfuse.reports.errors import UserError

__all__ = ["MosiStudy"]

RECIPE = Recipe(
    epochs=60,
    patience=10,
    learning_rate=1e-3,
    weight_decay=1e-2,
    clip_norm=1.0,
    batch_size=64,
    optimizer="adamw",
    choose_by="mae",
)


@dataclass(frozen=True)
class MosiStudy(PaperStudy):
    """Text and audio of CMU-MOSI; ``data`` is MultiBench's aligned pickle."""

    data: Path
    seeds: int = 5
    recipe: Recipe = field(default_factory=lambda: RECIPE)
    name = "mosi"
    version = 1
    task = SENTIMENT
    title = "CMU-MOSI"
    dim = 64
    labels = {  # noqa: RUF012 - a ClassVar of the base
        "text": "text only",
        "audio": "audio only",
        "concat": "concatenation",
        "weighted": "weighted sum",
        "paper": "DEQ Fusion, papers' equations",
        "deq": "DEQ Fusion",
    }
    metrics = {  # noqa: RUF012
        "acc2": Metric("Acc-2 %", 100.0, 1),
        "acc7": Metric("Acc-7 %", 100.0, 1),
        "f1": Metric("F1 %", 100.0, 1),
        "mae": Metric("MAE", 1.0, 3),
        "corr": Metric("Corr", 1.0, 3),
    }

    def splits(self) -> Splits:
        return _read(self.data, self.rows)

    def model(self, key: str, splits: Splits) -> StudyModel:
        train = splits.train
        encoders = {
            name: SequenceEncoder(view.shape[-1], self.dim)
            for name, view in zip(train.view_names, train.views, strict=True)
        }
        return TwoViews(key, self.task, encoders, self.dim, 1)

    def method(self) -> tuple[str, ...]:
        train, rows = self.splits().train, self.settings()["rows"]
        text, audio = (view.shape[-1] for view in train.views)
        return (
            f"Data: {rows[0]} training, {rows[1]} validation and {rows[2]} test rows of the split "
            f"that comes with the data, without rows that have no text; {train.widths[0]} aligned "
            f"positions of {text} text and {audio} audio features, standardised on the training "
            "rows. Video is not used.",
            f"Encoders: the last state of a GRU, {self.dim} features; mean absolute error is "
            "minimised. Acc-7: rounded to the same of seven whole numbers. Acc-2 and F1 (weighted "
            "by the classes' rows): above zero or not, over all rows, as in the authors' code; "
            "others leave out rows whose truth is 0. Of MAE less is better.",
        )

    def paper(self) -> tuple[str, ...]:
        return (
            "arXiv 2306.16645 reports Acc-7, Acc-2, F1, MAE and Corr of DEQ Fusion on text and "
            "audio. Its figures were not at hand when this study was written, and are left out "
            "rather than quoted from memory: put them beside the table above.",
            "They are not of the same features either: the authors' code fine-tunes BERT on the "
            "words and fuses position by position with convolutions and batch norms, where this "
            "study has the word vectors of MultiBench's file and fuses once per row.",
        )


@functools.lru_cache(maxsize=1)
def _read(path: Path, rows: tuple[int, int, int] | None) -> Splits:
    try:
        splits = load_mosi(path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if rows is None:
        return splits
    parts = (splits.train, splits.validation, splits.test)
    firsts = [torch.arange(min(r, p.num_rows)) for r, p in zip(rows, parts, strict=True)]
    return Splits(*(p.rows(first) for p, first in zip(parts, firsts, strict=True)))
