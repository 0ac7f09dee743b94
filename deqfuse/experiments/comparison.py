"""The comparison of `deqfuse demo` and `deqfuse train`: five fusions, one recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch

from deqfuse import ConvergenceError, DEQFusion
from deqfuse.data import Splits
from deqfuse.experiments.absence import pattern_accuracy
from deqfuse.experiments.models import MASKED, PROGRESSIVE_STEPS, TIED_STEPS, FusionClassifier
from deqfuse.experiments.training import History, Recipe, evaluate, fit
from deqfuse.testing import gradient_errors

__all__ = [
    "KINDS",
    "RECIPE",
    "Comparison",
    "FusionKind",
    "GradientCheck",
    "Run",
    "by_fusion",
    "check_gradients",
    "train_one",
]

GRADIENT_ROWS = 4
GRADIENT_LIMIT = 1e-8

# The same for every fusion.
RECIPE = Recipe(
    epochs=60,
    learning_rate=2e-3,
    weight_decay=1e-2,
    clip_norm=1.0,
    batch_size=100,
    optimizer="adamw",
)


@dataclass(frozen=True)
class FusionKind:
    """One row of the comparison."""

    key: str  # of FusionClassifier
    label: str
    what: str  # half a sentence for the report
    steps: int = 0  # fixed number of applications of the map; 0 if there is none


KINDS = (
    FusionKind("concat", "concatenation", "the encodings side by side, no parameters of its own"),
    FusionKind("weighted", "weighted sum", "one learned weight per view"),
    FusionKind(
        "progressive",
        "Pro-Fusion",
        f"the weighted sum fed back into every encoder's hidden layer, {PROGRESSIVE_STEPS} steps",
        steps=PROGRESSIVE_STEPS,
    ),
    FusionKind(
        "tied",
        f"{TIED_STEPS} tied steps",
        f"the map of DEQ Fusion applied {TIED_STEPS} times, gradients through the steps",
        steps=TIED_STEPS,
    ),
    FusionKind(
        "deq",
        "DEQ Fusion",
        "the map's equilibrium, gradients by the implicit function theorem, Jacobian penalty",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on what."""

    title: str
    about_data: str
    splits: Splits  # standardised
    recipe: Recipe
    seeds: int
    metrics: tuple[str, ...] | None = None  # columns of the table; all that there are when None
    doubts: tuple[str, ...] = ()  # about the data

    @property
    def terms(self) -> str:
        """How the fusions are compared, in a few sentences."""
        recipe = self.recipe
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return (
            f"{len(KINDS)} fusions with the same encoders, head and recipe ({recipe.epochs} "
            f"epochs, AdamW, batches of {recipe.batch_size}), {seeds} each. The epoch is chosen on "
            "the validation rows; test rows are used for the final numbers only. DEQ Fusion alone "
            f"adds a Jacobian penalty (weight {recipe.jacobian_weight:g}) that keeps its solves "
            "convergent. Differences smaller than the spread over seeds mean nothing."
            + self._absence
        )

    @property
    def _absence(self) -> str:
        """What the fusions make of absent views; "" if there are none."""
        parts = {"training": self.splits.train, "test": self.splits.test}
        shares = {name: (~part.present).double().mean().item() for name, part in parts.items()}
        if not any(shares.values()):
            return ""
        masked = [kind.label for kind in KINDS if kind.key in MASKED]
        others = [kind.label for kind in KINDS if kind.key not in MASKED]
        named = " and ".join(f"{100 * share:.1f}% of the {name}" for name, share in shares.items())
        return (
            f" Absent are {named} rows' views. With a mask, which leaves them out: "
            f"{', '.join(masked)}. Without one, and the training rows' mean of the view's features "
            f"in its place: {', '.join(others)}."
        )


@dataclass
class Run:
    """One model trained with one seed."""

    kind: FusionKind
    seed: int
    model: FusionClassifier  # holding the parameters of the chosen epoch
    history: History
    test: dict[str, Any]  # as ``evaluate`` gives it
    # Per set of views that test rows have, as ``pattern_accuracy`` gives it.
    patterns: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def seconds_per_epoch(self) -> float:
        """Median wall time of a training epoch."""
        return median(self.history.epoch_seconds)


def train_one(
    kind: FusionKind,
    seed: int,
    splits: Splits,
    recipe: Recipe,
    on_epoch: Callable[[int, float], None] = lambda epoch, validation: None,
) -> Run:
    """Train one model, choose its epoch on the validation rows, measure it on the test rows.

    Args:
        kind: which fusion.
        seed: of the initial values, the order of the rows and dropout.
        splits: standardised data, on the device to train on.
        recipe: epochs and optimiser.
        on_epoch: see :func:`fit`.
    """
    train = splits.train
    device = train.labels.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the caller's random state is not ours to change
        torch.manual_seed(seed)
        model = FusionClassifier(kind.key, train.widths, train.num_classes).to(device)
        history = fit(model, train, splits.validation, recipe, seed, on_epoch)
    test, patterns = splits.test, {}
    if not test.present.all():
        patterns = pattern_accuracy(model, test)
    return Run(kind, seed, model, history, evaluate(model, test), patterns)


def by_fusion(runs: Sequence[Run]) -> list[tuple[FusionKind, list[Run]]]:
    """Runs of each fusion, in the order of ``KINDS``."""
    groups = [(kind, [run for run in runs if run.kind == kind]) for kind in KINDS]
    return [(kind, group) for kind, group in groups if group]


@dataclass(frozen=True)
class GradientCheck:
    """The trained layer's gradients against dense implicit ones."""

    worst: float
    where: str
    count: int
    rows: int

    @property
    def passed(self) -> bool:
        """False also when the difference is NaN."""
        return self.worst <= GRADIENT_LIMIT

    @property
    def text(self) -> str:
        """One sentence with the number."""
        if not self.count:
            return f"The gradients of the trained layer could NOT be checked: {self.where}."
        verdict = "as it should be" if self.passed else f"MORE than the {GRADIENT_LIMIT:g} allowed"
        return (
            "Gradients of the trained layer against dense implicit gradients (float64, "
            f"test rows: {self.rows}, parameters and inputs: {self.count}): worst relative "
            f"difference {self.worst:.1e} ({self.where}), {verdict}."
        )


def check_gradients(runs: Sequence[Run], splits: Splits) -> GradientCheck:
    """Of the first trained equilibrium, on the first test rows."""
    model = next(run.model for run in runs if run.kind.key == "deq").eval()
    with torch.no_grad():
        few = [view[:GRADIENT_ROWS] for view in splits.test.views]
        encodings = model.encode(few)
    try:
        errors = gradient_errors(cast(DEQFusion, model.fusion), encodings)
    except ConvergenceError as error:
        return GradientCheck(math.nan, str(error), 0, len(few[0]))
    # NaN is worse than any number; max() alone would let it hide.
    where = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return GradientCheck(errors[where], where, len(errors), len(few[0]))
