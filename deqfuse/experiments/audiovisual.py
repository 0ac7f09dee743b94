"""``deqfuse experiment audiovisual``: digits seen and spoken, after AVMNIST.

Every image is paired with a recording of the same digit, as in AVMNIST, on which progressive fusion
was tested (arXiv 2209.00302, Appendix D.3).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from deqfuse import ProFusion
from deqfuse.data import MultiviewData, Splits
from deqfuse.data.digits import Recordings, load_images, load_recordings, spectrogram
from deqfuse.experiments.audiovisual_models import LABELS, AudiovisualModel
from deqfuse.experiments.fusion_tables import verdict
from deqfuse.experiments.statistics import describe, numbers, percent, versus
from deqfuse.experiments.study import Record, Study, Trial, select
from deqfuse.experiments.training import Recipe, evaluate, fit
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.errors import UserError
from deqfuse.reports.page import NOTHING, Picture, Report, Section, Table, file_name

__all__ = ["AudiovisualStudy", "pair_digits"]

STUDY_VERSION = 3  # rises when the same settings give other results; older trials are refused
PICTURE = "Test accuracy of digits seen and spoken"
RECIPE = Recipe(epochs=15, learning_rate=1e-3, weight_decay=1e-4, clip_norm=1.0, batch_size=32)


@dataclass(frozen=True)
class AudiovisualStudy(Study):
    """Either sense alone, and the fusions of both.

    Args:
        images: folder of the MNIST files.
        audio: folder of the recordings.
        seeds: how many; a seed decides the pairs and the initial values.
        recipe: how to train.
        rows: at most so many training, validation and test pairs.
    """

    images: Path
    audio: Path
    seeds: int = 3
    recipe: Recipe = field(default_factory=lambda: RECIPE)
    rows: tuple[int, int, int] = (4000, 1000, 1000)
    name = "audiovisual"

    def settings(self) -> dict[str, Any]:
        pixels, digits, recordings = _read(self.images, self.audio)
        found = [len(part) for part in pixels]
        digest = hashlib.sha256()
        for tensor in (*pixels, *digits, *recordings.waves, recordings.labels, recordings.numbers):
            digest.update(tensor.numpy().tobytes())
        return {
            "version": STUDY_VERSION,
            "sha256": digest.hexdigest()[:16],
            "images": found,
            "recordings": len(recordings.waves),
            "rows": list(self.rows),
            **asdict(self.recipe),
        }

    def trials(self) -> list[Trial]:
        return [
            Trial(f"{LABELS[model]}, seed {seed}", {"model": model, "seed": seed})
            for seed in range(self.seeds)
            for model in LABELS
        ]

    def run(self, trial: Trial) -> dict[str, Any]:
        key, seed = trial.params["model"], trial.params["seed"]
        splits = _splits(self.images, self.audio, self.rows, seed)
        torch.manual_seed(seed)
        model = AudiovisualModel(key)
        history = fit(model, splits.train, splits.validation, self.recipe, seed)
        pro = model.fusion if isinstance(model.fusion, ProFusion) else None
        return {
            "test": evaluate(model, splits.test),
            "parameters": model.num_parameters,
            "overhead": pro.parameter_overhead if pro is not None and "pro" in key else None,
            **history.values(),
        }

    def report(self, records: Sequence[Record]) -> Report:
        groups = {key: select(records, model=key) for key in LABELS}
        scores = {k: [r.values["test"]["accuracy"] for r in g] for k, g in groups.items()}
        rows = [_row(key, groups[key], scores) for key in LABELS]
        headers = (
            "fusion",
            "accuracy %",
            "against concatenation",
            "parameters",
            "overhead",
            "converged, test",
            "converged, training",
            "ms/step",
        )
        note = (
            f"Mean ± standard deviation, seeds: {self.seeds}. Overhead: parameters that "
            "progressive fusion adds (the paper's models: 1.8% to 4.3%). Converged: rows on the "
            "test pairs, and in training over all steps. Ms per step: the clock's, with whatever "
            "else ran on the machine."
        )
        series = {"": [numbers(scores[key], 100) for key in LABELS]}
        figure = charts.dots("", "test accuracy, %", list(LABELS.values()), series)
        picture = Picture(to_png(figure), PICTURE, "Lines: mean over seeds. Dots: the seeds.")
        settings = self.settings()
        method = (
            f"{settings['images'][0]} + {settings['images'][1]} images, {settings['recordings']} "
            f"recordings; at most {self.rows[0]}, {self.rows[1]} and {self.rows[2]} pairs to "
            "train, validate and test. Recordings with numbers 0-4 are tested, 5-9 validated on. "
            f"Adam, learning rate {self.recipe.learning_rate:g}, {self.recipe.epochs} epochs; the "
            "epoch of best validation accuracy is tested once. DEQ Fusion and the penalised "
            f"equilibrium train with the Jacobian penalty, weight {self.recipe.jacobian_weight:g}."
        )
        sections = [
            Section("Results", (), Table(headers, tuple(rows), (note,)), picture),
            Section("What was done", (method,)),
        ]
        lead = (
            f"DEQ Fusion {verdict(scores['deq'], scores['base'], 'accuracy')}. An image and a "
            "recording of the same digit, after arXiv 2209.00302, Appendix D.3."
        )
        summary = {"accuracy": {LABELS[k]: describe(v) for k, v in scores.items()}}
        return Report("Audiovisual: digits seen and spoken", lead, sections, summary)

    def files(self) -> list[str]:
        return [file_name(PICTURE)]


def _row(
    key: str, group: Sequence[Record], scores: dict[str, list[float | None]]
) -> tuple[str, ...]:
    values = [record.values for record in group]
    overhead = values[0]["overhead"]
    tested = [v["test"]["converged"] for v in values if "converged" in v["test"]]
    trained = [v["train_converged"] for v in values if "train_converged" in v]
    return (
        LABELS[key],
        percent(scores[key]),
        NOTHING if key == "base" else versus(scores[key], scores["base"], 100),
        f"{values[0]['parameters']:,}",
        NOTHING if overhead is None else f"{100 * overhead:.1f}%",
        *(f"{100 * fmean(found):.2f}%" if found else NOTHING for found in (tested, trained)),
        f"{fmean(v['step_ms'] for v in values):.1f}",
    )


@functools.lru_cache(maxsize=1)
def _read(images: Path, audio: Path) -> tuple[list[Tensor], list[Tensor], Recordings]:
    try:
        parts = [load_images(images, part) for part in ("train", "test")]
        recordings = load_recordings(audio)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return [part[0] for part in parts], [part[1] for part in parts], recordings


@functools.lru_cache(maxsize=1)
def _splits(images: Path, audio: Path, rows: tuple[int, int, int], seed: int) -> Splits:
    pixels, digits, recordings = _read(images, audio)
    heard = torch.stack([spectrogram(samples) for samples in recordings.waves])
    spoken = {
        "train": recordings.numbers >= 10,
        "validation": (recordings.numbers >= 5) & (recordings.numbers < 10),
        "test": recordings.numbers < 5,
    }
    order = torch.randperm(len(digits[0]), generator=torch.Generator().manual_seed(seed))
    held = min(rows[1], len(order) // 5)
    wanted = {
        "train": (0, order[held : held + rows[0]]),
        "validation": (0, order[:held]),
        "test": (1, torch.arange(min(rows[2], len(digits[1])))),
    }
    parts = {}
    for k, (name, (part, index)) in enumerate(wanted.items()):
        mask = spoken[name]
        try:
            chosen = pair_digits(digits[part][index], recordings.labels[mask], seed=3 * seed + k)
        except ValueError as error:
            raise UserError(f"{audio}, {name} recordings: {error}") from error
        parts[name] = MultiviewData(
            [pixels[part][index], heard[mask][chosen]],
            digits[part][index],
            ("image", "recording"),
            tuple(map(str, range(10))),
        )
    return Splits(**parts)


def pair_digits(
    seen: Tensor,  # (rows,) int64
    spoken: Tensor,  # (recordings,) int64
    *,
    seed: int,
) -> Tensor:
    """For every image the position of a random recording of the same digit: (rows,) int64.

    Raises:
        ValueError: a digit is seen and not spoken.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(seen), dtype=torch.int64)
    for digit in seen.unique().tolist():
        candidates = torch.nonzero(spoken == digit).flatten()
        if not len(candidates):
            raise ValueError(f"expected a recording of every digit seen, got none of {digit}.")
        rows = torch.nonzero(seen == digit).flatten()
        pick = torch.randint(len(candidates), (len(rows),), generator=generator)
        chosen[rows] = candidates[pick]
    return chosen
